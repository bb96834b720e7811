"""Labels on disk: mask rasters, one mask per object, polygons; read by windows as classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from tilenet import durable
from tilenet.classes import NODATA
from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.quiet import ignoring
from tilenet.sources.gdal import DRIVERS, environment, georeference
from tilenet.training.palette import COLOUR, Palette, in_colours, to_keys

__all__ = [
    "Label",
    "MaskFile",
    "ObjectMasks",
    "colour_table",
    "mask_place",
    "mask_size",
    "merge_objects",
    "read_keys",
]


class Label(Protocol):
    """Where the truth of one image comes from."""

    @property
    def path(self) -> str:
        """The file, for messages."""

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Read a window that lies within the image.

        Returns
        -------
        classes : ndarray, shape (h, w), uint8
            255 = ignore.
        objects : ndarray, shape (h, w), int32
            Numbers of separate objects, 0 elsewhere; all 0 if the label does not separate them.
        """


def _open_mask(path: str, page: int) -> Any:
    with ignoring(NotGeoreferencedWarning):
        name = str(Path(path).absolute())
        if page:
            return rasterio.open(f"GTIFF_DIR:{page}:{name}", driver="GTiff")
        return rasterio.io.DatasetReader(rasterio._path._UnparsedPath(name), driver=list(DRIVERS))


def mask_size(path: str, page: int = 0) -> tuple[int, int]:
    """Return a mask's height and width.

    Raises
    ------
    InputError
        It does not open.
    """
    if not Path(path).is_file():
        raise InputError("no such mask", path, "correct the name")
    try:
        with environment(), _open_mask(path, page) as dataset:
            return dataset.height, dataset.width
    except RasterioError as error:
        raise InputError(f"the mask does not read: {error}", path, "check the file") from error


def mask_place(path: str) -> Georeference:
    """Return where a mask lies on a map, as far as it says.

    Raises
    ------
    InputError
        It does not open, or its place is no place.
    """
    try:
        with environment(), _open_mask(path, 0) as dataset:
            return georeference(path, dataset)
    except RasterioError as error:
        raise InputError(f"the mask does not read: {error}", path, "check the file") from error


def colour_table(path: str, page: int) -> NDArray[np.int64] | None:
    """Return the key of every index's colour, (n,); None where values are no indices.

    Raises
    ------
    InputError
        The mask does not open.
    """
    try:
        with environment(), _open_mask(path, page) as dataset:
            if dataset.colorinterp[0] is not ColorInterp.palette:
                return None
            colours = dataset.colormap(1)
            table = np.zeros((max(colours) + 1, 3), np.uint8)
            for index, colour in colours.items():
                table[index] = colour[:3]
            keys: NDArray[np.int64] = to_keys(table.T[:, None])[0]
            return keys
    except RasterioError as error:
        raise InputError(f"the mask does not read: {error}", path, "check the file") from error


def read_keys(path: str, page: int, window: Window | None) -> NDArray[np.int64]:
    """Read mask values as keys (see `tilenet.training.palette.to_keys`), (h, w).

    Indices into a colour table are read as they are.

    Parameters
    ----------
    path : str
        File.
    page : int
        Of a stack from 1; 0 is the file itself.
    window : Window or None
        None is the whole file.

    Raises
    ------
    InputError
        The file does not read, or its pixels are no whole numbers.
    """
    try:
        with environment(), _open_mask(path, page) as dataset:
            where = None if window is None else (
                (window.row, window.row_stop), (window.col, window.col_stop)
            )  # fmt: skip
            bands = [b for b, c in enumerate(dataset.colorinterp, 1) if c is not ColorInterp.alpha][
                :3
            ]
            pixels = dataset.read(bands, window=where)
            nodata = dataset.nodata
    except (RasterioError, MemoryError) as error:
        raise InputError(f"the mask does not read: {error}", path, "check the file") from error
    if pixels.dtype.kind == "c" or (
        pixels.dtype.kind == "f" and not np.array_equal(pixels, np.rint(pixels), equal_nan=True)
    ):
        raise InputError(f"mask values are {pixels.dtype}", path, "store whole numbers")
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels, nan=NODATA)
    keys = to_keys(pixels)
    # Background is often marked as nodata 0, which is an answer all the same.
    if nodata is not None and nodata != 0 and np.isfinite(nodata) and len(pixels) < 3:
        keys[keys == int(nodata)] = NODATA
    return keys


@dataclass(frozen=True)
class MaskFile:
    """A mask raster of the image's size.

    Parameters
    ----------
    path : str
        File.
    page : int
        Page of a stack from 1; 0 is the file itself.
    palette : Palette or None
        Set once it is known.
    table : tuple of int, optional
        The keys that stand for its values, where these are indices of colours.
    """

    path: str
    page: int = 0
    palette: Palette | None = None
    table: tuple[int, ...] | None = None

    def with_palette(self, palette: Palette, table: NDArray[np.int64] | None = None) -> MaskFile:
        """Return the label with its palette, and the colours of its indices if they count."""
        colours = None if table is None else tuple(table.tolist())
        return replace(self, palette=palette, table=colours)

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Read a window (see `Label.read`)."""
        assert self.palette is not None
        keys = read_keys(self.path, self.page, window)
        if self.table is not None:
            keys = in_colours(keys, np.array(self.table))
        objects = np.zeros(keys.shape, np.int32)
        if self.palette.objects:
            objects = np.where(keys < COLOUR, keys, 0).astype(np.int32)
        return self.palette.apply(keys), objects


@dataclass(frozen=True)
class ObjectMasks:
    """One mask file per object, all of the image's size: above half is the object.

    Parameters
    ----------
    paths : tuple of str
        The files, in order.
    folder : str
        Where they lie, for messages.
    """

    paths: tuple[str, ...]
    folder: str

    @property
    def path(self) -> str:
        """The folder, for messages."""
        return self.folder

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Read a window (see `Label.read`) that is the whole image.

        Raises
        ------
        InputError
            A mask does not read, or has another size.
        """
        objects = np.zeros((window.height, window.width), np.int32)
        for number, path in enumerate(self.paths, 1):
            keys = read_keys(path, 0, None)
            if keys.shape != objects.shape:
                raise InputError(
                    f"sizes differ: image {window.height}×{window.width}, "
                    f"mask {keys.shape[0]}×{keys.shape[1]}", path,
                )  # fmt: skip
            top = int(keys.max(initial=0))
            objects[keys > (127 if top > 1 else 0)] = number
        return (objects > 0).astype(np.uint8), objects


def merge_objects(label: ObjectMasks, height: int, width: int, target: Path) -> MaskFile:
    """Merge one-object masks into one raster of object numbers; opening hundreds is slow.

    Parameters
    ----------
    label : ObjectMasks
        The files, checked.
    height, width : int
        The image's size.
    target : Path
        GeoTIFF to write.
    """
    profile = {
        "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "int32",
        "compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256,
    }  # fmt: skip
    objects = label.read(Window(0, 0, height, width))[1]
    temp = durable.temporary(target)  # several processes may each make it
    with ignoring(NotGeoreferencedWarning), rasterio.open(temp, "w", **profile) as dataset:
        dataset.write(objects, 1)
    temp.replace(target)
    return MaskFile(str(target))
