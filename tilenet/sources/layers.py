"""Several files seen as the bands of one raster: what a STAC item's image is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.sources.bands import scaled_bands
from tilenet.sources.fetch import fetch
from tilenet.sources.grid import Grid
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import Found, RasterInfo
from tilenet.sources.remote import is_remote
from tilenet.sources.salvage import Pixels
from tilenet.sources.stac import Part, parts_of, read_item
from tilenet.sources.validity import holds
from tilenet.sources.view import View

__all__ = ["LayersHandle", "find"]

Open = Callable[[str, View], Raster]


def _layers(name: str, view: View, level: int, open_file: Open) -> list[tuple[Part, RasterInfo]]:
    """Return the files that an item's image is made of, all on the grid of the finest one.

    Parameters
    ----------
    name : str
        The item.
    view : View
        How it is looked at.
    level : int
        Pyramid index of what is read; 0 where the files are not of one grid.
    open_file : callable
        Opens one of them.
    """
    item = read_item(name)
    layers = [(part, _seen(part, view, View(), open_file)) for part in parts_of(item, name, view)]
    _, base = min(layers, key=lambda layer: _pixel(layer[1]))
    if _is_even([info for _, info in layers]):
        if level == 0:
            return layers
        return [(part, _seen(part, view, View(level=level), open_file)) for part, _ in layers]
    grid = _grid(base)
    return [
        (part, info if _same_grid(info, base) else _seen(part, view, View(like=grid), open_file))
        for part, info in layers
    ]


def _seen(part: Part, view: View, where: View, open_file: Open) -> RasterInfo:
    """Return what is known of a file, with what only the item says of it."""
    own = None if part.bands is not None else view
    info = open_file(
        part.href,
        replace(
            where,
            bands=part.bands if own is None else own.bands,
            trained_bands=() if own is None else own.trained_bands,
            scaling=view.scaling,
            plane=view.plane,
            allow_remote=view.allow_remote,
        ),
    ).info
    every = part.told * info.count if len(part.told) == 1 else part.told
    if len(every) < max(info.bands):
        return info
    told = [every[band - 1] for band in info.bands]
    said = tuple((one.scale, one.offset) for one in told)
    if info.scaling is None:
        scaling = scaled_bands(info.bands, said, view.scaling, part.href)
        if scaling is not None:
            info = replace(info, scaling=scaling, dtype="float32")
    elif any(one != (1.0, 0.0) for one in said) and said != info.scaling:
        raise InputError(
            "its scale and offset are not those that the item tells", part.href, "--scaling stored"
        )
    nodata = tuple(one.nodata for one in told)
    with_nodata = {"all": "nodata", "alpha": "alpha+nodata"}.get(info.validity)
    if with_nodata is not None and any(value is not None for value in nodata):
        info = replace(info, validity=with_nodata, nodata=nodata)
    return info


def _place(info: RasterInfo) -> tuple[str, tuple[float, ...]]:
    place = info.georeference
    if place.crs_wkt is None or place.transform is None:
        raise InputError("has no CRS and affine", info.path, "choose another with --variable")
    return place.crs_wkt, place.transform


def _pixel(info: RasterInfo) -> float:
    """Return how large a pixel is, in the units of its CRS."""
    a, b, _, d, e, _ = _place(info)[1]
    return abs(a * e - b * d)


def _grid(info: RasterInfo) -> Grid:
    crs_wkt, _ = _place(info)
    assert info.georeference.transform is not None
    return Grid(crs_wkt, info.georeference.transform, info.height, info.width)


def _same_grid(info: RasterInfo, other: RasterInfo) -> bool:
    same = (info.height, info.width, _place(info)[1]) == (
        other.height, other.width, _place(other)[1]
    )  # fmt: skip
    return same and CRS.from_wkt(_place(info)[0]) == CRS.from_wkt(_place(other)[0])


def _is_even(infos: list[RasterInfo]) -> bool:
    """Return whether all files have one grid, and the same levels of it."""
    first = infos[0]
    return all(_same_grid(one, first) and one.levels == first.levels for one in infos[1:])


def _names(part: Part, info: RasterInfo) -> tuple[str, ...]:
    return part.names or tuple(info.names[band - 1] for band in info.bands)


def find(name: str, view: View, open_file: Open) -> Found:
    """Return what the files of an item are together.

    Parameters
    ----------
    name : str
        The item's file or URL.
    view : View
        How it is looked at.
    open_file : callable
        Opens a file.

    Raises
    ------
    InputError
        It is no item, has no such bands, or one of its files does not open.
    """
    layers = _layers(name, view, 0, open_file)
    infos = [info for _, info in layers]
    base = min(infos, key=lambda info: (_pixel(info), info.warp is not None))
    crs_wkt, _ = _place(base)
    crs = CRS.from_wkt(crs_wkt)
    names = tuple(text for part, info in layers for text in _names(part, info))
    marks = "\0".join([hashlib.sha256(fetch(name)).hexdigest(), *(i.fingerprint for i in infos)])
    here = () if is_remote(name) else (name,)
    return Found(
        path=name,
        driver="stac",
        bands=tuple(range(1, len(names) + 1)),
        count=len(names),
        names=names,
        stored_dtype=str(np.result_type(*(info.dtype for info in infos))),
        levels=base.levels if _is_even(infos) else ((base.height, base.width),),
        nodata=(None,) * len(names),
        validity="mask",
        plane=base.plane,
        planes=base.planes,
        georeference=Georeference(crs_wkt, base.georeference.transform),
        metres=float(crs.linear_units_factor[1]) if crs.is_projected else None,
        native_block=lambda _: base.native_block,
        files=tuple(sorted({*here, *(file for info in infos for file in info.files)})),
        notes=tuple(dict.fromkeys(note for info in infos for note in info.notes)),
        fingerprint=lambda _: hashlib.sha256(marks.encode()).hexdigest(),
    )


def _blank(info: RasterInfo, fill: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what stands, (C,), at the invalid pixels of one of the files.

    In a file of bytes that is what is there, its nodata: another file may see the pixel, and then
    each of its values may be a colour, as it may be where all bands are in one file.
    """
    stored = np.dtype(info.stored_dtype)
    if "nodata" not in info.validity or stored.itemsize > 1:
        return fill
    blank, scaling = fill.copy(), info.scaling or ((1.0, 0.0),) * len(fill)
    for band, value in enumerate(info.nodata):
        if value is not None and holds(stored, value):
            blank[band] = value * scaling[band][0] + scaling[band][1]
    return blank


