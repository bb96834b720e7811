"""An area of interest: polygons in pixels of an image, and which pixels lie inside."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError, UsageError
from tilenet.geometry import Window
from tilenet.sources.packing import pack, unpack
from tilenet.sources.places import unplaced
from tilenet.sources.polygons import (
    SUFFIXES,
    Grid,
    Points,
    as_polygons,
    burn,
    read_frame,
    shapes_near,
)
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.strangers import parse_json

__all__ = ["Outline", "outline_of"]

_PAGE = 512
_FINE = 2.0**24  # vertices are kept to this part of a pixel, which moves by whole pixels exactly
_MANY = 512  # vertices beyond which a polygon is cut into pieces
_DEGREES = (180.0, 90.0)
_one_thread = threading.Lock()  # a prepared polygon makes its index when it is first asked
_HERE = "draw it on this raster, or say which CRS it is in"


@dataclass(frozen=True, slots=True)
class Outline:
    """Polygons in pixels (col, row) of a grid.

    A pixel is inside if its centre is inside one of them, whatever window is asked for.

    Parameters
    ----------
    path : str
        Where they come from.
    packed : str
        The polygons as WKB, by `pack`.
    sha256 : str
        Of the WKB.
    """

    path: str
    packed: str
    sha256: str

    def kept(self, window: Window) -> NDArray[np.bool_]:
        """Return which pixels of a window are inside, (h, w)."""
        shapes, tree = _decoded(self.packed)
        if not len(tree.query(_box(window))):
            return np.broadcast_to(np.False_, (window.height, window.width))
        kept = np.zeros((window.height, window.width), bool)
        for page in _pages(window):
            part = page.intersection(window)
            inside = _burnt(shapes, tree, page)[part.slices(page.row, page.col)]
            kept[part.slices(window.row, window.col)] = inside
        return kept


def _pages(window: Window) -> Iterator[Window]:
    """Yield the pages, which lie at fixed places, that a window meets."""
    for row in range(window.row // _PAGE * _PAGE, window.row_stop, _PAGE):
        for col in range(window.col // _PAGE * _PAGE, window.col_stop, _PAGE):
            yield Window(row, col, _PAGE, _PAGE)


def _box(window: Window) -> Any:
    import shapely

    return shapely.box(window.col, window.row, window.col_stop, window.row_stop)


def _burnt(shapes: Any, tree: Any, page: Window) -> NDArray[np.bool_]:
    """Return which pixels of a page are inside: GDAL's rounding depends on the page's place."""
    import shapely

    shape = (page.height, page.width)
    with _one_thread:
        hits = shapes[tree.query(_box(page), predicate="intersects")]
        whole = shapely.contains(hits, _box(page)).any()
    if whole or not len(hits):
        return np.broadcast_to(np.bool_(whole), shape)
    burnt: NDArray[np.bool_] = burn([(one, 1) for one in hits], page) != 0
    return burnt


def _pieces(shapes: Any, height: int, width: int) -> list[Any]:
    """Return polygons, those with many vertices in pieces, so that few are looked at for a page.

    The cuts run between pages, and never through a pixel's centre. What is far off is left out.
    """
    import shapely

    bottom, right = (-(-size // _PAGE) * _PAGE + _PAGE for size in (height, width))
    whole = Window.from_bounds(-_PAGE, -_PAGE, bottom, right)
    made, left = list[Any](), [(one, whole) for one in shapely.get_parts(shapes)]
    while left:
        shape, window = left.pop()
        if shapely.get_num_coordinates(shape) <= _MANY or window.pixels <= _PAGE**2:
            made.append(shape)
            continue
        for half in _halves(window):
            parts = shapely.get_parts(shapely.intersection(shape, _box(half)))
            left += [(part, half) for part in parts if part.area > 0]
    return made


def _halves(window: Window) -> tuple[Window, Window]:
    """Return the halves of some pages, cut along a page's border."""
    row, col, height, width = window.row, window.col, window.height, window.width
    if height >= width:
        upper = height // _PAGE // 2 * _PAGE
        return Window(row, col, upper, width), Window(row + upper, col, height - upper, width)
    first = width // _PAGE // 2 * _PAGE
    return Window(row, col, height, first), Window(row, col + first, height, width - first)


@lru_cache(maxsize=8)
def _decoded(packed: str) -> tuple[Any, Any]:
    """Return the polygons and an index of them."""
    import shapely

    shapes = shapely.get_parts(shapely.from_wkb(unpack(packed)))
    shapely.prepare(shapes)
    return shapes, shapely.STRtree(shapes)


