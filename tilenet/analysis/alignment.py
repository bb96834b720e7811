"""Whether two pixel grids of one size lie in one place on the map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rasterio import Env
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform as project

from tilenet.geometry import Affine6, Georeference

__all__ = ["TOLERANCE", "distance"]

Floats = NDArray[np.float64]

TOLERANCE = 1e-3
"""Pixels by which corners may be apart, for numbers that were rounded on their way."""


def distance(ours: Georeference, theirs: Georeference, height: int, width: int) -> float | None:
    """Return how far apart the corners of two grids lie at most.

    What counts is the place, not how a CRS is called: each has many spellings.

    Parameters
    ----------
    ours, theirs : Georeference
        The grids.
    height, width : int
        Pixels of each.

    Returns
    -------
    float or None
        In pixels of `theirs`; infinite where there is no telling; None if one of them has no CRS or
        no affine, and may lie anywhere.
    """
    here, there = _place(ours), _place(theirs)
    if here is None or there is None:
        return None
    if here == there:
        return 0.0
    rows, cols = np.array([0.0, 0.0, height, height]), np.array([0.0, width, 0.0, width])
    with np.errstate(all="ignore"):  # strangers' numbers
        x, y = _seen(_points(here[1], rows, cols), here[0], there[0])
        a, b, c, d, e, f = there[1]
        x, y, area = x - c, y - f, np.float64(a * e - b * d)
        apart = np.hypot((a * y - d * x) / area - rows, (e * x - b * y) / area - cols).max()
    return float(apart) if np.isfinite(apart) else np.inf


def _place(grid: Georeference) -> tuple[str, Affine6] | None:
    if grid.crs_wkt is None or grid.transform is None:
        return None
    return grid.crs_wkt, grid.transform


def _points(transform: Affine6, rows: Floats, cols: Floats) -> tuple[Floats, Floats]:
    a, b, c, d, e, f = transform
    return a * cols + b * rows + c, d * cols + e * rows + f


def _seen(points: tuple[Floats, Floats], here: str, there: str) -> tuple[Floats, Floats]:
    """Return points of one CRS in another; NaN where PROJ has no answer, or knows neither."""
    try:
        with Env():  # otherwise GDAL complains on stderr
            source, target = CRS.from_wkt(here), CRS.from_wkt(there)
            if source == target:
                return points
            x, y = project(source, target, *points)
    except (CPLE_BaseError, RasterioError, ValueError):
        x = y = np.full(len(points[0]), np.nan)
    return np.asarray(x), np.asarray(y)
