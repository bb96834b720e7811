"""Which pixels a block reads, and how many that makes in all. Pure arithmetic."""

from __future__ import annotations

from tilenet.geometry import Window
from tilenet.lattice import Axis, Lattice

__all__ = ["amplification", "read_window"]


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


def _decoded(axis: Axis, native: int, margin: tuple[int, int]) -> tuple[int, int]:
    """Return the pixels that all blocks of an axis decode, and the most that one does."""
    total = most = 0
    for block in range(axis.blocks):
        start, stop = _read_range(axis, block)
        first = max(0, start - margin[0]) // native * native
        last = -(-min(axis.size, stop + margin[1]) // native) * native
        decoded = min(last, axis.size) - first
        total, most = total + decoded, max(most, decoded)
    return total, most


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
