"""Reading around native blocks that cannot be decoded. Pure arithmetic over somebody's `read`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import TilenetError
from tilenet.geometry import Window

__all__ = ["Pixels", "is_blameless", "is_out_of_memory", "salvage"]

Pixels = tuple[NDArray[Any], NDArray[np.bool_] | None]
"""(C, h, w), and which of them are valid, (h, w); None = all."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of GDAL's or numpy's is about memory, and not about the file."""
    cause = error.__cause__ or error
    return isinstance(error, MemoryError) or "OutOfMemory" in type(cause).__name__


def is_blameless(error: BaseException) -> bool:
    """Return whether the file is not to blame: a disk or a network that gives out may recover."""
    return isinstance(error, TilenetError) or is_out_of_memory(error)


def salvage(
    read: Callable[[Window], Pixels],
    box: Window,
    native: tuple[int, int],
    blank: NDArray[Any],
    damaged: list[Window],
) -> Pixels:
    """Read a window that failed as a whole by halves, down to the native blocks that fail.

    Parameters
    ----------
    read : callable
        Reads a window or raises.
    box : Window
        What failed.
    native : tuple of int
        Height and width of a native block.
    blank : ndarray, shape (C, 1, 1)
        What stands where nothing can be read.
    damaged : list of Window
        Takes the native blocks that fail, cut to `box`.

    Raises
    ------
    MemoryError
        And GDAL's kind of it, and what is wrong with the machine: that is not the file's fault.
    """
    halves = _halves(box, native)
    if not halves:
        damaged.append(box)
        whole = np.broadcast_to(blank, (len(blank), box.height, box.width))
        return whole, np.zeros((box.height, box.width), bool)
    parts = []
    for half in halves:
        try:
            parts.append(read(half))
        except Exception as error:
            if is_blameless(error):
                raise
            parts.append(salvage(read, half, native, blank, damaged))
    axis = 0 if halves[0].col == halves[1].col else 1
    valid = [np.ones(p.shape[1:], bool) if kept is None else kept for p, kept in parts]
    pixels = np.concatenate([p for p, _ in parts], axis=axis + 1)
    return pixels, np.concatenate(valid, axis=axis)


def _halves(box: Window, native: tuple[int, int]) -> tuple[Window, Window] | tuple[()]:
    """Split a window between native blocks, along the axis of more; () if it lies within one."""
    (top, bottom), (left, right) = (
        (start // side, -(-stop // side))
        for start, stop, side in (
            (box.row, box.row_stop, native[0]), (box.col, box.col_stop, native[1])
        )
    )  # fmt: skip
    if max(bottom - top, right - left) == 1:
        return ()
    if bottom - top >= right - left:
        cut = (top + bottom) // 2 * native[0]
        return (
            Window.from_bounds(box.row, box.col, cut, box.col_stop),
            Window.from_bounds(cut, box.col, box.row_stop, box.col_stop),
        )
    cut = (left + right) // 2 * native[1]
    return (
        Window.from_bounds(box.row, box.col, box.row_stop, cut),
        Window.from_bounds(box.row, cut, box.row_stop, box.col_stop),
    )
