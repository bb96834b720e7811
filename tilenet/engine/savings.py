"""What an area spares, before any pixel of the image is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilenet.engine.plan import Plan
from tilenet.engine.reading import read_window
from tilenet.geometry import Window

__all__ = ["Savings", "savings_of"]

_MOST_BLOCKS = 16_384  # looked at; of more, every so many-th stands for the others


@dataclass(frozen=True, slots=True)
class Savings:
    """What is left to do inside an area; nodata may spare more.

    Parameters
    ----------
    kept_share : float
        Pixels inside, of all.
    tiles, tiles_to_forward : int
        All tiles, and those that hold a pixel inside.
    blocks, blocks_to_read : int
        All blocks, and those of which any tile or pixel is inside.
    """

    kept_share: float
    tiles: int
    tiles_to_forward: int
    blocks: int
    blocks_to_read: int


def savings_of(plan: Plan) -> Savings:
    """Return what a plan's area spares: nothing if it has none."""
    lattice, area = plan.lattice, plan.area
    if area is None:
        return Savings(1.0, lattice.tiles, lattice.tiles, lattice.blocks, lattice.blocks)
    step = -(-lattice.blocks // _MOST_BLOCKS)
    whole = Window(0, 0, lattice.rows.size, lattice.cols.size)
    kept = pixels = tiles = forwarded = read = 0
    looked = range(0, lattice.blocks, step)
    for block in looked:
        window = read_window(lattice, block, plan.model.card.margin).intersection(whole)
        core = lattice.core(block)
        inside = area.kept(window)
        here = [
            lattice.tile_window(row, col)
            for row in lattice.own_tiles(block)[0] for col in lattice.own_tiles(block)[1]
        ]  # fmt: skip
        pixels += core.pixels
        tiles += len(here)
        if not inside.any():
            continue
        read += 1
        kept += int(np.count_nonzero(inside[core.slices(window.row, window.col)]))
        forwarded += sum(
            bool(inside[one.slices(window.row, window.col)].any()) for one in here
        )  # fmt: skip
    left = round(lattice.tiles * forwarded / tiles) if tiles else 0
    return Savings(
        kept / pixels,
        lattice.tiles,
        left if plan.skip_nodata else lattice.tiles,
        lattice.blocks,
        round(lattice.blocks * read / len(looked)),
    )
