"""Where a grid lies, in words and numbers: CRS, bounds, resolution."""

from __future__ import annotations

import math
from typing import Any

from rasterio import Env
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform_bounds

from tilenet.geometry import Georeference
from tilenet.ground import metres_per_unit, sides_on_ellipsoid

__all__ = ["describe_place"]

Document = dict[str, Any]

_TOLERANCE = 0.01


def describe_place(place: Georeference, height: int, width: int) -> Document:
    """Return what is known of where a grid lies; what is not is None.

    Parameters
    ----------
    place : Georeference
        The grid.
    height, width : int
        Its pixels.

    Returns
    -------
    dict
        ``crs`` (name, code, unit, wkt), ``transform``, ``bounds`` in CRS units, ``bounds_lonlat``
        in degrees (west, south, east, north), ``mpp`` (y, x), ``ground_resolution`` (y, x, metres),
        ``gcps`` (their number).
    """
    bounds = _bounds(place, height, width)
    return {
        "crs": None if place.crs_wkt is None else _crs(place.crs_wkt),
        "transform": place.transform,
        "bounds": bounds,
        "bounds_lonlat": _lonlat(place.crs_wkt, bounds),
        "mpp": place.mpp,
        "ground_resolution": _resolution(place, height, width),
        "gcps": len(place.gcps),
    }


def _crs(wkt: str) -> Document:
    crs = CRS.from_wkt(wkt)
    # At less than 100 % PROJ offers codes of CRSs that merely look alike.
    found = crs.to_authority(confidence_threshold=100)
    try:
        unit = "degree" if crs.is_geographic else str(crs.linear_units)
    except CRSError:
        unit = None
    return {
        "name": _name(crs),
        "code": None if found is None else ":".join(found),
        "unit": unit,
        "wkt": wkt,
    }


def _name(crs: CRS) -> str | None:
    try:
        found = crs.to_dict(projjson=True)
    except CRSError:
        return None
    # A CRS that is bound to WGS 84 by a shift has its name inside.
    name = found.get("name") or found.get("source_crs", {}).get("name")
    return None if name is None else str(name)


def _bounds(place: Georeference, height: int, width: int) -> list[float] | None:
    if place.transform is None:
        return None
    a, b, c, d, e, f = place.transform
    corners = [(a * x + b * y + c, d * x + e * y + f) for x in (0, width) for y in (0, height)]
    xs, ys = zip(*corners, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def _lonlat(crs_wkt: str | None, bounds: list[float] | None) -> list[float] | None:
    if crs_wkt is None or bounds is None:
        return None
    try:
        with Env():  # otherwise GDAL complains on stderr
            found = transform_bounds(CRS.from_wkt(crs_wkt), CRS.from_epsg(4326), *bounds)
    except (CPLE_BaseError, RasterioError):  # a CRS of Mars, say
        return None
    return [float(v) for v in found] if all(map(math.isfinite, found)) else None


def _resolution(place: Georeference, height: int, width: int) -> Document | None:
    """Return the pixel's height and width in CRS units, and in metres if that is known.

    Metres are those of the CRS; on the ellipsoid, in the middle of the raster, where the CRS has
    none or these are more than 1 % off (Web Mercator).
    """
    if place.transform is None:
        return None
    a, b, _, d, e, _ = place.transform
    y, x = math.hypot(b, e), math.hypot(a, d)
    metres: tuple[float, float] | None = None
    if place.crs_wkt is not None:
        factor = metres_per_unit(place.crs_wkt)
        metres = None if factor is None else (y * factor, x * factor)
        true = sides_on_ellipsoid(place.crs_wkt, place.transform, (height, width))
        if true is not None and (metres is None or not _same(metres, true)):
            metres = true
    return {"y": y, "x": x, "metres": metres}


def _same(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(one, other, strict=True))
