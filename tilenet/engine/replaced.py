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

_ASIDE = "replaced"


def companions(out: Path, *, probabilities: bool) -> list[Path]:
    """Return the files that belong to a one-file mask."""
    beside = [sidecar(out), out.with_name(f"{out.name}.aux.xml")]
    return [*beside, probabilities_of(out)] if probabilities else beside


def _beside(out: Path) -> list[Path]:
    """Return what lies beside an output and is ours; beside a store, nothing is."""
    known = read_sidecar(out)
    if out.is_dir() or known is None:
        return []
    own = companions(out, probabilities="probabilities" in known)
    return [path for path in own if os.path.lexists(path)]


def move_aside(out: Path) -> None:
    """Move an output of ours and what belongs to it away, just before its successor comes.

    The mask goes first and comes back last: where it is, all that belongs to it is.
    """
    if not out.exists():
        return
    aside = run_folder(out) / _ASIDE
    if aside.exists():  # a run that was killed had replaced it
        durable.remove_folder(aside)
    aside.mkdir(parents=True)
    for path in [out, *_beside(out)]:
        path.replace(aside / path.name)


def put_back(out: Path) -> None:
    """Bring an old output back whose successor has not come; else do nothing.

    Only who owns the run folder may do so.
    """
    aside = run_folder(out) / _ASIDE
    if os.path.lexists(out) or not (aside / out.name).exists():
        return
    for path in _beside(out):  # the successor's
        path.unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name == out.name):
        path.replace(out.with_name(path.name))
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
            remove_run_folder(folder)
