"""A mask at any resolution that says which pixels of an image count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from tilenet.errors import InputError
from tilenet.geometry import Affine6, Window
from tilenet.sources.packing import pack, unpack
from tilenet.sources.places import brought, crs_of, near, turn_of, unplaced
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.strangers import exists

__all__ = ["BitMask", "Cover", "Ground", "MaskFile", "cover_of"]

Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

_PAGE = 512
_MOST_READ = 1 << 24  # pixels of a mask at a time
_EDGE = 2.0**-20  # of a pixel of the mask: centres upon an edge fall to one side, all of them
_KNOT = 32  # pixels between the points that are warped exactly; between them, a straight line


@dataclass(frozen=True, slots=True)
class BitMask:
    """A small mask, kept whole.

    Parameters
    ----------
    height, width : int
        Pixels.
    packed : str
        Their bits, row by row, by `pack`.
    sha256 : str
        Of size and bits.
    """

    height: int
    width: int
    packed: str
    sha256: str

    @classmethod
    def of(cls, mask: Bool) -> BitMask:
        """Return a mask, (h, w), packed."""
        height, width = mask.shape
        content = np.packbits(mask).tobytes()
        digest = hashlib.sha256(f"{height} {width}\0".encode() + content)
        return cls(height, width, pack(content), digest.hexdigest())

    def read(self, window: Window) -> Bool:
        """Return a window, (h, w)."""
        return _bits(self)[window.slices()]

    def check(self) -> None:
        """Do nothing: what is kept whole cannot change."""


@lru_cache(maxsize=8)
def _bits(mask: BitMask) -> Bool:
    bits = np.frombuffer(unpack(mask.packed), np.uint8)
    pixels = np.unpackbits(bits, count=mask.height * mask.width)
    return pixels.reshape(mask.height, mask.width).view(bool)


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A mask in a file, read by windows.

    Parameters
    ----------
    info : RasterInfo
        The file; a pixel counts if it is valid and not 0 in some band.
    """

    info: RasterInfo

    @property
    def height(self) -> int:
        """Rows."""
        return self.info.height

    @property
    def width(self) -> int:
        """Columns."""
        return self.info.width

    @property
    def sha256(self) -> str:
        """The file's fingerprint."""
        return self.info.fingerprint

    def read(self, window: Window) -> Bool:
        """Return a window, (h, w); raises InputError if the file does not read."""
        from tilenet.sources.opening import open_handle

        nothing = np.zeros(len(self.info.bands))
        with closing(Raster(self.info, open_handle)) as raster:
            pixels, valid = raster.read(window, nothing)
        kept: Bool = (pixels != 0).any(axis=0)
        return kept if valid is None else kept & valid

    def check(self) -> None:
        """Raise InputError if the file is gone or has changed."""
        from tilenet.sources.opening import open_raster

        if not exists(self.info.path):
            raise InputError("the mask of --within is not where it was", self.info.path)
        now = open_raster(self.info.path, self.info.view, checked=False).info
        if now.fingerprint != self.info.fingerprint:
            raise InputError("the mask of --within was changed since", self.info.path)


@dataclass(frozen=True, slots=True)
class Ground:
    """Where image and mask lie on the ground.

    Parameters
    ----------
    image, mask : tuple of 6 float
        Affines (a, b, c, d, e, f) from (col, row) to (x, y).
    image_crs, mask_crs : str
        The same text if it is one CRS.
    """

    image: Affine6
    mask: Affine6
    image_crs: str
    mask_crs: str

    def page(self, page: Window, size: tuple[int, int]) -> tuple[Index, Index]:
        """Return row and column in a mask of `size` under every pixel of a page, (h, w) each."""
        ends = (page.height + _KNOT, page.width + _KNOT)
        row, col = (np.arange(0, end, _KNOT, dtype=float) for end in ends)
        cols, rows = np.meshgrid(page.col + 0.5 + col, page.row + 0.5 + row)
        x, y = _apply(self.image, cols, rows)
        if self.image_crs != self.mask_crs:
            moved = brought(crs_of(self.image_crs), crs_of(self.mask_crs), x.ravel(), y.ravel())
            x, y = (one.reshape(x.shape) for one in moved)
        shape, turn = (page.height, page.width), turn_of(self.mask_crs)
        x, y = _between(x, shape, turn), _between(y, shape)
        if turn is not None:  # a longitude lies on the mask if it does any number of turns away
            a, b, c, *_ = self.mask
            # Where the mask goes once around, its two edges are one: the first column's.
            x = near(x, c + a * (size[1] / 2 - _EDGE) + b * size[0] / 2, turn)
        mask_cols, mask_rows = _apply(_inverse(self.mask), x, y)
        return _whole(mask_rows), _whole(mask_cols)