def outline_of(path: str, info: RasterInfo) -> Outline:
    """Return the area of interest of a raster from a file of polygons.

    Parameters
    ----------
    path : str
        Polygons in any CRS, or for a raster without, those that QuPath writes.
    info : RasterInfo
        The raster.

    Raises
    ------
    InputError
        The file does not read, has no polygons, or none of them lies on the raster.
    UsageError
        The extra `vector` is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError("not a file of polygons by its ending", path, f"one of {_endings()}")
    try:
        import shapely
    except ImportError as error:
        raise UsageError("polygons need the extra vector", path, "pip install 'tilenet[vector]'") \
            from error  # fmt: skip
    grid = Grid.of(info.georeference, info.height, info.width)
    if grid is None:
        shapes = _drawn(path, info)
    else:
        shapes, _ = shapes_near(read_frame(path), grid)
    whole = _box(Window(0, 0, info.height, info.width))
    pieces = np.array(_pieces(shapes, info.height, info.width), object)
    pieces = pieces[shapely.area(shapely.intersection(pieces, whole)) > 0]
    if not len(pieces):
        raise InputError("the area of interest lies elsewhere", info.path, f"none of {path} is on")
    fine = shapely.transform(pieces, lambda points: np.rint(points * _FINE) / _FINE)
    whole = shapely.multipolygons(fine)
    content = bytes(shapely.to_wkb(whole, byte_order=1, output_dimension=2))
    return Outline(path, pack(content), hashlib.sha256(content).hexdigest())


def _endings() -> str:
    return ", ".join(sorted(SUFFIXES))


def _drawn(path: str, info: RasterInfo) -> Any:
    """Return polygons drawn on the full resolution, as QuPath keeps them, in pixels of the grid.

    QuPath writes GeoJSON, or a plain list of its features, in pixels from the upper left corner.
    """
    import shapely

    if Path(path).suffix.lower() not in (".geojson", ".json"):
        _require_no_warp(info)
        what = "the raster has no CRS and no transform, so only pixels can say where polygons lie"
        raise InputError(what, path, "give GeoJSON as QuPath writes it")
    features, in_pixels = _features(path, info)
    try:
        shapes = np.array([_shape(one) for one in features], object)
        shapes = shapes[np.isin(shapely.get_type_id(shapes), (3, 6)) & ~shapely.is_empty(shapes)]
        whole = as_polygons(shapes)
    except Exception as error:  # whatever a stranger's JSON raises inside
        raise InputError(f"the polygons do not read: {error}", path, "check the file") from error
    if not len(whole):
        raise InputError("no polygons", path, "give polygons or multipolygons")
    if not in_pixels and (np.abs(_extent(whole)) <= _DEGREES).all():
        _require_no_warp(info)
        raise InputError(
            "degrees, by its standard, and the raster has no CRS and no transform", path, _HERE
        )
    factor = _factor(info)

    def to_grid(points: Points) -> Points:
        return points / (factor[1], factor[0])

    return shapely.transform(whole, to_grid)


def _require_no_warp(info: RasterInfo) -> None:
    """Raise where polygons on a map are of use, if the raster were brought to one."""
    place = info.georeference
    if place.gcps or place.rpcs:
        raise unplaced(place, info.path, "polygons on a map have no place in it", "")


def _features(path: str, info: RasterInfo) -> tuple[list[dict[str, Any]], bool]:
    """Return the features that are an area, and whether they are QuPath's.

    Of what QuPath wrote, its annotations: not the cells found in them.
    """
    try:
        document = parse_json(Path(path).read_bytes())
        listed = isinstance(document, list)
        has_crs = not listed and "crs" in document
        every = document if listed else document.get("features", [document])
        features = [one for one in every if isinstance(one, dict) and one.get("geometry", True)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"the polygons do not read: {error}", path, "check the file") from error
    if has_crs:
        _require_no_warp(info)
        raise InputError("polygons with a CRS, and the raster has none", path, _HERE)
    annotations = [one for one in features if _properties(one).get("objectType") == "annotation"]
    return annotations or features, listed or any(map(_by_qupath, features))


def _properties(feature: dict[str, Any]) -> dict[str, Any]:
    found = feature.get("properties")
    return found if isinstance(found, dict) else {}


def _by_qupath(feature: dict[str, Any]) -> bool:
    return "objectType" in _properties(feature) or str(feature.get("id")).startswith("Path")


def _shape(feature: dict[str, Any]) -> Any:
    from shapely.geometry import shape

    return shape(feature.get("geometry", feature))


def _extent(shapes: Any) -> NDArray[np.float64]:
    """Return the two corners of all shapes, (2, 2)."""
    import shapely

    return np.asarray(shapely.total_bounds(shapes)).reshape(2, 2)


def _factor(info: RasterInfo) -> tuple[float, float]:
    """Return how many pixels of the full resolution a pixel of the grid has (y, x)."""
    step = (1.0, 1.0) if info.resampling is None else info.resampling.step
    (height, width), (full_height, full_width) = info.levels[info.level], info.levels[0]
    return full_height / height * step[0], full_width / width * step[1]