class LayersHandle:
    """The files of an item, open; belongs to one thread at a time.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    open_file : callable
        Opens a file.
    open_handle : callable
        Opens the file of a raster that is known.
    """

    def __init__(
        self, info: RasterInfo, open_file: Open, open_handle: Callable[[RasterInfo], Any]
    ) -> None:
        layers = _layers(info.path, info.view, info.level, open_file)
        self._dtype = np.dtype(info.dtype)
        self._rasters = [Raster(one, open_handle) for _, one in layers]

    def close(self) -> None:
        """Close the files."""
        for raster in self._rasters:
            raster.close()

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window, (C, h, w), and where any file is valid."""
        return self.composed(box, np.zeros(sum(len(r.info.bands) for r in self._rasters)))

    def composed(self, box: Window, fill: NDArray[np.float64]) -> Pixels:
        """Return a window, (C, h, w), its invalid values filled, and where any file is valid."""
        pixels = np.empty((len(fill), box.height, box.width), self._dtype)
        seen = np.zeros((box.height, box.width), bool)
        for raster, bands in self._parts():
            pixels[bands], valid = raster.read(box, _blank(raster.info, fill[bands]))
            seen |= True if valid is None else valid
        if seen.all():
            return pixels, None
        blank = (fill if self._dtype.kind == "f" else np.rint(fill)).astype(self._dtype)
        return np.where(seen, pixels, blank[:, None, None]), seen

    def _parts(self) -> Iterator[tuple[Raster, slice]]:
        start = 0
        for raster in self._rasters:
            stop = start + len(raster.info.bands)
            yield raster, slice(start, stop)
            start = stop
