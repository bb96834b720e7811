"""An open raster, read by windows. Nothing here loads an image whole."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError, ResourceError, TilenetError
from tilenet.geometry import Window, reflect
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.sources.remote import is_remote
from tilenet.sources.resample import resample, source_window, target_window
from tilenet.sources.salvage import Pixels, is_blameless, is_out_of_memory, salvage
from tilenet.sources.validity import judged
from tilenet.sources.warp import needed, sources, touched, warp

__all__ = ["Handle", "Raster"]

_INDEPENDENT = {
    "GTiff", "JP2OpenJPEG", "HFA", "NITF", "PCIDSK", "ENVI", "EHdr", "RMF", "openslide",
    "tifffile", "zarr", "mosaic", "stac",
}  # fmt: skip
"""Formats whose native blocks are decoded apart: one that is damaged leaves the others whole."""

_COMPOSED = {"mosaic", "stac"}
"""Made of rasters, which know for themselves what of them is valid."""

_STRIPE_BYTES = 32 << 20
"""Of stored pixels that are resampled at a time."""
_WARPED_PIXELS, _FEW_PIXELS = 1 << 20, 1 << 10
"""Of a grid of another place, at a time: at most, and too few to be worth halving."""


class Handle(Protocol):
    """An open file, in the hands of one thread at a time."""

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window of the level, (C, h, w) as stored, and what is valid by alpha or mask."""

    def close(self) -> None:
        """Close the file."""


class Area(Protocol):
    """What of a grid matters: `tilenet.sources.area.Area`."""

    def kept(self, window: Window) -> NDArray[np.bool_]:
        """Return which pixels of a window are kept, (h, w)."""


class Composed(Handle, Protocol):
    """Open files that are seen as one."""

    def composed(self, box: Window, fill: NDArray[np.float64]) -> Pixels:
        """Return a window in the dtype that is handed out, its invalid values filled."""


