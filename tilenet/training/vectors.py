"""Polygons as labels: any CRS, rasterised per window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.sources.polygons import SUFFIXES, Grid, burn, read_frame, shapes_near

__all__ = ["SUFFIXES", "Grid", "Polygons", "read_classes"]


def read_classes(path: str, column: str | None) -> tuple[str, ...]:
    """Return the names that a column gives the polygons, in alphabetical order.

    Raises
    ------
    InputError
        The file does not read, or has no such column.
    """
    frame = read_frame(path)
    if column is None:
        return ()
    if column not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise InputError(f"no column {column}", path, f"there are {columns}")
    return tuple(sorted({str(value) for value in frame[column].dropna()}))


@lru_cache(maxsize=1024)
def _in_pixels(path: str, column: str | None, grid: Grid) -> Any:
    """Return polygons in pixel coordinates of a grid, their class names, and an index of them."""
    import shapely

    shapes, frame = shapes_near(read_frame(path), grid)
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
        objects = burn([(s, k + 1) for k, s, _ in hits], window)
        classes = (objects > 0).astype(np.uint8)
        if self.names:
            numbers = {name: index + 1 for index, name in enumerate(self.names)}
            named = [(s, numbers.get(n, NODATA)) for _, s, n in hits]
            classes = burn(named, window).astype(np.uint8)
        if self.area is not None:
            inside = burn([(s, 1) for _, s, _ in self._hits(self.area, None, window)], window)
            classes[inside == 0] = NODATA
        return classes, objects
