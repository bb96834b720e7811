"""How large a pixel is on the ground or on the glass.

Inside a well chosen map projection a pixel's area is the same everywhere, and that of its affine.
Web Mercator's metres and degrees are neither: there the ellipsoid is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tilenet.geometry import Affine6, Georeference

__all__ = ["AreaUnit", "PixelArea", "metres_per_unit", "pixel_area", "sides_on_ellipsoid"]

AreaUnit = Literal["mm2", "ha"]

_TOLERANCE = 0.01
_SQUARE_METRES_PER_HECTARE = 1e4
_SQUARE_MICROMETRES_PER_SQUARE_MILLIMETRE = 1e6
_WGS84_AXIS, _WGS84_ECCENTRICITY_SQUARED = 6378137.0, 0.0066943799901413165
_STEP = 64  # a derivative is taken over this part of a side: small pixels would drown in rounding


@dataclass(frozen=True, slots=True)
class PixelArea:
    """The area of one pixel.

    Parameters
    ----------
    value : float
        In `unit`.
    unit : {"mm2", "ha"}
        Square millimetres of a slide, hectares of a map.
    """

    value: float
    unit: AreaUnit


def pixel_area(place: Georeference, height: int, width: int) -> PixelArea | None:
    """Return the area of a grid's pixel; None where the grid does not tell, or it varies.

    A map's is |det| of its affine, or, if that is more than 1 % off the ellipsoid's anywhere in the
    raster, the mean on the ellipsoid; none if that varies by more than 1 % to either side.

    Parameters
    ----------
    place : Georeference
        The grid.
    height, width : int
        Its pixels.
    """
    if not place.is_georeferenced:
        if place.mpp is None:
            return None
        square = place.mpp[0] * place.mpp[1]
        return PixelArea(square / _SQUARE_MICROMETRES_PER_SQUARE_MILLIMETRE, "mm2")
    if place.crs_wkt is None or place.transform is None:
        return None
    metres = metres_per_unit(place.crs_wkt)
    a, b, _, d, e, _ = place.transform
    flat = None if metres is None else abs(a * e - b * d) * metres**2
    true = _areas_on_ellipsoid(place.crs_wkt, place.transform, (height, width))
    area = flat
    if true is not None and (flat is None or not _is_close(true, flat)):
        mean = float(true.mean())
        area = mean if _is_close(true, mean) else None
    return None if area is None else PixelArea(area / _SQUARE_METRES_PER_HECTARE, "ha")


@lru_cache(maxsize=64)  # the rasters of a folder share a few
def metres_per_unit(crs_wkt: str) -> float | None:
    """Return the metres in a unit of a CRS; None if its units are degrees, or unknown."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        crs = CRS.from_wkt(crs_wkt)
        return None if crs.is_geographic else float(crs.linear_units_factor[1])
    except CRSError:
        return None


def _is_close(areas: NDArray[np.float64], area: float) -> bool:
    return bool((np.abs(areas - area) <= _TOLERANCE * area).all())


def _areas_on_ellipsoid(
    crs_wkt: str, transform: Affine6, shape: tuple[int, int]
) -> NDArray[np.float64] | None:
    """Return m² of a pixel at 3 × 3 places of the raster; None where PROJ does not tell."""
    down, right = _pixel_vectors(crs_wkt, transform, shape)
    areas = np.abs(right[0] * down[1] - down[0] * right[1])
    return areas if np.isfinite(areas).all() and (areas > 0).all() else None


def sides_on_ellipsoid(
    crs_wkt: str, transform: Affine6, shape: tuple[int, int]
) -> tuple[float, float] | None:
    """Return the height and width in m of the pixel in the middle; None if PROJ does not tell.

    Parameters
    ----------
    crs_wkt : str
        CRS of the grid.
    transform : tuple of 6 float
        Its affine.
    shape : (int, int)
        Its height and width in pixels.
    """
    down, right = (float(np.hypot(*v)[4]) for v in _pixel_vectors(crs_wkt, transform, shape))
    return (down, right) if math.isfinite(down + right) else None


def _pixel_vectors(
    crs_wkt: str, transform: Affine6, shape: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps of one row and of one column at 3 × 3 places, (2, 9): m east, m north."""
    rows, cols = (np.array([0.0, 0.5, 1.0]) * n for n in shape)
    row, col = (grid.ravel() for grid in np.meshgrid(rows, cols, indexing="ij"))
    height, width = (max(1.0, n / _STEP) for n in shape)
    steps = []
    for rise, run in ((height, 0.0), (0.0, width)):
        before, after = (
            _lonlat(crs_wkt, transform, row + s * rise / 2, col + s * run / 2) for s in (-1, 1)
        )
        lon, lat = after - before
        lon = (lon + math.pi) % (2 * math.pi) - math.pi  # it jumps by a turn at the date line
        middle = (after[1] + before[1]) / 2
        bend = 1 - _WGS84_ECCENTRICITY_SQUARED * np.sin(middle) ** 2
        # The radii of the prime vertical and of the meridian.
        east = lon * np.cos(middle) * _WGS84_AXIS / np.sqrt(bend)
        north = lat * _WGS84_AXIS * (1 - _WGS84_ECCENTRICITY_SQUARED) / bend**1.5
        steps.append(np.array([east, north]) / (rise + run))
    return steps[0], steps[1]


def _lonlat(
    crs_wkt: str, transform: Affine6, row: NDArray[np.float64], col: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return longitudes and latitudes of pixel corners, (2, n) radians; NaN where there is none."""
    from rasterio import Env
    from rasterio._err import CPLE_BaseError
    from rasterio.crs import CRS
    from rasterio.errors import RasterioError
    from rasterio.warp import transform as project

    a, b, c, d, e, f = transform
    xs, ys = a * col + b * row + c, d * col + e * row + f
    try:
        with Env():  # otherwise GDAL complains on stderr
            lon, lat = project(CRS.from_wkt(crs_wkt), CRS.from_epsg(4326), xs, ys)
    except (CPLE_BaseError, RasterioError, ValueError):  # a CRS of Mars, say
        return np.full((2, len(row)), np.nan)
    return np.radians(np.array([lon, lat], np.float64))
