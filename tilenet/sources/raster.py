"""A raster that GDAL opens, read by windows. Nothing here loads an image whole."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

from tilenet.errors import InputError, ResourceError, TilenetError
from tilenet.geometry import Window, reflect
from tilenet.sources.header import RasterInfo, describe, environment, open_dataset
from tilenet.sources.salvage import Pixels, is_out_of_memory, salvage
from tilenet.sources.validity import invalid_values
from tilenet.strangers import exists, is_file

__all__ = ["Raster", "open_raster"]

_INDEPENDENT = {"GTiff", "JP2OpenJPEG", "HFA", "NITF", "PCIDSK", "ENVI", "EHdr", "RMF"}
"""Formats whose native blocks are decoded apart: one that is damaged leaves the others whole."""


class Raster:
    """An open raster; `read` may be called from any thread.

    Parameters
    ----------
    info : RasterInfo
        From `open_raster`.
    dataset : rasterio.io.DatasetReader, optional
        A handle that is open already, and closed by `close`.
    """

    def __init__(self, info: RasterInfo, dataset: Any = None) -> None:
        self.info = info
        # A GDAL handle belongs to one thread at a time. The last one used is lent first: its
        # decoded blocks are still in GDAL's cache, and the next window shares some with it.
        self._idle: list[Any] = [] if dataset is None else [dataset]

    def __reduce__(self) -> tuple[type[Raster], tuple[RasterInfo]]:
        return Raster, (self.info,)

    def close(self) -> None:
        """Close the handles that no thread uses; a later read opens another."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _dataset(self) -> Iterator[Any]:
        try:
            dataset = self._idle.pop()
        except IndexError:
            try:
                dataset = open_dataset(self.info.path, self.info.level)
            except Exception as error:
                raise self._trouble("cannot be opened any more", error) from error
        yield dataset
        self._idle.append(dataset)

    def read(
        self, window: Window, fill: NDArray[np.float64], damaged: list[Window] | None = None
    ) -> Pixels:
        """Read a window; what lies beyond the raster is reflected into it.

        A pixel is valid if it is finite in every band, and not nodata in at least one (GDAL's
        rule), or where alpha or the mask band is not 0. Invalid values become the band's fill.

        Parameters
        ----------
        window : Window
            At the chosen level; may reach beyond the right and lower border.
        fill : ndarray, shape (C,)
            What the network shall see at invalid values, rounded for integer pixels.
        damaged : list of Window, optional
            Takes the native blocks, cut to what is read, that cannot be decoded; their pixels
            become invalid. Without it, and in formats that are one stream (PNG, JPEG), one such
            block is an error.

        Returns
        -------
        pixels : ndarray, shape (C, height, width)
            In `info.dtype`.
        valid : ndarray, shape (height, width), bool, or None
            None where every pixel is valid.

        Raises
        ------
        InputError
            The pixels cannot be read.
        ResourceError
            For want of memory, or because the disk does not give the file.
        """
        rows = reflect(window.row, window.row_stop, self.info.height)
        cols = reflect(window.col, window.col_stop, self.info.width)
        box = Window.from_bounds(
            int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1
        )
        with environment(), self._dataset() as dataset:
            try:
                pixels, valid = self._read_around(dataset, box, fill, damaged)
            except Exception as error:  # GDAL's own classes are neither RasterioError nor OSError
                raise self._trouble(f"pixels cannot be read at {box}", error) from error
        if (box.height, box.width) != (window.height, window.width):
            index = np.ix_(rows - box.row, cols - box.col)
            pixels = np.ascontiguousarray(pixels[:, index[0], index[1]])
            valid = None if valid is None else valid[index]
        return pixels, valid

    def _trouble(self, what: str, error: Exception) -> TilenetError:
        """Return our error for one of GDAL's, which does not tell the file from the machine."""
        if is_out_of_memory(error):
            return ResourceError("out of memory", self.info.path, "use a smaller --block")
        try:
            with Path(self.info.path).open("rb") as file:
                file.read(1)
        except OSError as system:
            if system.errno not in (errno.ENOENT, errno.ENOTDIR):
                return ResourceError(
                    f"cannot be read: {system.strerror}", self.info.path, "a rerun resumes"
                )
        return InputError(f"{what}: {error}", self.info.path, "check the file")

    def _read_around(
        self, dataset: Any, box: Window, fill: NDArray[np.float64], damaged: list[Window] | None
    ) -> Pixels:
        """Read a window; where native blocks are independent, around those that fail."""
        try:
            return self._read(dataset, box, fill)
        except Exception as error:
            if damaged is None or self.info.driver not in _INDEPENDENT or is_out_of_memory(error):
                raise
        blank = _as_pixels(fill, np.dtype(self.info.dtype))
        read = partial(self._read, dataset, fill=fill)
        return salvage(read, box, self.info.native_block, blank, damaged)

    def _read(self, dataset: Any, box: Window, fill: NDArray[np.float64]) -> Pixels:
        where = ((box.row, box.row_stop), (box.col, box.col_stop))
        stored = dataset.read(self.info.bands, window=where)
        pixels = stored.astype(self.info.dtype, copy=False)
        invalid = invalid_values(stored, self.info.nodata)
        valid: NDArray[np.bool_] | None = None
        if self.info.validity == "nodata" and invalid is not None:
            valid = ~invalid.all(axis=0)
        elif self.info.validity == "alpha":
            alpha = [c is ColorInterp.alpha for c in dataset.colorinterp].index(True) + 1
            valid = dataset.read(alpha, window=where) != 0
        elif self.info.validity == "mask":
            valid = dataset.read_masks(self.info.bands[0], window=where) != 0
        if pixels.dtype.kind == "f":
            finite = np.isfinite(pixels)
            if not finite.all():
                everywhere = finite.all(axis=0)
                valid = everywhere if valid is None else valid & everywhere
                invalid = ~finite if invalid is None else invalid | ~finite
        if valid is not None and valid.all():
            valid = None
        if valid is not None:
            invalid = ~valid if invalid is None else invalid | ~valid
        if invalid is not None:
            pixels = np.where(invalid, _as_pixels(fill, pixels.dtype), pixels)
        return pixels, valid