def _apply(
    affine: Affine6, cols: NDArray[np.float64], rows: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b, c, d, e, f = affine
    return a * cols + b * rows + c, d * cols + e * rows + f


def _inverse(affine: Affine6) -> Affine6:
    a, b, c, d, e, f = affine
    size = a * e - b * d
    return (e / size, -b / size, (b * f - c * e) / size,
            -d / size, a / size, (c * d - a * f) / size)  # fmt: skip


def _between(
    knots: NDArray[np.float64], shape: tuple[int, int], turn: float | None = None
) -> NDArray[np.float64]:
    """Return at every pixel what is known at knots; longitudes go from one to the next nearby."""

    def steps(axis: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.diff(values, axis=axis)
        return found if turn is None else near(found, 0.0, turn)

    share = np.arange(_KNOT) / _KNOT
    down = knots[:-1, None] + share[:, None] * steps(0, knots)[:, None]
    down = down.reshape(-1, knots.shape[1])
    full = down[:, :-1, None] + share * steps(1, down)[:, :, None]
    return full.reshape(len(down), -1)[: shape[0], : shape[1]]


def _whole(places: NDArray[np.float64]) -> Index:
    """Return the pixels that places lie in; −1 where they are not finite."""
    found = np.floor(places + _EDGE)
    known = np.isfinite(found) & (np.abs(found) < 2**31)
    return np.where(known, found, -1).astype(np.intp)


@dataclass(frozen=True, slots=True)
class Cover:
    """A mask over an image.

    The mask's pixel under a pixel's centre says whether that is kept, whatever window is asked for.

    Parameters
    ----------
    mask : BitMask or MaskFile
        The mask.
    height, width : int
        Pixels of the image.
    ground : Ground or None
        None: mask and image have the same corners.
    """

    mask: BitMask | MaskFile
    height: int
    width: int
    ground: Ground | None = None

    def kept(self, window: Window) -> Bool:
        """Return which pixels of a window are kept, (h, w)."""
        if self.ground is None:
            return self._within_corners(window)
        kept = np.empty((window.height, window.width), bool)
        for row in range(window.row // _PAGE * _PAGE, window.row_stop, _PAGE):
            for col in range(window.col // _PAGE * _PAGE, window.col_stop, _PAGE):
                page = Window(row, col, _PAGE, _PAGE)
                part = page.intersection(window)
                rows, cols = self.ground.page(page, (self.mask.height, self.mask.width))
                here = part.slices(page.row, page.col)
                kept[part.slices(window.row, window.col)] = self._at(rows[here], cols[here])
        return kept

    def _within_corners(self, window: Window) -> Bool:
        rows = (2 * np.arange(window.row, window.row_stop) + 1) * self.mask.height
        cols = (2 * np.arange(window.col, window.col_stop) + 1) * self.mask.width
        rows, cols = rows // (2 * self.height), cols // (2 * self.width)
        kept = np.empty((window.height, window.width), bool)
        # A fine mask under a coarse image is large.
        line = (int(cols[-1]) + 1 - int(cols[0])) * -(-self.mask.height // self.height)
        step = max(1, min(_PAGE, _MOST_READ // line))
        for top in range(0, window.height, step):
            some = rows[top : top + step]
            read = Window.from_bounds(
                int(some[0]), int(cols[0]), int(some[-1]) + 1, int(cols[-1]) + 1
            )
            found = self.mask.read(read)
            kept[top : top + step] = found[:, cols - read.col][some - read.row]
        return kept

    def _at(self, rows: Index, cols: Index) -> Bool:
        """Return the mask at places, of which some may lie beside it."""
        on = (rows >= 0) & (rows < self.mask.height) & (cols >= 0) & (cols < self.mask.width)
        if not on.any():
            return on
        inner_rows, inner_cols = rows[on], cols[on]
        read = Window.from_bounds(
            int(inner_rows.min()), int(inner_cols.min()),
            int(inner_rows.max()) + 1, int(inner_cols.max()) + 1,
        )  # fmt: skip
        if read.pixels > _MOST_READ and on.size > 1:
            axis = int(on.shape[1] > on.shape[0])
            halves = zip(*(np.array_split(one, 2, axis) for one in (rows, cols)), strict=True)
            return np.concatenate([self._at(*half) for half in halves], axis)
        on[on] = self.mask.read(read)[inner_rows - read.row, inner_cols - read.col]
        return on


def cover_of(info: RasterInfo, open_mask: Callable[[], Raster]) -> Cover:
    """Return a mask in a file as a cover of a raster.

    Parameters
    ----------
    info : RasterInfo
        The raster.
    open_mask : callable
        Opens the mask.

    Raises
    ------
    InputError
        The mask does not read, or only one of the two has a CRS.
    """
    with closing(open_mask()) as raster:
        found = raster.info
    mask = MaskFile(found)
    image, place = info.georeference, found.georeference
    if image.crs_wkt is None and place.crs_wkt is None:
        return Cover(mask, info.height, info.width)
    for one, path in ((image, info.path), (place, found.path)):
        if (one.gcps or one.rpcs) and None in (one.crs_wkt, one.transform):
            raise unplaced(one, path, "raster and mask of --within have no common place", "")
    if None in (image.crs_wkt, place.crs_wkt, image.transform, place.transform):
        raise InputError(
            "the mask of --within has a CRS and a transform, and the raster has not, or the other "
            "way round", found.path, "give both, or neither",
        )  # fmt: skip
    assert image.crs_wkt is not None
    assert place.crs_wkt is not None
    assert image.transform is not None
    assert place.transform is not None
    same = CRS.from_wkt(image.crs_wkt) == CRS.from_wkt(place.crs_wkt)
    mask_crs = image.crs_wkt if same else place.crs_wkt
    ground = Ground(image.transform, place.transform, image.crs_wkt, mask_crs)
    return Cover(mask, info.height, info.width, ground)
