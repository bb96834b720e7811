"""Whether two pixel grids of one size lie in one place on the map."""

from __future__ import annotations

import numpy as np
from rasterio import Env
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError

from tilenet.geometry import Affine6, Georeference
from tilenet.sources.places import moved

__all__ = ["TOLERANCE", "distance"]

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
    try:
        with np.errstate(all="ignore"), Env():  # strangers' numbers; and GDAL would complain itself
            found = moved((rows, cols), here, there, (height, width))
    except (CPLE_BaseError, CRSError):  # a CRS that PROJ does not know
        return np.inf
    apart = np.hypot(found[0] - rows, found[1] - cols).max()
    return float(apart) if np.isfinite(apart) else np.inf


def _place(grid: Georeference) -> tuple[str, Affine6] | None:
    if grid.crs_wkt is None or grid.transform is None:
        return None
    return grid.crs_wkt, grid.transform