def _as_pixels(fill: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    rounded = fill if dtype.kind == "f" else np.rint(fill)
    return rounded.astype(dtype)[:, None, None]


def open_raster(
    path: str | Path,
    bands: tuple[int, ...] | None = None,
    level: int = 0,
    *,
    checked: bool = True,
    keep_open: bool = False,
) -> Raster:
    """Open a raster and look at its header.

    Parameters
    ----------
    path : str or Path
        A local file.
    bands : tuple of int, optional
        Bands from 1, in the order the model wants them; default all but alpha.
    level : int
        Pyramid index.
    checked : bool
        Whether the pixels must be of a kind that a network can take.
    keep_open : bool
        Keep the handle for the first read.

    Raises
    ------
    InputError
        The file is missing, no raster of a known format, or of a kind of pixel that is no image.
    """
    name = str(path)
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        raise InputError("the name is not UTF-8", name, "rename the file")
    if not exists(name):
        raise InputError("no such file", name, "check the path")
    if not is_file(name):
        raise InputError("not a regular file", name, "give a raster or a folder of rasters")
    try:
        with environment(), ExitStack() as handles:
            dataset = handles.enter_context(open_dataset(name, 0))
            found = describe(str(Path(path).absolute()), dataset, bands, level, checked=checked)
            if not keep_open or level:
                return Raster(found)
            handles.pop_all()
            return Raster(found, dataset)
    except TilenetError:
        raise
    except Exception as error:  # GDAL's own classes are neither RasterioError nor OSError
        raise InputError(
            f"not a raster that can be read: {error}", name, "check the file"
        ) from error
