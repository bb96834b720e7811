"""Which reader a file is for, by its content: GDAL, OpenSlide, tifffile or Zarr."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilenet.errors import InputError, TilenetError
from tilenet.sources import gdal, layers, mosaic, slide, stac, store, tiff, tileindex
from tilenet.sources.grid import Grid
from tilenet.sources.raster import Handle, Raster
from tilenet.sources.rasterinfo import Found, RasterInfo, settled
from tilenet.sources.remote import RemoteName, is_remote, require_permission
from tilenet.sources.view import View
from tilenet.sources.vsi import checked_name, remote_fingerprint
from tilenet.strangers import exists, is_file, is_store

__all__ = ["grid_of", "open_handle", "open_raster"]

_LARGE = 1 << 24
_HEAD = 512  # bytes that tell what a file is

_HANDLES: dict[str, Callable[[RasterInfo], Handle]] = {
    "openslide": slide.SlideHandle,
    "tifffile": tiff.TiffHandle,
    "zarr": store.StoreHandle,
}


def open_handle(info: RasterInfo) -> Handle:
    """Open the file of a raster that is known."""
    if info.scenes:
        return mosaic.MosaicHandle(info, open_raster)
    if info.driver == "stac":
        return layers.LayersHandle(info, open_raster, open_handle)
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
    everything else for GDAL. The content decides, whatever the name says. A STAC item or a tile
    index stands for the files that it names.

    Parameters
    ----------
    path : str, Path or RemoteName
        A file, or a Zarr store in a folder; with the view's `allow_remote`, on another machine.
        With the view's `mosaic` these are the files, and this says nothing.
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
    if view.mosaic:
        return Raster(settled(mosaic.find(view.mosaic, view, open_raster), view), open_handle)
    if is_remote(name):
        return _remote(RemoteName(name), view, checked=checked)
    head = _head(name)
    name = str(Path(name).absolute())
    if head is None:
        return Raster(settled(store.find(name, view, checked=checked), view), open_handle)
    if head.startswith(b"{") and stac.is_item(name):
        return _pointing("a STAC item", name, view)
    _check_no_variable(name, view)
    if tileindex.is_index(name):
        return _pointing("a tile index", name, view)
    if slide.is_slide(name, head):
        return Raster(settled(slide.find(name, view), view), open_handle)
    try:
        dataset = _dataset(name, view)
    except InputError as error:
        if "codec" not in str(error):
            raise
        found = (slide if slide.detects(name) else tiff).find(name, view, checked=checked)
        return Raster(settled(found, view), open_handle)
    return _by_gdal(name, dataset, view, checked=checked, keep_open=keep_open)


def _head(name: str) -> bytes | None:
    """Return a file's first bytes, None for a store; raises InputError if a name is of neither."""
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise InputError("the name is not UTF-8", name, "rename the file")
    if not exists(name):
        raise InputError("no such file", name, "check the path")
    if is_store(name):
        return None
    if not is_file(name):
        try:
            os.scandir(name).close()
        except OSError as error:
            if not isinstance(error, NotADirectoryError):
                raise InputError(f"cannot be read: {error.strerror}", name, "mend it") from error
        raise InputError("not a regular file", name, "give a raster or a folder of rasters")
    try:
        with Path(name).open("rb", buffering=0) as file:
            return file.read(_HEAD)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise InputError(f"cannot be read: {error.strerror}", name, "check the file") from error


def _check_no_variable(name: str, view: View) -> None:
    if view.variable is not None:
        raise InputError("has no variables to choose from", name, "leave --variable out")


def _remote(name: RemoteName, view: View, *, checked: bool) -> Raster:
    """Open a raster that lies elsewhere."""
    require_permission(name, view.allow_remote)
    if name.scheme and stac.is_item(name.url):
        return _pointing("a STAC item", name.url, view)
    if name.scheme and store.is_remote_store(name):
        return Raster(settled(store.find(name.url, view, checked=checked), view), open_handle)
    _check_no_variable(name.url, view)
    url = checked_name(name)
    return _by_gdal(url, _dataset(url, view), view, checked=checked, keep_open=False)


def _pointing(what: str, name: str, view: View) -> Raster:
    """Open what is made of other files, a STAC item or a tile index."""
    if not view.allow_remote:
        raise _points(what, name)
    if what == "a tile index":
        found = mosaic.find(tileindex.scenes_of(name), view, open_raster, name)
    else:
        found = layers.find(name, view, open_raster)
    return Raster(settled(found, view), open_handle)


def _points(what: str, name: str) -> InputError:
    return InputError(f"{what} points to other files", name, "to follow it, give --allow-remote")


def _is_vrt(name: str) -> bool:
    with Path(name).open("rb") as file:
        return b"<VRTDataset" in file.read(1024)


def _dataset(name: str, view: View) -> Any:
    elsewhere = view.allow_remote
    try:
        with gdal.environment(elsewhere=elsewhere, distant=is_remote(name)):
            return gdal.open_dataset(name, 0, elsewhere=elsewhere)
    except Exception as error:  # GDAL's own classes are neither RasterioError nor OSError
        if is_remote(name):
            remote_fingerprint(name)  # says if it is the server that does not answer
        elif not elsewhere and _is_vrt(name):
            raise _points("a VRT", name) from error
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
        with gdal.environment(elsewhere=view.allow_remote, distant=is_remote(name)):
            other = None if is_remote(name) else _other_reader(name, dataset)
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


def grid_of(path: str | Path) -> Grid:
    """Return the pixel grid of a raster, its full resolution.

    Raises
    ------
    InputError
        As `open_raster`, or it has no place on a map.
    """
    info = open_raster(path, checked=False).info
    place = info.georeference
    if place.crs_wkt is None or place.transform is None:
        raise InputError("has no CRS and affine, so no grid to follow", path, "give another --like")
    return Grid(place.crs_wkt, place.transform, info.height, info.width)
