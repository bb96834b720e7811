"""Many scenes seen as one raster. Where they overlap, the first one that is valid is seen."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import Found, RasterInfo
from tilenet.sources.salvage import Pixels
from tilenet.sources.view import View

__all__ = ["MosaicHandle", "find"]

_OPEN = 32
"""Scenes that a handle keeps open: those that the next window needs are mostly among them."""
_BLOCK = 512  # how finely a damaged scene is read around
_SAME = 1e-9
_OFF = 0.01  # of a pixel: what decimals in a header lose, and no shift

Open = Callable[[str, View], Raster]


@dataclass(frozen=True, slots=True)
class _Scene:
    info: RasterInfo
    row: int
    col: int


def _view(view: View) -> View:
    """Return how each scene is looked at."""
    return View(
        bands=view.bands,
        scaling=view.scaling,
        trained_bands=view.trained_bands,
        plane=view.plane,
        variable=view.variable,
        allow_remote=view.allow_remote,
    )


def _offset(first: Georeference, other: Georeference, path: str) -> tuple[int, int]:
    """Return at which row and column of the first scene's grid another begins."""
    do = "bring them to one grid: --like a raster, one after another"
    if other.crs_wkt is None or other.transform is None:
        raise InputError("has no CRS and affine, so no place in a mosaic", path, "leave it out")
    assert first.crs_wkt is not None
    assert first.transform is not None
    if CRS.from_wkt(other.crs_wkt) != CRS.from_wkt(first.crs_wkt):
        raise InputError("its CRS is not that of the first scene", path, do)
    a, b, c, d, e, f = first.transform
    mine = np.array([other.transform[k] for k in (0, 1, 3, 4)])
    theirs = np.array([a, b, d, e])
    if np.abs(mine - theirs).max() > _SAME * np.abs(theirs).max():
        raise InputError("its pixels are not of the first scene's size", path, do)
    x, y, area = other.transform[2] - c, other.transform[5] - f, a * e - b * d
    place = np.array([(a * y - d * x) / area, (e * x - b * y) / area])
    row, col = np.rint(place)
    if np.abs(place - (row, col)).max() > _OFF:
        raise InputError("its pixels lie between those of the first scene", path, do)
    return int(row), int(col)


def _placed(opened: list[RasterInfo]) -> list[_Scene]:
    first = opened[0]
    scenes = []
    for info in opened:
        row, col = _offset(first.georeference, info.georeference, info.path)
        if len(info.bands) != len(first.bands):
            raise InputError(
                f"{len(info.bands)} bands, the first scene {len(first.bands)}", info.path,
                "choose with --bands",
            )  # fmt: skip
        scenes.append(_Scene(info, row, col))
    top, left = min(one.row for one in scenes), min(one.col for one in scenes)
    return [replace(one, row=one.row - top, col=one.col - left) for one in scenes]


def _metres(crs_wkt: str) -> float | None:
    crs = CRS.from_wkt(crs_wkt)
    return float(crs.linear_units_factor[1]) if crs.is_projected else None


def find(paths: tuple[str, ...], view: View, open_scene: Open, index: str | None = None) -> Found:
    """Return what scenes are together.

    Parameters
    ----------
    paths : tuple of str
        Their names, the first on top.
    view : View
        How they are looked at.
    open_scene : callable
        Opens one of them.
    index : str, optional
        The file that names them.

    Raises
    ------
    InputError
        A scene does not open, or its pixels are not those of one grid.
    """
    opened = []
    for path in paths:
        raster = open_scene(path, _view(view))
        raster.close()
        opened.append(raster.info)
    scenes, first = _placed(opened), opened[0]
    height = max(one.row + one.info.height for one in scenes)
    width = max(one.col + one.info.width for one in scenes)
    own = first.georeference
    assert own.crs_wkt is not None
    assert own.transform is not None
    a, b, c, d, e, f = own.transform
    row, col = scenes[0].row, scenes[0].col
    corner = (a, b, c - a * col - b * row, d, e, f - d * col - e * row)
    dtype = str(np.result_type(*(info.dtype for info in opened)))
    files = tuple(sorted({*([index] if index else []), *(f for one in opened for f in one.files)}))
    digest = hashlib.sha256("\0".join(one.fingerprint for one in opened).encode())
    return Found(
        path=index or first.path,
        driver="mosaic",
        bands=first.bands,
        count=first.count,
        names=first.names,
        stored_dtype=dtype,
        levels=((height, width),),
        nodata=(None,) * len(first.bands),
        validity="mask",
        plane=first.plane,
        planes=first.planes,
        georeference=Georeference(own.crs_wkt, corner),
        metres=_metres(own.crs_wkt),
        native_block=lambda _: (_BLOCK, _BLOCK),
        files=files,
        fingerprint=lambda _: digest.hexdigest(),
        notes=tuple(dict.fromkeys(note for info in opened for note in info.notes)),
        scenes=tuple(
            (one.info.path, Window(one.row, one.col, one.info.height, one.info.width))
            for one in scenes
        ),
    )


class MosaicHandle:
    """Scenes, a few of them open; belongs to one thread at a time.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    open_scene : callable
        Opens a scene.
    """

    def __init__(self, info: RasterInfo, open_scene: Open) -> None:
        self._info, self._open = info, open_scene
        self._rasters = OrderedDict[str, Raster]()
        self._bounds = np.array(
            [(w.row, w.row_stop, w.col, w.col_stop) for _, w in info.scenes], np.int64
        )

    def close(self) -> None:
        """Close what is open."""
        while self._rasters:
            self._rasters.popitem()[1].close()

    def _raster(self, path: str) -> Raster:
        if path not in self._rasters:
            while len(self._rasters) >= _OPEN:
                self._rasters.popitem(last=False)[1].close()
            self._rasters[path] = self._open(path, _view(self._info.view))
        self._rasters.move_to_end(path)
        return self._rasters[path]

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window, (C, h, w), and where any scene is valid."""
        return self.composed(box, np.zeros(len(self._info.bands)))

    def composed(self, box: Window, fill: NDArray[np.float64]) -> Pixels:
        """Return a window, (C, h, w), in the mosaic's dtype, and where any scene is valid.

        Parameters
        ----------
        box : Window
            Inside the mosaic.
        fill : ndarray, shape (C,)
            What stands at invalid values, rounded for integers.
        """
        dtype = np.dtype(self._info.dtype)
        blank = (fill if dtype.kind == "f" else np.rint(fill)).astype(dtype)[:, None, None]
        pixels = np.broadcast_to(blank, (len(fill), box.height, box.width)).copy()
        seen = np.zeros((box.height, box.width), bool)
        top, bottom, left, right = self._bounds.T
        touched = (top < box.row_stop) & (bottom > box.row)
        touched &= (left < box.col_stop) & (right > box.col)
        for index in np.flatnonzero(touched):
            path, place = self._info.scenes[index]
            part = place.intersection(box)
            where = part.slices(box.row, box.col)
            if seen[where].all():
                continue
            inside = Window(part.row - place.row, part.col - place.col, part.height, part.width)
            values, valid = self._raster(path).read(inside, fill)
            new = ~seen[where] if valid is None else valid & ~seen[where]
            np.copyto(pixels[(slice(None), *where)], values, where=new)
            seen[where] |= new
        return pixels, None if seen.all() else seen
