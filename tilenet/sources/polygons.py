"""Polygons on disk, any CRS, brought to an image's pixels. The only importer of geopandas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import rasterize
from rasterio.warp import transform_bounds

from tilenet.errors import InputError, UsageError
from tilenet.geometry import Georeference, Window
from tilenet.quiet import ignoring
from tilenet.sources.ogr import ogr
from tilenet.sources.places import near, turn_of

__all__ = ["SUFFIXES", "Grid", "Points", "as_polygons", "burn", "read_frame", "shapes_near"]

SUFFIXES = frozenset((".geojson", ".json", ".gpkg", ".parquet", ".geoparquet", ".shp", ".fgb"))

Points = NDArray[np.float64]
"""Points (x, y), or (col, row), shape (n, 2)."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels of a georeferenced image.

    Parameters
    ----------
    crs : str
        Coordinate reference system as WKT or a code.
    transform : tuple of 6 float
        Affine (a, b, c, d, e, f) from (col, row) to (x, y).
    height, width : int
        Pixels.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    @classmethod
    def of(cls, place: Georeference, height: int, width: int) -> Grid | None:
        """Return the grid of a placed image; None if it has no CRS or no affine transform."""
        if place.crs_wkt is None or place.transform is None:
            return None
        return cls(place.crs_wkt, place.transform, height, width)

    def bounds(self) -> tuple[float, float, float, float]:
        """Return left, bottom, right, top of all pixels in CRS units."""
        a, b, c, d, e, f = self.transform
        col, row = np.array([[0, 0, self.width, self.width], [0, self.height, 0, self.height]])
        x, y = a * col + b * row + c, d * col + e * row + f
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def to_pixels(self, points: Points) -> Points:
        """Return (col, row) of points (x, y), both (n, 2)."""
        a, b, c, d, e, f = self.transform
        x, y = points[:, 0] - c, points[:, 1] - f
        return np.stack([e * x - b * y, a * y - d * x], axis=1) / (a * e - b * d)


def read_frame(path: str) -> Any:
    """Return the polygons of a file, a frame with a CRS.

    Raises
    ------
    InputError
        It does not read, or has no polygons with a CRS.
    UsageError
        The extra `vector` is not installed.
    """
    try:
        stat = Path(path).stat()
    except (OSError, ValueError) as error:
        raise InputError("no such file", path, "check the path") from error
    return _frame(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _frame(path: str, size: int, time: int) -> Any:
    del size, time  # parts of the key: a file that changed is read again
    try:
        import geopandas

        ogr()  # by which geopandas reads
    except ImportError as error:
        raise UsageError("polygons need the extra vector", path, "pip install 'tilenet[vector]'") \
            from error  # fmt: skip
    try:
        parquet = Path(path).suffix.lower() in (".parquet", ".geoparquet")
        frame = geopandas.read_parquet(path) if parquet else geopandas.read_file(path)
    except Exception as error:
        # pyogrio, pyarrow and GDAL each raise their own.
        raise InputError(f"the polygons do not read: {error}", path, "check the file") from error
    if getattr(frame, "crs", None) is None:
        raise InputError("no polygons with a CRS", path, "say which CRS they are in")
    keep = frame.geometry.notna() & ~frame.geometry.is_empty
    frame = frame[keep & frame.geometry.geom_type.isin(["Polygon", "MultiPolygon"])]
    if frame.empty:
        raise InputError("no polygons", path, "give polygons or multipolygons")
    return frame


def _near(frame: Any, grid: Grid) -> Any:
    """Return the polygons whose boxes meet the image's, so that few need to be reprojected."""
    import shapely

    left, bottom, right, top = transform_bounds(grid.crs, frame.crs, *grid.bounds())
    if not np.isfinite((left, bottom, right, top)).all() or left > right:
        return frame  # across the date line, or beyond what the CRS can say
    # GDAL samples the edges; what bends between its samples is within a hundredth of the side.
    spare, turn = 0.01 * max(right - left, top - bottom), turn_of(frame.crs.to_wkt())
    reach = [
        shapely.box(left + by - spare, bottom - spare, right + by + spare, top + spare)
        for by in ((0.0,) if turn is None else (-turn, 0.0, turn))
    ]
    return frame.iloc[np.unique(frame.sindex.query(reach)[1])]


def _uncut(shapes: Any, turn: float) -> Any:
    """Return shapes whose longitudes go on where they came out on the date line's other side."""
    import shapely

    points, owner = shapely.get_coordinates(shapes, return_index=True)
    first = points[np.searchsorted(owner, np.arange(len(shapes))), 0]
    points[:, 0] = near(points[:, 0], first[owner], turn)
    return shapely.set_coordinates(shapes.copy(), points)


def _turned(shapes: Any, grid: Grid, turn: float) -> tuple[Any, NDArray[np.intp]]:
    """Return shapes, and again those that a turn away meet a grid; and which of them each is.

    A grid of longitudes may go on beyond 180 degrees, where RFC 7946 has polygons cut.
    """
    import shapely

    left, _, right, _ = grid.bounds()
    west, _, east, _ = shapely.bounds(shapes).T
    made, which = [shapes], [np.arange(len(shapes))]
    for by in (-turn, turn):
        meets = np.flatnonzero((west + by < right) & (east + by > left))
        made.append(shapely.transform(shapes[meets], partial(np.add, (by, 0.0))))
        which.append(meets)
    every = np.concatenate(which)
    order = np.argsort(every, kind="stable")
    return np.concatenate(made)[order], every[order]


def as_polygons(shapes: Any) -> Any:
    """Return shapes made valid, an array of them.

    Only polygons come out of it: no lines that would be burnt.
    """
    import shapely

    return shapely.make_valid(shapes, method="structure", keep_collapsed=False)


def shapes_near(frame: Any, grid: Grid) -> tuple[Any, Any]:
    """Return the polygons near an image in pixels of its grid, and the row of the frame for each.

    What the image's CRS cannot say is left out.
    """
    import shapely

    crs, turn = frame.crs, turn_of(grid.crs)
    try:
        frame = _near(frame, grid).to_crs(grid.crs)
    except Exception as error:  # rasterio, pyproj and GDAL each raise their own
        raise InputError(
            f"polygons cannot be brought to the raster's CRS: {error}", crs, "give them in it"
        ) from error
    frame = frame[np.isfinite(frame.geometry.bounds).all(axis=1)]
    shapes = frame.geometry.to_numpy()
    if turn is not None and not crs.is_geographic:
        shapes = _uncut(shapes, turn)
    shapes = as_polygons(shapes)
    if turn is not None:
        shapes, which = _turned(shapes, grid, turn)
        frame = frame.iloc[which]
    return shapely.transform(shapes, grid.to_pixels), frame


def burn(pairs: list[tuple[Any, int]], window: Window) -> NDArray[np.int32]:
    """Return a window, (h, w), with each shape's value at the pixels whose centre it holds."""
    shape = (window.height, window.width)
    if not pairs:
        return np.zeros(shape, np.int32)
    place = Affine.translation(window.col, window.row)
    with ignoring(NotGeoreferencedWarning):  # the place of the first window is the identity
        burnt: NDArray[np.int32] = rasterize(pairs, out_shape=shape, transform=place, dtype="int32")
    return burnt