class Raster:
    """An open raster; `read` may be called from any thread.

    Parameters
    ----------
    info : RasterInfo
        From `open_raster`.
    open_handle : callable
        Opens the file: a function that can be pickled, of `info`.
    handle : Handle, optional
        One that is open already, and closed by `close`.
    area : Area, optional
        Outside it no pixel is valid, and where all of a window is outside the file is left alone.
    """

    def __init__(
        self,
        info: RasterInfo,
        open_handle: Callable[[RasterInfo], Handle],
        handle: Handle | None = None,
        area: Area | None = None,
    ) -> None:
        self.info = info
        self.area = area
        self._open = open_handle
        # A handle belongs to one thread at a time. The last one used is lent first: its decoded
        # blocks are still in its cache, and the next window shares some with it.
        self._idle = [] if handle is None else [handle]

    def __reduce__(self) -> tuple[Any, ...]:
        return Raster, (self.info, self._open, None, self.area)

    def close(self) -> None:
        """Close the handles that no thread uses; a later read opens another."""
        while self._idle:
            self._idle.pop().close()

    @property
    def _by_gdal_from_afar(self) -> bool:
        """Whether an error may be the network's: GDAL does not say, the reader of Zarr does."""
        return is_remote(self.info.path) and self.info.driver != "zarr"

    @contextmanager
    def _handle(self) -> Iterator[Handle]:
        try:
            handle = self._idle.pop()
        except IndexError:
            try:
                handle = self._open(self.info)
            except TilenetError:
                raise
            except Exception as error:
                raise self._trouble("cannot be opened any more", error) from error
        yield handle
        self._idle.append(handle)

    def read(
        self, window: Window, fill: NDArray[np.float64], damaged: list[Window] | None = None
    ) -> Pixels:
        """Read a window; what lies beyond the raster is reflected into it.

        A pixel is valid if it is finite in every band, not nodata in at least one (GDAL's rule),
        and not transparent. Where there is a mask band, that alone says it, not alpha or nodata.
        All bands of a pixel that is not valid become the fill, and values that are not finite. So
        does a band's nodata in a valid pixel, unless pixels are bytes: there it may be a colour,
        but in wider types a number (−9999) that would reach far in the network.
        Those outside the area are handed out as they are, but as not valid: the network sees them.
        Where all of them are outside, nothing is read.

        Parameters
        ----------
        window : Window
            Of the grid; may reach beyond the right and lower border.
        fill : ndarray, shape (C,)
            What the network shall see at invalid values, rounded for integer pixels.
        damaged : list of Window, optional
            Takes the native blocks, cut to what is read, that cannot be decoded; their pixels
            become invalid. Without it, and in formats that are one stream (PNG, JPEG), one such
            block is an error. Those outside the area do not count.

        Returns
        -------
        pixels : ndarray, shape (C, height, width)
            In `info.dtype`.
        valid : ndarray, shape (height, width), bool, or None
            None where every pixel is valid and inside the area: kept.

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
        kept = None if self.area is None else self.area.kept(box)
        if kept is not None and not kept.any():
            shape = (window.height, window.width)
            return np.zeros((len(fill), *shape), self.info.dtype), np.zeros(shape, bool)
        with self._handle() as handle:
            try:
                pixels, valid = self._read_place(handle, box, fill, damaged)
            except TilenetError:
                raise
            except Exception as error:  # GDAL's own classes are neither RasterioError nor OSError
                raise self._trouble(f"pixels cannot be read at {box}", error) from error
        if self.area is not None and kept is not None and not kept.all():
            valid = kept if valid is None else kept & valid
            if damaged:
                damaged[:] = [one for one in damaged if self.area.kept(one).any()]
        if box != window:
            index = np.ix_(rows - box.row, cols - box.col)
            pixels = np.ascontiguousarray(pixels[:, index[0], index[1]])
            valid = None if valid is None else valid[index]
        return pixels, valid

    def _trouble(self, what: str, error: Exception) -> TilenetError:
        """Return our error for one of GDAL's, which does not tell the file from the machine."""
        if is_out_of_memory(error):
            return ResourceError("out of memory", self.info.path, "use a smaller --block")
        if self._by_gdal_from_afar:
            return ResourceError(f"{what}: {error}", self.info.path, "a rerun resumes")
        try:
            with Path(self.info.path).open("rb") as file:
                file.read(1)
        except OSError as system:
            if system.errno not in (errno.ENOENT, errno.ENOTDIR):
                return ResourceError(
                    f"cannot be read: {system.strerror}", self.info.path, "a rerun resumes"
                )
        return InputError(f"{what}: {error}", self.info.path, "check the file")

    def _read_place(
        self, handle: Handle, box: Window, fill: NDArray[np.float64], damaged: list[Window] | None
    ) -> Pixels:
        """Read a window, brought to another place if the grid is not the raster's own."""
        to = self.info.warp
        if to is None:
            return self._read_grid(handle, box, fill, damaged)
        blank = _as_pixels(fill, np.dtype(self.info.dtype))
        pixels = np.broadcast_to(blank, (len(blank), box.height, box.width)).copy()
        valid = np.zeros((box.height, box.width), bool)
        parts = [box.intersection(to.reach)]
        while parts:
            part = parts.pop()
            if not part.pixels:
                continue
            if part.pixels > _WARPED_PIXELS:
                parts += part.halves()
                continue
            places = sources(part, to)
            source = needed(*places, to.size)
            large = source.pixels * self.info.pixel_bytes > _STRIPE_BYTES
            if large and part.pixels > _FEW_PIXELS:
                parts += part.halves()
            elif source.pixels:
                hurt = None if damaged is None else list[Window]()
                values, kept = self._read_grid(handle, source, fill, hurt)
                where = part.slices(box.row, box.col)
                made = warp(values, kept, source, places, to.size, blank)
                pixels[(slice(None), *where)], valid[where] = made
                if damaged is not None and hurt is not None:
                    damaged += [touched(one, part, places) for one in hurt]
        return pixels, None if valid.all() else valid

    def _read_grid(
        self, handle: Handle, box: Window, fill: NDArray[np.float64], damaged: list[Window] | None
    ) -> Pixels:
        """Read a window of the grid, resampled if the grid is none of the file's levels."""
        grid = self.info.resampling
        if grid is None:
            return self._read_around(handle, box, fill, damaged)
        to = self.info.warp
        size = (self.info.height, self.info.width) if to is None else to.size
        blank = _as_pixels(fill, np.dtype(self.info.dtype))
        pixels = np.empty((len(self.info.bands), box.height, box.width), self.info.dtype)
        valid = np.ones((box.height, box.width), bool)
        line = self.info.pixel_bytes * source_window(box, grid).width * max(1.0, grid.step[0])
        rows = max(16, int(_STRIPE_BYTES / line))
        for row in range(box.row, box.row_stop, rows):
            stripe = Window(row, box.col, rows, box.width).intersection(box)
            source, hurt = source_window(stripe, grid), None if damaged is None else list[Window]()
            values, kept = self._read_around(handle, source, fill, hurt)
            values, kept = resample(values, kept, source, stripe, grid, blank)
            if damaged is not None and hurt is not None:
                damaged += [target_window(one, grid, size).intersection(stripe) for one in hurt]
            where = stripe.slices(box.row, box.col)
            pixels[(slice(None), *where)] = values
            valid[where] = True if kept is None else kept
        return pixels, None if valid.all() else valid

    def _read_around(
        self, handle: Handle, box: Window, fill: NDArray[np.float64], damaged: list[Window] | None
    ) -> Pixels:
        """Read a window; where native blocks are independent, around those that fail."""
        try:
            return self._read(handle, box, fill)
        except Exception as error:
            if damaged is None or self.info.driver not in _INDEPENDENT or is_blameless(error):
                raise
            if self._by_gdal_from_afar:
                raise  # what a network does not give is not lost
        blank = _as_pixels(fill, np.dtype(self.info.dtype))
        read = partial(self._read, handle, fill=fill)
        return salvage(read, box, self.info.native_block, blank, damaged)

    def _meant(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return stored numbers, (C, h, w), as what they mean, in the dtype that is handed out."""
        scaling = self.info.scaling
        if scaling is None:
            with np.errstate(over="ignore"):  # a nodata value of float64 is infinite in float32
                return stored.astype(self.info.dtype, copy=False)
        pixels = np.empty(stored.shape, self.info.dtype)
        for band, (scale, offset) in enumerate(scaling):
            pixels[band] = stored[band].astype(np.float64) * scale + offset
        return pixels

    def _read(self, handle: Handle, box: Window, fill: NDArray[np.float64]) -> Pixels:
        if self.info.driver in _COMPOSED:
            return cast("Composed", handle).composed(box, fill)
        stored, valid = handle.read(box)
        pixels = self._meant(stored)
        invalid, valid = judged(stored, self.info.nodata, self.info.validity, valid)
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
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        fill = np.rint(fill).clip(limits.min, limits.max)
    return fill.astype(dtype)[:, None, None]
