"""Which reader a file is for, by its content: GDAL, OpenSlide, tifffile or Zarr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilenet.errors import InputError, TilenetError
from tilenet.sources import gdal, slide, store, tiff
from tilenet.sources.raster import Handle, Raster
from tilenet.sources.rasterinfo import Found, RasterInfo, settled
from tilenet.sources.remote import RemoteName, is_remote, require_permission
from tilenet.sources.view import View
from tilenet.strangers import exists, is_file, is_store

__all__ = ["open_handle", "open_raster"]

_LARGE = 1 << 24

_HANDLES: dict[str, Callable[[RasterInfo], Handle]] = {
    "openslide": slide.SlideHandle,
    "tifffile": tiff.TiffHandle,
    "zarr": store.StoreHandle,
}


def open_handle(info: RasterInfo) -> Handle:
    """Open the file of a raster that is known."""
    return _HANDLES.get(info.driver, gdal.GdalHandle)(info)


def open_raster(
    path: str | Path | RemoteName,
    view: View | None = None,
    *,
    checked: bool = True,
    keep_open: bool = False,
) -> Raster:
    """Open a raster and look at its header.

    Slides are for OpenSlide, OME-TIFF and what neither GDAL nor OpenSlide reads for tifffile,
    everything else for GDAL. The content decides, whatever the name says.

    Parameters
    ----------
    path : str, Path or RemoteName
        A file, or a Zarr store in a folder; with the view's `allow_remote`, in an object store.
    view : View, optional
        How to look at it: bands, level or resolution, plane. Default: all bands but alpha at full
        resolution.
    checked : bool
        Whether the pixels must be of a kind that a network can take.
    keep_open : bool
        Keep the handle for the first read.

    Raises
    ------
    InputError
        The file is missing, no raster of a known format, or of a kind of pixel that is no image.
    UsageError
        The extra that reads it is not installed, or it lies elsewhere and that is not allowed.
    """
    name, view = str(path), view or View()
    if is_remote(name):
        return _remote(RemoteName(name), view)
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise InputError("the name is not UTF-8", name, "rename the file")
    if not exists(name):
        raise InputError("no such file", name, "check the path")
    if is_store(name):
        return Raster(settled(store.find(str(Path(name).absolute()), view), view), open_handle)
    if not is_file(name):
        raise InputError("not a regular file", name, "give a raster or a folder of rasters")
    name = str(Path(name).absolute())
    if view.variable is not None:
        raise InputError("has no variables to choose from", name, "leave --variable out")
    if slide.is_slide(name):
        return Raster(settled(slide.find(name, view), view), open_handle)
    try:
        dataset = _dataset(name)
    except InputError as error:
        if "codec" not in str(error):
            raise
        found = (slide if slide.detects(name) else tiff).find(name, view, checked=checked)
        return Raster(settled(found, view), open_handle)
    return _by_gdal(name, dataset, view, checked=checked, keep_open=keep_open)


def _remote(name: RemoteName, view: View) -> Raster:
    """Open a raster that lies elsewhere."""
    require_permission(name, view.allow_remote)
    if not store.is_remote_store(name):
        raise InputError("no Zarr store there", name, "check the name")
    return Raster(settled(store.find(name.url, view), view), open_handle)


def _dataset(name: str) -> Any:
    try:
        with gdal.environment():
            return gdal.open_dataset(name, 0)
    except Exception as error:  # GDAL's own classes are neither RasterioError nor OSError
        raise InputError(
            f"not a raster that can be read: {error}", name, "check the file"
        ) from error


def _other_reader(name: str, dataset: Any) -> Callable[..., Found] | None:
    """Return who reads a file that GDAL can open better than GDAL does, None if nobody."""
    if dataset.driver != "GTiff" or dataset.crs or not dataset.transform.is_identity:
        return None
    if tiff.is_stack(dataset):
        return tiff.find
    # A slide says whose it is, or is too large to be anything else. (Asking GDAL for further
    # pictures in the file would spoil the handle where these are broken.)
    says = {"TIFFTAG_IMAGEDESCRIPTION", "TIFFTAG_SOFTWARE"} & set(dataset.tags())
    may_be = says or dataset.height * dataset.width >= _LARGE
    return slide.find if may_be and slide.detects(name) else None


def _by_gdal(name: str, dataset: Any, view: View, *, checked: bool, keep_open: bool) -> Raster:
    kept = False
    try:
        with gdal.environment():
            other = _other_reader(name, dataset)
            if other is not None:
                return Raster(settled(other(name, view, checked=checked), view), open_handle)
            info = settled(gdal.find(name, dataset, view, checked=checked), view)
        kept = keep_open and info.level == 0
        return Raster(info, open_handle, gdal.GdalHandle(info, dataset) if kept else None)
    except TilenetError:
        raise
    except Exception as error:
        raise InputError(
            f"not a raster that can be read: {error}", name, "check the file"
        ) from error
    finally:
        if not kept:
            dataset.close()
