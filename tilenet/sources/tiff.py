"""OME-TIFF, stacks, and what GDAL and OpenSlide do not decode, by tifffile (extra `slides`)."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from tilenet.errors import InputError, UsageError
from tilenet.geometry import Georeference, Window
from tilenet.quiet import ignoring
from tilenet.sources.bands import bands_in_use
from tilenet.sources.rasterinfo import AS_READ, CONVERTED, Found, RasterInfo
from tilenet.sources.stack import StackHandle, band_count, chosen_plane, plane_counts
from tilenet.sources.view import View

__all__ = ["TiffHandle", "find", "is_stack"]

_MICROMETRES = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6,
    "Å": 1e-4, "in": 25_400.0, "ft": 304_800.0,
}  # fmt: skip
_MAX_CHUNK_BYTES = 64 << 20


def is_stack(dataset: Any) -> bool:
    """Return whether a TIFF that GDAL opened is an OME-TIFF, or several pictures of one kind."""
    description = dataset.tags().get("TIFFTAG_IMAGEDESCRIPTION", "")
    if "<OME" in description[:4096] and "openmicroscopy" in description[:4096]:
        return True
    # Of more than 4 GB, ImageJ writes one directory for all of its planes.
    images = re.search(r"^images=(\d+)", description, re.MULTILINE)
    if description.startswith("ImageJ=") and images and int(images[1]) > 1:
        return True
    return _kind(dataset) == _kind_of_second(dataset.name)


def _kind(dataset: Any) -> tuple[Any, ...]:
    return dataset.shape, dataset.dtypes, dataset.colorinterp  # a mask has a palette for GDAL


def _kind_of_second(path: str) -> tuple[Any, ...] | None:
    """Return what the second page is; None if there is none, or it does not read.

    By a handle of its own: where a page is broken, GDAL's is good for nothing more.
    """
    try:
        with ignoring(NotGeoreferencedWarning), rasterio.open(f"GTIFF_DIR:2:{path}") as second:
            return _kind(second)
    except Exception:  # GDAL's own classes are neither RasterioError nor OSError
        return None


def _open(path: str, file: BinaryIO) -> Any:
    try:
        import imagecodecs  # noqa: F401 - tifffile would decode less without it
        import tifffile
    except ImportError as error:
        raise UsageError(
            "this TIFF needs the extra slides", path, "pip install 'tilenet[slides]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it then raises
    try:
        # Other files that the metadata name are not opened.
        return tifffile.TiffFile(file, _multifile=False)
    except Exception as error:  # whatever strange bytes raise inside
        raise InputError(f"not a TIFF that can be read: {error}", path, "check the file") \
            from error  # fmt: skip


def _pixels(file: Any) -> Any:
    """Return what the OME metadata say of the first image; None if they say nothing."""
    import xml.etree.ElementTree as ElementTree

    if not file.is_ome:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata)  # noqa: S314 - Expat stops bombs
    except ElementTree.ParseError:
        return None
    return next((one for one in root.iter() if one.tag.endswith("}Pixels")), None)


def _mpp(pixels: Any) -> tuple[float, float] | None:
    """Return micrometres per pixel (y, x) of an image in OME's metadata."""
    if pixels is None:
        return None
    try:
        y, x = (
            float(pixels.attrib[f"PhysicalSize{axis}"])
            * _MICROMETRES[pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "YX"
        )
    except (KeyError, ValueError):
        return None
    return (y, x) if 0 < y < np.inf and 0 < x < np.inf else None


def _names(pixels: Any, count: int) -> tuple[str, ...]:
    """Return the channels' names of an image in OME's metadata, if they are the bands."""
    channels = () if pixels is None else (o for o in pixels if o.tag.endswith("}Channel"))
    names = [channel.attrib.get("Name", "") for channel in channels]
    return tuple(names) if len(names) == count else ("",) * count


def _axes(series: Any, path: str) -> str:
    axes = str(series.axes).lower()
    if "y" not in axes or "x" not in axes or len(set(axes)) != len(axes):
        raise InputError(f"its axes are {series.axes}, no picture", path, "convert it")
    return axes


def _check_dtype(dtype: str, path: str) -> None:
    if dtype not in AS_READ and dtype not in CONVERTED:
        raise InputError(
            f"pixels are {dtype}", path, "convert them to 8- or 16-bit integers or float32"
        )


def _check_codec(number: int, path: str) -> None:
    """Raise InputError for a codec that nobody here has: tifffile would give zeros."""
    from tifffile import TIFF

    try:
        TIFF.DECOMPRESSORS[number]
    except KeyError as error:
        raise InputError(f"nothing here decodes codec {int(number)}", path, "convert it") \
            from error  # fmt: skip


def _native_block(series: Any, path: str, axes: str, level: int) -> tuple[int, int]:
    page = series.levels[level].keyframe
    height, width = page.chunks[:2] if page.planarconfig == 1 else page.chunks[-2:]
    if height * width * series.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise InputError(
            f"one native block is {height}×{width} pixels, more than 64 MiB", path,
            "rewrite the file in tiles",
        )  # fmt: skip
    return int(height), int(width)


def find(path: str, view: View, *, checked: bool = True) -> Found:
    """Return what a TIFF says of itself, of its first series.

    Raises
    ------
    InputError
        tifffile does not read it, it is no picture, or a plane must be chosen (where `checked`).
    UsageError
        The extra is not installed.
    """
    with Path(path).open("rb") as raw, _open(path, raw) as file:
        try:
            return _find(path, file, view, checked=checked)
        except InputError:
            raise
        except Exception as error:  # whatever strange bytes raise inside
            raise InputError(
                f"not a TIFF that can be read: {error}", path, "check the file"
            ) from error


def _find(path: str, file: Any, view: View, *, checked: bool) -> Found:
    # Walks the chain of pages, which may be a circle: else the look for series would not end.
    len(file.pages)
    series = file.series[0]
    _check_codec(series.keyframe.compression, path)
    axes, shape = _axes(series, path), series.shape
    count = band_count(axes, shape)
    said = _pixels(file)
    every, names = tuple(range(1, count + 1)), _names(said, count)
    bands = bands_in_use(view.bands, view.trained_bands, every, names, path)
    if checked:
        _check_dtype(str(series.dtype), path)
    levels = tuple(
        (one.shape[_axes(one, path).index("y")], one.shape[_axes(one, path).index("x")])
        for one in series.levels
    )
    blocks = [_native_block(series, path, axes, level) for level in range(len(levels))]
    notes: tuple[str, ...] = ()
    if len(file.series) > 1:
        notes = (f"{path}: holds {len(file.series)} images, and the first is read",)
    return Found(
        path=path,
        driver="tifffile",
        bands=bands,
        count=count,
        names=names,
        stored_dtype=str(series.dtype),
        levels=levels,
        nodata=(None,) * len(bands),
        validity="all",
        georeference=Georeference(mpp=_mpp(said)),
        metres=None,
        native_block=partial(_at, blocks),
        files=(path,),
        plane=chosen_plane(axes, shape, view.plane, path, required=checked),
        planes=plane_counts(axes, shape),
        notes=notes,
    )


def _at(blocks: list[tuple[int, int]], level: int) -> tuple[int, int]:
    return blocks[level]


class TiffHandle:
    """An open TIFF at one level and plane.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    """

    def __init__(self, info: RasterInfo) -> None:
        import zarr

        self._file = Path(info.path).open("rb")  # noqa: SIM115 - as long as the handle
        try:
            series = _open(info.path, self._file).series[0]
        except BaseException:
            self._file.close()
            raise
        array = zarr.open_array(series.aszarr(level=info.level), mode="r")
        self._stack = StackHandle(array, _axes(series, info.path), info.bands, info.plane)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    __del__ = close  # as GDAL's and OpenSlide's handles do, for a raster that is just let go

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window, (C, h, w)."""
        try:
            return self._stack.read(box)
        except MemoryError as error:
            if box.pixels > _MAX_CHUNK_BYTES:
                raise
            # A window is small: it is the file that claims more for a block than there can be.
            raise ValueError("a native block is said to be larger than memory") from error
