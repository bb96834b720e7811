"""What is known of a raster before any pixel is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilenet.geometry import Georeference, Window
from tilenet.sources.bands import Scaling, bands_note
from tilenet.sources.view import Resampling, View, settle
from tilenet.sources.warp import Warp, fit

__all__ = ["AS_READ", "CONVERTED", "Found", "RasterInfo", "is_as_found", "settled"]

AS_READ = {"uint8", "uint16", "int16", "float32"}
"""Kinds of pixels that are handed out as they are."""
CONVERTED = {
    "int8": "int16", "uint32": "float32", "int32": "float32", "float16": "float32",
    "float64": "float32",
}  # fmt: skip
"""Kinds of pixels that are handed out as others."""


@dataclass(frozen=True, slots=True)
class RasterInfo:
    """What is known of a raster before any pixel is read.

    Parameters
    ----------
    path : str
        File or store.
    driver : str
        GDAL's name of the format; "openslide", "tifffile" and "zarr" for those that read it.
    height, width : int
        Pixels of the grid that is read.
    bands : tuple of int
        Bands in use, from 1.
    count : int
        Bands in the file, alpha included.
    names : tuple of str
        What the file calls its bands, all of them; "" where it has no name.
    dtype : str
        Numpy name of the pixels as they are handed out.
    stored_dtype : str
        Numpy name of the pixels in the file.
    level : int
        Pyramid index that is read from, 0 = full resolution.
    levels : tuple of (int, int)
        Height and width of every level.
    native_block : tuple of (int, int)
        Height and width of the file's own tile or strip.
    nodata : tuple of float or None
        Per band in use.
    validity : str
        What tells invalid pixels: "all" (none), "nodata", "alpha", "alpha+nodata" or "mask".
    georeference : Georeference
        Of the grid that is read.
    resampling : Resampling or None
        How the grid follows from the level; None if they are the same.
    warp : Warp or None
        How a grid of another place follows from that; None if there is none.
    scenes : tuple of (str, Window)
        Of a mosaic: the rasters it is made of, the first on top, and where each lies in it.
    scaling : tuple of (float, float) or None
        Per band in use the scale and offset that are applied; None if pixels are as stored.
    plane : tuple of (str, int)
        Index of each further axis (z, t, …) of a stack.
    planes : tuple of (str, int)
        How many there are on each of these axes.
    view : View
        What was asked for: opens the raster again.
    notes : tuple of str
        What the user should know.
    files : tuple of str
        Every file that was used: the raster and its sidecars.
    fingerprint : str
        Hash of names, sizes, times and first bytes of these files.
    """

    path: str
    driver: str
    height: int
    width: int
    bands: tuple[int, ...]
    count: int
    names: tuple[str, ...]
    dtype: str
    stored_dtype: str
    level: int
    levels: tuple[tuple[int, int], ...]
    native_block: tuple[int, int]
    nodata: tuple[float | None, ...]
    validity: str
    georeference: Georeference
    resampling: Resampling | None
    warp: Warp | None
    scenes: tuple[tuple[str, Window], ...]
    scaling: Scaling | None
    plane: tuple[tuple[str, int], ...]
    planes: tuple[tuple[str, int], ...]
    view: View
    notes: tuple[str, ...]
    files: tuple[str, ...]
    fingerprint: str

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel in the file, all bands."""
        return self.count * np.dtype(self.stored_dtype).itemsize


@dataclass(frozen=True, slots=True)
class Found:
    """What a file says of itself, whatever is asked of it.

    Parameters
    ----------
    path, driver, bands, count, names, stored_dtype, levels, nodata, validity, files, plane, planes,
    scaling, scenes
        As in `RasterInfo`.
    georeference : Georeference
        Of the full resolution.
    metres : float or None
        Metres per unit of a projected CRS; None if it is not projected.
    native_block : callable
        From a level, to the height and width of its own tile or strip.
    notes : tuple of str
        What the user should know.
    fingerprint : callable or None
        From a level, to a hash of what is read; None for that of `files`.
    """

    path: str
    driver: str
    bands: tuple[int, ...]
    count: int
    names: tuple[str, ...]
    stored_dtype: str
    levels: tuple[tuple[int, int], ...]
    nodata: tuple[float | None, ...]
    validity: str
    georeference: Georeference
    metres: float | None
    native_block: Callable[[int], tuple[int, int]]
    files: tuple[str, ...]
    plane: tuple[tuple[str, int], ...] = ()
    planes: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: Callable[[int], str] | None = None
    scaling: Scaling | None = None
    scenes: tuple[tuple[str, Window], ...] = ()


def settled(found: Found, view: View) -> RasterInfo:
    """Return what is known of a raster, seen in a certain way; raises InputError as `settle`."""
    place, warp = found.georeference, None
    if view.like is None:
        chosen = settle(view, found.levels, place, found.metres, found.path)
        size, place = chosen.size, chosen.georeference
    else:
        chosen, warp = fit(view.like, found.levels, place, found.path)
        size = (view.like.height, view.like.width)
        place = Georeference(view.like.crs_wkt, view.like.transform)
    stored, notes = found.stored_dtype, found.notes
    said = bands_note(found.bands, view.trained_bands, found.names) if view.bands is None else None
    if said is not None:
        notes = (*notes, f"{found.path}: {said}")
    return RasterInfo(
        path=found.path,
        driver=found.driver,
        height=size[0],
        width=size[1],
        bands=found.bands,
        count=found.count,
        names=found.names,
        dtype=_dtype(found),
        stored_dtype=stored,
        level=chosen.level,
        levels=found.levels,
        native_block=found.native_block(chosen.level),
        nodata=found.nodata,
        validity=found.validity,
        georeference=place,
        resampling=chosen.resampling,
        warp=warp,
        scenes=found.scenes,
        scaling=found.scaling,
        plane=found.plane,
        planes=found.planes,
        view=view,
        notes=notes + chosen.notes,
        files=found.files,
        fingerprint=(
            fingerprint(found.files)
            if found.fingerprint is None
            else found.fingerprint(chosen.level)
        ),
    )


def _dtype(found: Found) -> str:
    """Return the kind of pixels that are handed out."""
    if found.scaling is not None:
        return "float32"
    stored = found.stored_dtype
    return stored if stored in AS_READ else CONVERTED.get(stored, "float32")


def is_as_found(info: RasterInfo) -> bool:
    """Return whether the files of a raster are what they were; False where only opening it tells.

    That is so of what lies elsewhere, or is made of other rasters.
    """
    try:
        return fingerprint(info.files) == info.fingerprint
    except OSError:
        return False


def fingerprint(files: tuple[str, ...]) -> str:
    """Return a hash of the files' names, sizes, times and first 64 KiB."""
    digest = hashlib.sha256()
    for name in files:
        path = Path(name)
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
    return digest.hexdigest()
