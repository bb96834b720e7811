"""Polygons as labels: any CRS, rasterised per window. The only importer of geopandas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import rasterize
from rasterio.warp import transform_bounds

from tilenet.classes import NODATA
from tilenet.errors import InputError, UsageError
from tilenet.geometry import Georeference, Window
from tilenet.quiet import ignoring

__all__ = ["SUFFIXES", "Grid", "Polygons", "read_classes"]

SUFFIXES = frozenset((".geojson", ".json", ".gpkg", ".parquet", ".geoparquet", ".shp", ".fgb"))


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

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (col, row) of points (x, y), both (n, 2)."""
        a, b, c, d, e, f = self.transform
        x, y = points[:, 0] - c, points[:, 1] - f
        return np.stack([e * x - b * y, a * y - d * x], axis=1) / (a * e - b * d)


@lru_cache(maxsize=8)
def _frame(path: str) -> Any:
    """Return the polygons of a file.

    Raises
    ------
    InputError
        It does not read, or has no polygons with a CRS.
    UsageError
        The extra `vector` is not installed.
    """
    try:
        import geopandas
    except ImportError as error:
        raise UsageError("polygons need the extra vector", path, "pip install tilenet[vector]") \
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


def read_classes(path: str, column: str | None) -> tuple[str, ...]:
    """Return the names that a column gives the polygons, in alphabetical order.

    Raises
    ------
    InputError
        The file does not read, or has no such column.
    """
    frame = _frame(path)
    if column is None:
        return ()
    if column not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise InputError(f"no column {column}", path, f"there are {columns}")
    return tuple(sorted({str(value) for value in frame[column].dropna()}))


def _near(frame: Any, grid: Grid) -> Any:
    """Return the polygons whose boxes meet the image's, so that few need to be reprojected."""
    import shapely

    left, bottom, right, top = transform_bounds(grid.crs, frame.crs, *grid.bounds())
    if not np.isfinite((left, bottom, right, top)).all() or left > right:
        return frame  # across the date line, or beyond what the CRS can say
    # GDAL samples the edges; what bends between its samples is within a hundredth of the side.
    reach = shapely.box(left, bottom, right, top).buffer(0.01 * max(right - left, top - bottom))
    return frame.iloc[np.sort(frame.sindex.query(reach))]


@lru_cache(maxsize=1024)
def _in_pixels(path: str, column: str | None, grid: Grid) -> Any:
    """Return polygons in pixel coordinates of a grid, their class names, and an index of them."""
    import shapely

    frame = _near(_frame(path), grid).to_crs(grid.crs)
    whole = shapely.make_valid(
        frame.geometry.to_numpy(), method="structure", keep_collapsed=False
    )  # only polygons come out of it: no lines that would be burnt
    shapes = shapely.transform(whole, grid.to_pixels)
    names = [None] * len(frame) if column is None else [str(v) for v in frame[column]]
    return shapes, names, shapely.STRtree(shapes)


@dataclass(frozen=True)
class Polygons:
    """Polygons over a georeferenced image.

    Parameters
    ----------
    path : str
        Polygons of the objects; where they touch, the later one wins.
    area : str or None
        Polygons outside which pixels are ignored.
    grid : Grid
        The image's.
    names : tuple of str
        Class names; the class is 1 + the place of the polygon's name. Empty: class 1.
    column : str or None
        Attribute with the names.
    """

    path: str
    area: str | None
    grid: Grid
    names: tuple[str, ...] = ()
    column: str | None = None

    def _hits(self, path: str, column: str | None, window: Window) -> list[tuple[int, Any, Any]]:
        """Return number, shape in pixels and class name of the polygons that meet a window."""
        import shapely

        shapes, names, tree = _in_pixels(path, column, self.grid)
        box = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
        hits = sorted(int(k) for k in tree.query(box, predicate="intersects"))
        return [(k, shapes[k], names[k]) for k in hits]

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Read a window (see `tilenet.training.labels.Label.read`)."""
        hits = self._hits(self.path, self.column, window)
        objects = _burn([(s, k + 1) for k, s, _ in hits], window)
        classes = (objects > 0).astype(np.uint8)
        if self.names:
            numbers = {name: index + 1 for index, name in enumerate(self.names)}
            named = [(s, numbers.get(n, NODATA)) for _, s, n in hits]
            classes = _burn(named, window).astype(np.uint8)
        if self.area is not None:
            inside = _burn([(s, 1) for _, s, _ in self._hits(self.area, None, window)], window)
            classes[inside == 0] = NODATA
        return classes, objects


def _burn(pairs: list[tuple[Any, int]], window: Window) -> NDArray[np.int32]:
    """Return a window, (h, w), with each shape's value at the pixels whose centre it holds."""
    shape = (window.height, window.width)
    if not pairs:
        return np.zeros(shape, np.int32)
    place = Affine.translation(window.col, window.row)
    with ignoring(NotGeoreferencedWarning):  # the place of the first window is the identity
        burnt: NDArray[np.int32] = rasterize(pairs, out_shape=shape, transform=place, dtype="int32")
    return burnt
