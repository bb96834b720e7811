"""Inputs whose masks are there: told by the masks alone, so that thousands take seconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tilenet.engine.document import read_sidecar
from tilenet.engine.plan import Format
from tilenet.engine.request import ENDINGS, Job
from tilenet.engine.runfolder import run_folder
from tilenet.errors import TilenetError, without_secrets
from tilenet.sinks import document
from tilenet.strangers import exists, is_store, parse_json

__all__ = ["finished_mask"]


def finished_mask(
    job: Job, wanted: Format | None, scenes: tuple[str, ...] = (), *, named: bool = False
) -> Path | None:
    """Return the complete mask of a raster that is there already, None if it must be made.

    Whichever model and options made it, and whether the raster is still the same, does not matter;
    the raster is not even looked at. A mask with invalid blocks does not count.

    Parameters
    ----------
    job : Job
        The raster and where its mask goes.
    wanted : str or None
        The format it must have.
    scenes : tuple of str
        The rasters of a mosaic.
    named : bool
        `job.out` is the mask's own name.
    """
    for out in [job.out] if named else _names(job.out, ENDINGS if wanted is None else [wanted]):
        if exists(run_folder(out)):  # what a crash left is for the run to sweep
            continue
        said = _said(out)
        if _is_of(said, job, scenes) and not said["invalid"]:
            return out
    return None


def _names(stem: Path, formats: Iterable[Format]) -> list[Path]:
    return [stem.with_name(stem.name + ENDINGS[one]) for one in formats]


def _said(out: Path) -> dict[str, Any]:
    """Return what a mask says of its run; nothing if there is none of ours."""
    try:
        if is_store(out):
            return dict(parse_json(document(out, "plan")))
        found = read_sidecar(out)
        return found if found is not None and found["size"] == out.stat().st_size else {}
    except (TilenetError, OSError, ValueError, KeyError, TypeError):
        return {}  # the run says what is wrong with it


def _is_of(said: dict[str, Any], job: Job, scenes: tuple[str, ...]) -> bool:
    try:
        made_of = [said["recipe"]["input"], *said["recipe"]["view"]["mosaic"]]
    except (KeyError, TypeError):  # a stranger's, or nothing
        return False
    wanted = [job.path.absolute(), *scenes]
    shown = [[without_secrets(str(name)) for name in names] for names in (made_of, wanted)]
    return "pixels" in said and shown[0] == shown[1]
