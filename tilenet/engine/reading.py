"""Which pixels a block reads, and how many that makes in all. Pure arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.geometry import Window
from tilenet.lattice import Axis, Lattice

__all__ = ["amplification", "read_window"]

_MOST_BLOCKS = 1 << 18  # of an axis that are counted one by one
_TAIL = 64


def _read_range(axis: Axis, block: int) -> tuple[int, int]:
    """Return the pixels of a core and of the tiles that lie in it, padding included."""
    start, stop = axis.core_range(block)
    tiles = axis.tiles(block)
    return start, max(stop, axis.origin(tiles[-1]) + axis.side) if tiles else stop


def read_window(lattice: Lattice, block: int, margin: tuple[int, int] = (0, 0)) -> Window:
    """Return the pixels a block needs: its core, its own tiles, padding and margin included.

    Parameters
    ----------
    lattice : Lattice
        Tiles and blocks.
    block : int
        Which block.
    margin : tuple of int
        Pixels that the network sees before and after a tile, on each axis.
    """
    core = lattice.core(block)
    row, col = lattice.position(block)
    row_stop, col_stop = core.row_stop, core.col_stop
    if all(lattice.own_tiles(block)):
        row_stop = _read_range(lattice.rows, row)[1]
        col_stop = _read_range(lattice.cols, col)[1]
    before, after = margin
    return Window.from_bounds(
        core.row - before, core.col - before, row_stop + after, col_stop + after
    )


def _first_tiles(axis: Axis, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Do what `Axis.first_tile` does for many positions at once."""
    tiles = -(-positions // axis.stride)
    last = np.where(axis.padded - axis.side >= positions, axis.count - 1, axis.count)
    return np.where(tiles < axis.count - 1, tiles, last)


def _decoded_by(axis: Axis, blocks: NDArray[np.int64], native: int, margin: tuple[int, int]) -> Any:
    """Return how many pixels each of some blocks of an axis decodes."""
    starts = blocks * axis.core
    stops = np.minimum(starts + axis.core, axis.size)
    first, behind = _first_tiles(axis, starts), _first_tiles(axis, stops)
    reach = np.minimum((behind - 1) * axis.stride, axis.padded - axis.side) + axis.side
    stops = np.where(behind > first, np.maximum(stops, reach), stops)
    lowest = np.maximum(0, starts - margin[0]) // native * native
    highest = -(-np.minimum(axis.size, stops + margin[1]) // native) * native
    return np.minimum(highest, axis.size) - lowest


@lru_cache(maxsize=64)  # small images of one size have one axis
def _decoded(axis: Axis, native: int, margin: tuple[int, int]) -> tuple[int, int]:
    """Return the pixels that all blocks of an axis decode, and the most that one does.

    Of very many blocks the first stand for the rest, but for the last, which the border cuts.
    """
    looked = min(axis.blocks, _MOST_BLOCKS)
    head = _decoded_by(axis, np.arange(looked), native, margin)
    total = int(head.sum())
    if looked < axis.blocks:
        tail = np.arange(axis.blocks - min(_TAIL, axis.blocks - looked), axis.blocks)
        between = axis.blocks - looked - len(tail)
        total += round(total * between / looked)
        total += int(_decoded_by(axis, tail, native, margin).sum())
    return total, int(head.max())


def amplification(
    lattice: Lattice,
    native: tuple[int, int],
    margin: tuple[int, int],
    pixel_bytes: int,
    cache_bytes: int,
) -> float:
    """Return how many pixels are decoded per pixel of the raster.

    Blocks are read row by row. What neighbours in a row share is decoded once if the window of one
    block fits into the cache; what rows of blocks share is decoded by both.

    Parameters
    ----------
    lattice : Lattice
        Tiles and blocks.
    native : tuple of int
        Height and width of the file's own tiles or strips, which are decoded whole.
    margin : tuple of int
        As for `read_window`.
    pixel_bytes : int
        Of all bands that are decoded together.
    cache_bytes : int
        Of decoded pixels.
    """
    rows, height = _decoded(lattice.rows, native[0], margin)
    cols, width = _decoded(lattice.cols, native[1], margin)
    if height * width * pixel_bytes <= cache_bytes:
        cols = lattice.cols.size
    return rows * cols / (lattice.rows.size * lattice.cols.size)
