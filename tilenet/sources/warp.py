"""Bringing a raster to any grid on a map, in phase.

A pixel's value depends on where it lies in the grid, never on the window it is read in, to the last
bit. So GDAL's warper is not used: it approximates by whatever region it is asked for.

Between two of the grid's pixels lie at most about one and a half of those that are read (coarser
grids are made from a level, or from one resampled in phase), so four neighbours make a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError
from tilenet.geometry import Affine6, Georeference, Window
from tilenet.sources.grid import Grid
from tilenet.sources.places import crs_of, moved, unplaced
from tilenet.sources.resample import rounded
from tilenet.sources.view import Settled, reduced

__all__ = ["Warp", "fit", "needed", "sources", "touched", "warp"]

_ROWS = 64  # of the result at a time: what is in work stays in the processor's cache
_CELL = 16
"""Grid pixels between the places that PROJ is asked about; those between are interpolated."""
_OFF = 0.05  # of a source pixel: where interpolation errs by more, PROJ is asked about every pixel
_STEPS = 1024  # places are rounded to so many per pixel: what machines differ in is lost
_LATTICE = 65
_HALF = 0.5
_MOST_ENLARGED, _SAME = 16.0, 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Warp:
    """How a grid follows from a raster.

    Parameters
    ----------
    grid : Grid
        What is made.
    crs_wkt : str
        The raster's CRS.
    transform : tuple of 6 float
        Of the level, or of the grid that it is resampled to.
    size : tuple of int
        Its height and width.
    reach : Window
        The part of the grid beyond which there is nothing of the raster.
    """

    grid: Grid
    crs_wkt: str
    transform: Affine6
    size: tuple[int, int]
    reach: Window


def _between(start: float, stop: float, count: int = _LATTICE) -> Floats:
    return np.linspace(start, stop, count)


def _reach(grid: Grid, place: tuple[str, Affine6], size: tuple[int, int], path: str) -> Window:
    """Return the part of the grid that a raster of `size` lies in, or a little more."""
    there, whole = (grid.crs_wkt, grid.transform), Window(0, 0, grid.height, grid.width)
    middle = (np.array([size[0] / 2]), np.array([size[1] / 2]))
    if not np.isfinite(moved(middle, place, there, (grid.height, grid.width))).all():
        raise InputError(
            "no way leads from its CRS to the grid's", path, "give a --like of the same body"
        )
    lattice = np.meshgrid(_between(0, size[0]), _between(0, size[1]), indexing="ij")
    rows, cols = moved((lattice[0], lattice[1]), place, there, (grid.height, grid.width))
    if not (np.isfinite(rows) & np.isfinite(cols)).all():
        return whole
    # What lies between two places of the lattice may reach as far again.
    spare_row, spare_col = (
        2 + max(float(np.abs(np.diff(one, axis=axis)).max()) for axis in (0, 1))
        for one in (rows, cols)
    )
    low = np.clip([rows.min() - spare_row, cols.min() - spare_col], 0, None)
    high = (rows.max() + spare_row, cols.max() + spare_col)
    return Window.from_bounds(
        int(min(low[0], grid.height)), int(min(low[1], grid.width)),
        int(min(max(high[0], 0), grid.height)), int(min(max(high[1], 0), grid.width)),
    )  # fmt: skip


def _steps(
    grid: Grid, place: tuple[str, Affine6], size: tuple[int, int], reach: Window
) -> tuple[float, float]:
    """Return how many of the raster's pixels (y, x) lie between two of the grid's."""
    rows, cols = np.meshgrid(
        _between(reach.row, reach.row_stop), _between(reach.col, reach.col_stop), indexing="ij"
    )
    own = (grid.crs_wkt, grid.transform)
    at, below, beside = (
        np.stack(moved((rows + down, cols + right), own, place, size))
        for down, right in ((0, 0), (1, 0), (0, 1))
    )
    step = np.hypot(below - at, beside - at).reshape(2, -1)
    inside = ((at >= 0) & (at <= np.array(size)[:, None, None])).all(axis=0).ravel()
    step = step[:, inside & np.isfinite(step).all(axis=0)] if inside.any() else step
    y, x = np.nanmedian(step, axis=1)
    return float(y), float(x)


def fit(
    grid: Grid, levels: tuple[tuple[int, int], ...], place: Georeference, path: str
) -> tuple[Settled, Warp]:
    """Choose the level that a grid is made from, and how.

    Parameters
    ----------
    grid : Grid
        What is wanted.
    levels : tuple of (int, int)
        Height and width of every level of the raster.
    place : Georeference
        Of its full resolution.
    path : str
        For errors.

    Returns
    -------
    base : Settled
        The level, and what it is resampled by first, if the grid is coarser.
    warp : Warp
        From there to the grid.

    Raises
    ------
    InputError
        The raster has no place on a map, or none that the grid covers.
    """
    if place.crs_wkt is None or place.transform is None:
        what = "it has no place in the grid of --like"
        raise unplaced(place, path, what, "leave --like out")
    own = (place.crs_wkt, place.transform)
    reach = _reach(grid, own, levels[0], path)
    if not reach.pixels:
        raise InputError("lies outside the grid of --like", path, "give the raster it belongs to")
    steps = _steps(grid, own, levels[0], reach)
    if not min(steps) >= 1 / _MOST_ENLARGED:
        raise InputError(
            f"would be enlarged {1 / min(steps):.3g} times", path,
            f"at most {_MOST_ENLARGED:g} times: give a coarser --like",
        )  # fmt: skip
    base = reduced((max(1.0, steps[0]), max(1.0, steps[1])), levels, place, _SAME, path)
    transform = base.georeference.transform
    assert transform is not None, "it has one at full resolution"
    return base, Warp(grid, place.crs_wkt, transform, base.size, reach)


def sources(window: Window, warp: Warp) -> tuple[Floats, Floats]:
    """Return where each pixel's centre of a window lies in what is read.

    Returns
    -------
    rows, cols : ndarray, shape (height, width)
        From the outer corner; NaN where nothing is known.
    """
    if crs_of(warp.grid.crs_wkt) == crs_of(warp.crs_wkt):
        centres = np.mgrid[window.slices()] + _HALF
        found = _exactly(centres[0], centres[1], warp)
    else:
        found = _interpolated(window, warp)
    rows, cols = (np.rint(one * _STEPS) / _STEPS for one in found)
    return rows, cols


def _exactly(rows: Floats, cols: Floats, warp: Warp) -> tuple[Floats, Floats]:
    here = (warp.grid.crs_wkt, warp.grid.transform)
    return moved((rows, cols), here, (warp.crs_wkt, warp.transform), warp.size)


def _interpolated(window: Window, warp: Warp) -> tuple[Floats, Floats]:
    top, left = window.row // _CELL, window.col // _CELL
    down, right = -(-window.row_stop // _CELL) - top, -(-window.col_stop // _CELL) - left
    corner_rows, corner_cols = np.mgrid[top : top + down + 1, left : left + right + 1] * _CELL
    nodes = np.stack(_exactly(corner_rows * 1.0, corner_cols * 1.0, warp))
    half = _CELL / 2
    middles = np.stack(_exactly(corner_rows[:-1, :-1] + half, corner_cols[:-1, :-1] + half, warp))
    ours = (nodes[:, :-1, :-1] + nodes[:, :-1, 1:] + nodes[:, 1:, :-1] + nodes[:, 1:, 1:]) / 4
    good = (np.abs(ours - middles) <= _OFF).all(axis=0)  # NaN is not
    share = (np.arange(_CELL) + _HALF) / _CELL
    along = nodes[:, :, :-1, None] * (1 - share) + nodes[:, :, 1:, None] * share
    along = along.reshape(2, down + 1, right * _CELL)
    both = along[:, :-1, None] * (1 - share)[:, None] + along[:, 1:, None] * share[:, None]
    both = both.reshape(2, down * _CELL, right * _CELL)
    for row, col in np.argwhere(~good):
        part = (slice(row * _CELL, (row + 1) * _CELL), slice(col * _CELL, (col + 1) * _CELL))
        places = np.mgrid[part].astype(float) + _HALF
        both[(slice(None), *part)] = _exactly(
            places[0] + top * _CELL, places[1] + left * _CELL, warp
        )
    rows, cols = both[(slice(None), *window.slices(top * _CELL, left * _CELL))]
    return rows, cols


def _inside(rows: Floats, cols: Floats, size: tuple[int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (rows >= 0) & (rows < size[0]) & (cols >= 0) & (cols < size[1])
    return found


def needed(rows: Floats, cols: Floats, size: tuple[int, int]) -> Window:
    """Return the pixels that those at `sources` are made from; empty if none."""
    inside = _inside(rows, cols, size)
    if not inside.any():
        return Window(0, 0, 0, 0)
    (top, bottom), (left, right) = (
        (int(np.floor(one[inside].min() - _HALF)), int(np.floor(one[inside].max() - _HALF)) + 2)
        for one in (rows, cols)
    )
    whole = Window(0, 0, *size)
    return Window.from_bounds(top, left, bottom, right).intersection(whole)


def touched(hurt: Window, window: Window, places: tuple[Floats, Floats]) -> Window:
    """Return a window around the pixels of `window` that are made, in part, from `hurt`."""
    rows, cols = places
    near = (
        (rows > hurt.row - _HALF) & (rows < hurt.row_stop + _HALF)
        & (cols > hurt.col - _HALF) & (cols < hurt.col_stop + _HALF)
    )  # fmt: skip
    down, right = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    if not len(down):
        return Window(window.row, window.col, 0, 0)
    return Window.from_bounds(
        window.row + int(down[0]), window.col + int(right[0]),
        window.row + int(down[-1]) + 1, window.col + int(right[-1]) + 1,
    )  # fmt: skip


def warp(
    pixels: NDArray[Any],
    valid: NDArray[np.bool_] | None,
    box: Window,
    places: tuple[Floats, Floats],
    size: tuple[int, int],
    blank: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return pixels of the grid: bilinear, from the valid part of four neighbours.

    A pixel is valid if its centre lies in the raster and at least half of what makes it is valid.

    Parameters
    ----------
    pixels : ndarray, shape (C, h, w)
        What is read, at `box`.
    valid : ndarray, shape (h, w), bool, or None
        Which of them count; None = all.
    box : Window
        From `needed`.
    places : tuple of ndarray, shape (height, width)
        From `sources`.
    size : tuple of int
        Of all that could be read.
    blank : ndarray, shape (C, 1, 1)
        What stands at invalid pixels.

    Returns
    -------
    pixels : ndarray, shape (C, height, width)
        In the dtype of the input, rounded.
    valid : ndarray, shape (height, width), bool
    """
    kept = _inside(*places, size)
    out = np.broadcast_to(blank, (len(pixels), *kept.shape)).copy()
    flat = pixels.reshape(len(pixels), -1)
    good = None if valid is None else valid.ravel().astype(np.float32)
    for top in range(0, len(kept), _ROWS):
        part = slice(top, top + _ROWS)
        inside = kept[part]
        if inside.any():
            rows, cols = (one[part][inside] - _HALF for one in places)
            made, share = _bilinear(flat, good, rows, cols, box, size)
            inside[inside] = share >= _HALF  # a view: it is kept that changes
            out[:, part][:, inside] = rounded(made[:, share >= _HALF], out.dtype)
    return out, kept


def _bilinear(
    pixels: NDArray[Any],
    good: NDArray[np.float32] | None,
    rows: Floats,
    cols: Floats,
    box: Window,
    size: tuple[int, int],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return values, (C, n), at places that count from the first pixel's centre, and their share.

    `pixels` are those of `box` in a row, (C, h·w); `good` is 1 for those that count.
    """
    above, before = np.floor(rows), np.floor(cols)
    down, right = (rows - above).astype(np.float32), (cols - before).astype(np.float32)
    total = np.zeros((len(pixels), len(rows)), np.float32)
    share = np.zeros(len(rows), np.float32)
    for row, weight_row in ((above, 1 - down), (above + 1, down)):
        # Beyond the border there is nothing: its last pixel stands there.
        line = (np.clip(row, 0, size[0] - 1) - box.row) * box.width - box.col
        for col, weight_col in ((before, 1 - right), (before + 1, right)):
            index = (line + np.clip(col, 0, size[1] - 1)).astype(np.intp)
            weight = weight_row * weight_col
            if good is not None:
                weight *= good.take(index)
            share += weight
            for band, values in enumerate(pixels):
                total[band] += weight * values.take(index)
    np.divide(total, share, out=total, where=share > 0)
    return total, share
