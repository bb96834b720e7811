"""An old output that gets a successor: it lies in the run folder until that one has its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilenet import durable
from tilenet.engine.document import probabilities_of, read_sidecar, sidecar
from tilenet.engine.runfolder import empty, locked, remove_run_folder, run_folder

__all__ = ["companions", "move_aside", "put_back", "scratch"]

_ASIDE, _UNDER_WAY = "replaced", "replacing"


def companions(out: Path, *, probabilities: bool) -> list[Path]:
    """Return the files that belong to a one-file mask."""
    beside = [sidecar(out), out.with_name(f"{out.name}.aux.xml")]
    return [*beside, probabilities_of(out)] if probabilities else beside


def _beside(out: Path) -> list[Path]:
    """Return what lies beside an output and is ours, the sidecar last; nothing beside a store.

    By the sidecar the rest is known as ours: it goes last, and comes back first.
    """
    known = read_sidecar(out)
    if out.is_dir() or known is None:
        return []
    own = companions(out, probabilities="probabilities" in known)
    return [path for path in reversed(own) if os.path.lexists(path)]


def move_aside(out: Path) -> None:
    """Move an output of ours and what belongs to it away, just before its successor comes."""
    if not out.exists():
        return
    aside, under_way = (run_folder(out) / name for name in (_ASIDE, _UNDER_WAY))
    if aside.exists():  # a run that was killed had replaced it
        durable.remove_folder(aside)
    under_way.mkdir(parents=True)
    for path in [out, *_beside(out)]:
        path.replace(under_way / path.name)
    under_way.rename(aside)  # from now on, what lies beside the mask is its successor's


def put_back(out: Path) -> None:
    """Bring an old output back whose successor has not come; else do nothing.

    The mask comes last: where it is, all that belongs to it is. Only who owns the run folder may do
    so.
    """
    aside, under_way = (run_folder(out) / name for name in (_ASIDE, _UNDER_WAY))
    if (aside / out.name).exists() and not os.path.lexists(out):
        for path in _beside(out):
            path.unlink()
        aside.rename(under_way)
    if not under_way.exists():
        return
    for path in [*companions(out, probabilities=True), out]:
        if (under_way / path.name).exists():
            (under_way / path.name).replace(path)
    under_way.rmdir()
    durable.sync_directory(out.parent)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Own a run folder for work that holds no run and, after a crash, is begun anew.

    Raises
    ------
    OutputError
        Somebody else is at work on this output.
    """
    folder = run_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        put_back(out)
        empty(folder)
        try:
            yield folder
        finally:
            put_back(out)  # if that fails, the old output stays where it is
            remove_run_folder(folder)
