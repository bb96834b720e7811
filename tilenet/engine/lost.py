"""Blocks under which every worker has died: they are noted in the run folder, and get no answer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tilenet.classes import NODATA
from tilenet.engine.block import Forwarded
from tilenet.engine.decided import record_of, write_block
from tilenet.engine.journal import KILLS, BlockRecord, Invalid
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import STORE, STRIPS
from tilenet.sinks import MaskStore

__all__ = ["is_lost", "lose_block", "mark_lost"]


def mark_lost(folder: Path, invalid: Iterable[Invalid], own: range) -> None:
    """Note in a run folder the blocks that can never be forwarded, so that nobody waits for them.

    Their own pixels have no answer, nor have those of their neighbours that their tiles reach.

    Parameters
    ----------
    folder : Path
        The run folder.
    invalid : iterable of Invalid
        What the journals list.
    own : range
        Blocks that nobody else works on. A mark of one that no journal lists is of a run that ended
        before it was noted: the block is made.
    """
    lost = {one.block for one in invalid if one.why == KILLS}
    for path in (folder / STRIPS).glob("*.lost"):
        if int(path.stem) in own and int(path.stem) not in lost:
            path.unlink()
    for block in lost:
        _mark(folder, block)


def _mark(folder: Path, block: int) -> None:
    (folder / STRIPS / f"{block}.lost").touch()


def is_lost(folder: Path, block: int) -> bool:
    """Return whether a block can never be forwarded."""
    return (folder / STRIPS / f"{block}.lost").exists()


def lose_block(folder: Path, plan: Plan, block: int) -> BlockRecord:
    """Store a block that nobody can make as pixels without an answer; return its record."""
    core, spec = plan.lattice.core(block), plan.spec
    mask = np.full((core.height, core.width), NODATA, np.uint8)
    shape = (len(spec.channels), core.height, core.width)
    probabilities = np.zeros(shape, np.uint8) if spec.channels else None
    store = MaskStore(folder / STORE, spec)
    stored = write_block(store, plan.lattice, block, mask, probabilities)
    rows, cols = plan.lattice.own_tiles(block)
    nothing = np.zeros((0, 0, 0), np.int32)
    done = Forwarded(
        mask, probabilities, nothing, nothing, {}, 0, len(rows) * len(cols), 0, ((core, KILLS),)
    )
    record = record_of(block, done, stored, len(spec.classes))
    _mark(folder, block)
    return record
