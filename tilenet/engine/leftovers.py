"""What killed runs left in a run folder and nobody needs any more."""

from __future__ import annotations

import shutil
from pathlib import Path

from tilenet.engine import spill
from tilenet.engine.admission import MODELS, revoke
from tilenet.engine.runfolder import STRIPS
from tilenet.lattice import Lattice

__all__ = ["remove_leftovers"]


def remove_leftovers(folder: Path, lattice: Lattice, done: set[int]) -> None:
    """Remove it from the folder of a run that nobody else is at work on, and that has not begun.

    A fleet whose machines come and go would fill the disk with it. What a killed run still has
    under way somewhere finds its token gone, and writes no more.

    Parameters
    ----------
    folder : Path
        The run folder.
    lattice : Lattice
        Its blocks.
    done : set of int
        Those that the journal lists: they need no strips.
    """
    revoke(folder)
    for place in (folder, folder / STRIPS, folder / MODELS):
        for path in place.glob(".*.tmp"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for path in (folder / STRIPS).iterdir():
        takers = _takers(path, lattice)
        if takers and done.issuperset(takers):
            path.unlink(missing_ok=True)


def _takers(path: Path, lattice: Lattice) -> list[int]:
    """Return the blocks that need a file of strips; none of another file."""
    if not path.stem.isdecimal() or int(path.stem) >= lattice.blocks:
        return []
    return spill.needed_by(lattice, int(path.stem)).get(path.name, [])
