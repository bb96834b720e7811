"""Read a large extent in pieces: windows that stay small, in the order files are stored in."""

from __future__ import annotations

from collections.abc import Iterator

from tilenet.geometry import Window

__all__ = ["pieces"]

_WIDTH, _PIXELS = 8192, 1 << 21


def pieces(extent: Window) -> Iterator[Window]:
    """Yield windows of at most two million pixels that cover `extent`, row by row.

    They are as wide as the extent where that leaves them as tall as a file's usual tile (256
    rows), so that what is stored in rows, or in tiles, is decoded about once.
    """
    width = max(1, min(extent.width, _WIDTH))
    height = _PIXELS // width
    for row in range(extent.row, extent.row_stop, height):
        for col in range(extent.col, extent.col_stop, width):
            yield Window(
                row, col, min(height, extent.row_stop - row), min(width, extent.col_stop - col)
            )
