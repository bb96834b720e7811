"""Resampling to another pixel grid, in phase.

A pixel's value depends on where it lies in the raster, never on the window it is read in, to the
last bit.

Where it reduces, the filter is the triangle whose width follows the step (Pillow's and GDAL's
"bilinear"): an average without aliasing. Where it enlarges, it is the cubic convolution of Keys
(1981, a = −0.5; Pillow's "bicubic"), which leaves edges sharper than a bilinear one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.geometry import Window
from tilenet.sources.view import Resampling

__all__ = ["resample", "rounded", "source_window"]

_ROWS = 64  # of the result at a time: what is in work stays in the processor's cache
_SLIGHT = 1e-4  # weights that sum to one within this need no correction
_HALF = 0.5


def _reach(step: float) -> float:
    return step if step >= 1 else 2.0


def _kernel(distance: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Return the weight of source pixels at a distance in pixels."""
    if step >= 1:
        return np.maximum(0.0, 1 - distance / step)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _span(start: int, stop: int, step: float, size: int) -> tuple[int, int]:
    reach = _reach(step)
    first = math.floor((start + 0.5) * step - reach)
    last = math.ceil((stop - 0.5) * step + reach)
    low = min(max(first, 0), size - 1)
    return low, max(min(last, size), low + 1)


def source_window(window: Window, grid: Resampling) -> Window:
    """Return the pixels of the level that a window of the grid is made from."""
    top, bottom = _span(window.row, window.row_stop, grid.step[0], grid.size[0])
    left, right = _span(window.col, window.col_stop, grid.step[1], grid.size[1])
    return Window.from_bounds(top, left, bottom, right)


def target_window(window: Window, grid: Resampling, size: tuple[int, int]) -> Window:
    """Return the pixels of the grid that are made, in part, from a window of the level."""
    (row, row_stop), (col, col_stop) = (
        (
            max(0, math.floor((start - _reach(step)) / step - 0.5)),
            min(most, math.ceil((stop + _reach(step)) / step + 0.5)),
        )
        for start, stop, step, most in (
            (window.row, window.row_stop, grid.step[0], size[0]),
            (window.col, window.col_stop, grid.step[1], size[1]),
        )
    )
    return Window.from_bounds(row, col, row_stop, col_stop)


def _weights(start: int, stop: int, step: float, size: int, window: tuple[int, int]) -> Any:
    """Return an axis' weights as a sparse matrix: a row for each pixel, its sources in order.

    Columns are the source pixels of `window`. Beyond the raster there is nothing: the rest weighs
    more.
    """
    from scipy.sparse import csr_array

    reach = _reach(step)
    centre = (np.arange(start, stop) + 0.5) * step
    # All within the raster, however far the filter reaches.
    taken = min(math.ceil(2 * reach) + 2, size)
    first = np.clip(np.floor(centre - reach), 0, size - taken).astype(np.intp)
    index = first[:, None] + np.arange(taken)
    weights = _kernel(np.abs(index + 0.5 - centre[:, None]), step)
    # A grid that ends beyond the raster has pixels without any: the last one stands for them.
    empty = weights.sum(axis=1) == 0
    nearest = np.abs(index - np.clip(centre[:, None] - 0.5, 0, size - 1)).argmin(axis=1)
    weights[empty, nearest[empty]] = 1
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights != 0
    ends = np.concatenate([[0], used.sum(axis=1).cumsum()])
    values, columns = weights[used].astype(np.float32), index[used] - window[0]
    return csr_array((values, columns, ends), shape=(stop - start, window[1] - window[0]))


def _both(source: NDArray[np.float32], rows: Any, cols: Any) -> NDArray[np.float32]:
    """Return a band, (h, w), resampled along both axes."""
    # A sparse product adds term by term in the order of the matrix; a dense one may add in another
    # order for another window.
    along = rows @ source
    made: NDArray[np.float32] = (cols @ np.ascontiguousarray(along.T)).T
    return made


def resample(
    pixels: NDArray[Any],
    valid: NDArray[np.bool_] | None,
    box: Window,
    window: Window,
    grid: Resampling,
    blank: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return a window of the grid.

    A pixel is valid if at least half of what makes it is, and is made from the valid part alone.

    Parameters
    ----------
    pixels : ndarray, shape (C, h, w)
        Of the level, at `box`.
    valid : ndarray, shape (h, w), bool, or None
        Which of them count; None = all.
    box : Window
        `source_window(window, grid)`.
    window : Window
        Of the grid.
    grid : Resampling
        The grid.
    blank : ndarray, shape (C, 1, 1)
        What stands at invalid pixels.

    Returns
    -------
    pixels : ndarray, shape (C, height, width)
        In the dtype of the input, rounded.
    valid : ndarray, shape (height, width), bool, or None
    """
    rows = _weights(
        window.row, window.row_stop, grid.step[0], grid.size[0], (box.row, box.row_stop)
    )
    cols = _weights(
        window.col, window.col_stop, grid.step[1], grid.size[1], (box.col, box.col_stop)
    )
    out = np.empty((len(pixels), window.height, window.width), pixels.dtype)
    kept = None if valid is None else np.empty((window.height, window.width), bool)
    for top in range(0, window.height, _ROWS):
        part = slice(top, min(top + _ROWS, window.height))
        used = rows[part]
        low, high = int(used.indices.min()), int(used.indices.max()) + 1
        used = used[:, low:high]
        whole = None if valid is None else valid[low:high]
        corrected, enough = _shares(whole, used, cols)
        if kept is not None:
            kept[part] = enough
        for band, values in enumerate(pixels):
            source = values[low:high].astype(np.float32)
            if whole is not None:
                source *= whole
            out[band, part] = rounded(_both(source, used, cols) / corrected, out.dtype)
    if kept is None or kept.all():
        return out, None
    return np.where(kept, out, blank), kept


def _shares(valid: NDArray[np.bool_] | None, rows: Any, cols: Any) -> tuple[Any, Any]:
    """Return what sums must be divided by, and where enough is valid to be a pixel."""
    if valid is None:
        return np.float32(1), True
    share = _both(valid.astype(np.float32), rows, cols)
    enough = share >= _HALF
    # Weights of whole surroundings sum to one but for rounding: these pixels must not depend on
    # whether anything in the window is invalid.
    return np.where(enough & (np.abs(share - 1) > _SLIGHT), share, np.float32(1)), enough


def rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Return values, changed in place, as pixels of a dtype can hold them."""
    if dtype.kind == "f":
        return values
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values, out=values), limits.min, limits.max, out=values)
