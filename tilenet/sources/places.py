"""Places, brought from one CRS or grid to another; longitudes that no date line cuts."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from tilenet.errors import InputError
from tilenet.geometry import Affine6, Georeference

__all__ = ["brought", "crs_of", "moved", "near", "turn_of", "unplaced"]

Floats = NDArray[np.float64]


@lru_cache(maxsize=64)
def crs_of(wkt: str) -> CRS:
    """Return a CRS from its text, or its code."""
    return CRS.from_string(wkt) if wkt.startswith("EPSG:") else CRS.from_wkt(wkt)


@lru_cache(maxsize=64)
def turn_of(wkt: str) -> float | None:
    """Return what leads once around, in the units of a CRS of longitudes; None for another."""
    crs = crs_of(wkt)
    return round(2 * math.pi / crs.units_factor[1], 6) if crs.is_geographic else None


def near(longitudes: Floats, middle: Floats | float, turn: float) -> Floats:
    """Return longitudes as those of the same places within half a turn of a middle.

    Those that are there already keep every bit.
    """
    off = longitudes - middle
    around = (off + turn / 2) % turn - turn / 2 + middle
    return np.where((off >= turn / 2) | (off < -turn / 2), around, longitudes)


def unplaced(place: Georeference, path: str, what: str, do: str) -> InputError:
    """Return the error of a raster that has no CRS and affine.

    Parameters
    ----------
    place : Georeference
        What it has.
    path : str
        The raster.
    what : str
        What it cannot have.
    do : str
        What else helps, where nothing in the file says where it lies.
    """
    if place.gcps:
        has, do = "ground control points only", "warp it first: gdalwarp IN OUT"
    elif place.rpcs:
        has, do = "rational polynomials (RPCs) only", "warp it first: gdalwarp IN OUT"
    else:
        has = "no georeference"
    return InputError(f"it has {has}, so {what}", path, do)


def brought(source: CRS, target: CRS, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return places, (n,), in another CRS; NaN where PROJ has no answer."""
    from rasterio.warp import transform

    if not len(x):
        return x, y
    try:
        found = transform(source, target, x, y)
    except Exception:  # one place without an answer, and GDAL gives none for all of them
        if len(x) == 1:
            return np.full(1, np.nan), np.full(1, np.nan)
        half = len(x) // 2
        parts = [brought(source, target, x[part], y[part])
                 for part in (slice(half), slice(half, None))]  # fmt: skip
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    xs, ys = np.asarray(found[0]), np.asarray(found[1])
    good = np.isfinite(xs) & np.isfinite(ys)
    return np.where(good, xs, np.nan), np.where(good, ys, np.nan)


def moved(
    places: tuple[Floats, Floats],
    here: tuple[str, Affine6],
    there: tuple[str, Affine6],
    size: tuple[int, int],
) -> tuple[Floats, Floats]:
    """Return places (rows, cols) of one grid as places of another one of `size`.

    Both count from the outer corner; NaN where there is no answer. Longitudes are those nearest to
    the other grid's middle, so that neither is cut at the date line.
    """
    rows, cols = places
    a, b, c, d, e, f = here[1]
    x, y = (a * cols + b * rows + c).ravel(), (d * cols + e * rows + f).ravel()
    source, target = crs_of(here[0]), crs_of(there[0])
    a, b, c, d, e, f = there[1]
    if source != target:
        x, y = brought(source, target, x, y)
    turn = turn_of(there[0])
    if turn is not None:
        x = near(x, a * size[1] / 2 + b * size[0] / 2 + c, turn)
    x, y, area = x - c, y - f, a * e - b * d
    found_rows, found_cols = (a * y - d * x) / area, (e * x - b * y) / area
    return found_rows.reshape(rows.shape), found_cols.reshape(rows.shape)
