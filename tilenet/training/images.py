"""Training images on disk: a file or one page of it, read by windows.

Formats without tiles of their own (PNG, JPEG, GIF) decode whole however little is asked for, so
small images stay decoded in a bounded cache; large rasters are only ever read by windows.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window, reflect
from tilenet.quiet import ignoring
from tilenet.sources import Raster, View, open_raster
from tilenet.sources.gdal import environment

__all__ = ["ImageCache", "ImageRef", "OpenImage", "open_image", "page_count"]

_SMALL_PIXELS = 1 << 22
_CACHE_BYTES = 256 << 20
_MAX_OPEN = 64
_WEB_MERCATOR_HALF = 20037508.342789244
_SLIPPY = re.compile(r"(?:^|\D)(\d+)[-_](\d+)[-_](\d+)$")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Which pixels an image is.

    Parameters
    ----------
    path : str
        File.
    page : int
        Page of a multi-page TIFF from 1; 0 is the file itself.
    bands : tuple of int or None
        Bands from 1; None takes all but alpha.
    scaling : {"apply", "stored"} or None
        As for predict.
    """

    path: str
    page: int = 0
    bands: tuple[int, ...] | None = None
    scaling: Literal["apply", "stored"] | None = None


def _open_page(ref: ImageRef) -> Any:
    with ignoring(NotGeoreferencedWarning):
        return rasterio.open(f"GTIFF_DIR:{ref.page}:{Path(ref.path).absolute()}", driver="GTiff")


def page_count(path: Path) -> int:
    """Return how many pages of the first page's size a TIFF has; 1 for anything else."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return 1
    try:
        with ignoring(NotGeoreferencedWarning), rasterio.open(path, driver="GTiff") as dataset:
            # GDAL lists pages as subdatasets, and only where there are several.
            return max(1, len(dataset.subdatasets))
    except RasterioError:
        return 1


def _slippy(path: str, width: int) -> Georeference:
    """Return the place that a slippy-map tile's name gives: …x-y-zoom."""
    match = _SLIPPY.search(Path(path).stem)
    if match is None:
        return Georeference()
    x, y, zoom = (int(text) for text in match.groups())
    if not 8 <= zoom <= 26 or max(x, y) >= 1 << zoom:
        return Georeference()
    side = 2 * _WEB_MERCATOR_HALF / (1 << zoom)
    corner = (x * side - _WEB_MERCATOR_HALF, _WEB_MERCATOR_HALF - y * side)
    step = side / width
    return Georeference("EPSG:3857", (step, 0.0, corner[0], 0.0, -step, corner[1]))


class OpenImage:
    """An open image: a raster, or a page of a stack.

    Parameters
    ----------
    ref : ImageRef
        Which.

    Raises
    ------
    InputError
        It does not open, or is not of a kind of pixel that is an image.
    """

    def __init__(self, ref: ImageRef) -> None:
        self.ref = ref
        self._raster: Raster | None = None
        self._page: Any = None
        if ref.page:
            try:
                self._page = _open_page(ref)
            except RasterioError as error:
                raise InputError(f"page {ref.page} does not read: {error}", ref.path) from error
            self.height, self.width = int(self._page.height), int(self._page.width)
            self._bands = ref.bands or tuple(range(1, self._page.count + 1))
            if max(self._bands) > self._page.count:
                raise InputError(
                    f"no band {max(self._bands)}", ref.path, f"the file has {self._page.count}"
                )
            self.dtype = str(self._page.dtypes[0])
            self.georeference = Georeference()
        else:
            self._raster = open_raster(ref.path, View(bands=ref.bands, scaling=ref.scaling))
            info = self._raster.info
            self.height, self.width, self.dtype = info.height, info.width, info.dtype
            self._bands = info.bands
            self.georeference = info.georeference

    @property
    def bands(self) -> int:
        """Number of bands."""
        return len(self._bands)

    @property
    def placed(self) -> Georeference:
        """The georeference, or that of a slippy-map tile by its name."""
        if self.georeference.is_georeferenced:
            return self.georeference
        return _slippy(self.ref.path, self.width)

    def read(
        self, window: Window, fill: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a window; what lies beyond the image is reflected into it.

        Parameters
        ----------
        window : Window
            At full resolution.
        fill : ndarray, shape (C,), or None
            What stands for invalid values; None is 0.

        Returns
        -------
        pixels : ndarray, shape (C, height, width)
            In `dtype`.
        valid : ndarray, shape (height, width), bool, or None
            None where every pixel is valid.

        Raises
        ------
        InputError
            The pixels cannot be read.
        """
        if self._raster is not None:
            return self._raster.read(window, np.zeros(self.bands) if fill is None else fill)
        rows = reflect(window.row, window.row_stop, self.height)
        cols = reflect(window.col, window.col_stop, self.width)
        box = ((int(rows.min()), int(rows.max()) + 1), (int(cols.min()), int(cols.max()) + 1))
        try:
            pixels = self._page.read(self._bands, window=box)
        except RasterioError as error:
            raise InputError(
                f"page {self.ref.page} cannot be read: {error}", self.ref.path, "check the file"
            ) from error
        index = np.ix_(rows - box[0][0], cols - box[1][0])
        return pixels[:, index[0], index[1]], None

    def close(self) -> None:
        """Close its handles."""
        if self._page is not None:
            self._page.close()
        if self._raster is not None:
            self._raster.close()


def open_image(ref: ImageRef) -> OpenImage:
    """Open an image (see `OpenImage`)."""
    with environment():
        return OpenImage(ref)


class ImageCache:
    """Images that stay open, and small ones that stay decoded, least recently used go first.

    One per process: what is open does not travel with a pickle.

    Parameters
    ----------
    fill : ndarray, shape (C,)
        What stands for invalid values.
    """

    def __init__(self, fill: NDArray[np.float64]) -> None:
        self._fill = fill
        self._open: OrderedDict[ImageRef, OpenImage] = OrderedDict()
        self._decoded: OrderedDict[ImageRef, tuple[NDArray[Any], NDArray[np.bool_] | None]] = (
            OrderedDict()
        )
        self._bytes = 0

    def __reduce__(self) -> tuple[type[ImageCache], tuple[NDArray[np.float64]]]:
        return ImageCache, (self._fill,)

    def get(self, ref: ImageRef) -> OpenImage:
        """Return the open image."""
        if ref in self._open:
            self._open.move_to_end(ref)
            return self._open[ref]
        image = self._open[ref] = open_image(ref)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return image

    def read(self, ref: ImageRef, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a window as `OpenImage.read` does."""
        if ref not in self._decoded:
            image = self.get(ref)
            if image.height * image.width > _SMALL_PIXELS:
                with environment():
                    return image.read(window, self._fill)
            self._keep(ref, image)
        self._decoded.move_to_end(ref)
        pixels, valid = self._decoded[ref]
        rows = reflect(window.row, window.row_stop, pixels.shape[1])
        cols = reflect(window.col, window.col_stop, pixels.shape[2])
        index = np.ix_(rows, cols)
        return pixels[:, index[0], index[1]], None if valid is None else valid[index]

    def _keep(self, ref: ImageRef, image: OpenImage) -> None:
        with environment():
            both = image.read(Window(0, 0, image.height, image.width), self._fill)
        self._decoded[ref] = both
        self._bytes += sum(0 if part is None else part.nbytes for part in both)
        while self._bytes > _CACHE_BYTES and len(self._decoded) > 1:
            _, gone = self._decoded.popitem(last=False)
            self._bytes -= sum(0 if part is None else part.nbytes for part in gone)
