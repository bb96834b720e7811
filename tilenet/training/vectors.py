"""Polygons as labels: any CRS, rasterised per window. The only importer of geopandas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize

from tilenet.classes import NODATA
from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window

__all__ = ["SUFFIXES", "Polygons", "read_classes"]

SUFFIXES = frozenset((".geojson", ".json", ".gpkg", ".parquet", ".geoparquet", ".shp", ".fgb"))


@lru_cache(maxsize=8)
def _frame(path: str) -> Any:
    try:
        import geopandas
    except ImportError as error:
        raise InputError("polygons need geopandas", path, "pip install tilenet[vector]") from error
    try:
        if Path(path).suffix in (".parquet", ".geoparquet"):
            frame = geopandas.read_parquet(path)
        else:
            frame = geopandas.read_file(path)
    except Exception as error:
        # pyogrio, pyarrow and GDAL each raise their own.
        raise InputError(f"the polygons do not read: {error}", path, "check the file") from error
    if "geometry" not in frame or frame.crs is None:
        raise InputError("no polygons with a CRS", path, "say which CRS they are in")
    keep = frame.geometry.notna() & ~frame.geometry.is_empty
    return frame[keep & frame.geometry.geom_type.isin(["Polygon", "MultiPolygon"])]


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
        raise InputError(
            f"no column {column}", path, f"there are {', '.join(map(str, frame.columns))}"
        )
    return tuple(sorted({str(value) for value in frame[column].dropna()}))


@lru_cache(maxsize=256)
def _in_pixels(path: str, crs: str, transform: tuple[float, ...], column: str | None) -> Any:
    """Return polygons in pixel coordinates of a grid, their class names, and an index of them."""
    import shapely

    frame = _frame(path).to_crs(crs)
    a, b, c, d, e, f = transform
    det = a * e - b * d

    def unproject(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = points[:, 0] - c, points[:, 1] - f
        return np.stack([(e * x - b * y) / det, (a * y - d * x) / det], axis=1)  # (col, row)

    shapes = shapely.transform(shapely.make_valid(frame.geometry.to_numpy()), unproject)
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
    grid : Georeference
        The image's.
    names : tuple of str
        Class names; the class is 1 + the place of the polygon's name. Empty: class 1.
    column : str or None
        Attribute with the names.
    """

    path: str
    area: str | None
    grid: Georeference
    names: tuple[str, ...] = ()
    column: str | None = None

    def _hits(self, path: str, column: str | None, window: Window) -> list[tuple[int, Any, Any]]:
        import shapely

        assert self.grid.crs_wkt is not None
        assert self.grid.transform is not None
        shapes, names, tree = _in_pixels(path, self.grid.crs_wkt, self.grid.transform, column)
        box = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
        hits = sorted(int(k) for k in tree.query(box, predicate="intersects"))
        return [(k, shapes[k], names[k]) for k in hits]

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Read a window (see `tilenet.training.labels.Label.read`)."""
        transform = (1.0, 0.0, float(window.col), 0.0, 1.0, float(window.row))
        shape = (window.height, window.width)

        def burn(pairs: list[tuple[Any, int]]) -> NDArray[np.int32]:
            from affine import Affine

            if not pairs:
                return np.zeros(shape, np.int32)
            burnt: NDArray[np.int32] = rasterize(
                pairs, out_shape=shape, transform=Affine(*transform), dtype="int32"
            )
            return burnt

        hits = self._hits(self.path, self.column, window)
        objects = burn([(s, k + 1) for k, s, _ in hits])
        classes = (objects > 0).astype(np.uint8)
        if self.names:
            numbers = {name: index + 1 for index, name in enumerate(self.names)}
            classes = burn([(s, numbers.get(n, NODATA)) for _, s, n in hits]).astype(np.uint8)
        if self.area is not None:
            inside = burn([(s, 1) for _, s, _ in self._hits(self.area, None, window)])
            classes[inside == 0] = NODATA
        return classes, objects
