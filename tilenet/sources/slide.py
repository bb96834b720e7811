"""Whole-slide images, by OpenSlide (extra `slides`). The only importer of openslide."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError, UsageError
from tilenet.geometry import Georeference, Window
from tilenet.sources.bands import bands_in_use
from tilenet.sources.rasterinfo import Found, RasterInfo
from tilenet.sources.view import View

__all__ = ["SlideHandle", "detects", "find", "is_slide"]

_BANDS = (1, 2, 3)
_PAGE = 1024
_DEFAULT_TILE = 256
_ENDINGS = {".mrxs", ".vms", ".vmu"}
"""Slides whose first file is a picture or a text like many others: OpenSlide goes by the ending."""


def _openslide(path: str) -> Any:
    try:
        import openslide
    except ImportError as error:
        raise UsageError(
            "slides need the extra slides", path, "pip install 'tilenet[slides]'"
        ) from error
    return openslide


def is_slide(path: str, head: bytes) -> bool:
    """Return whether a file's first bytes, or its ending, are those of a slide that is no TIFF."""
    dicom, zeiss, zvi = b"DICM", b"ZISRAWFILE", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    return (
        head[128:132] == dicom
        or head.startswith((zeiss, zvi))
        or Path(path).suffix.lower() in _ENDINGS
    )


def detects(path: str) -> bool:
    """Return whether OpenSlide, if it is installed, knows a TIFF for one of its vendors'."""
    try:
        import openslide
    except ImportError:
        return False
    return openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff")


def _open(path: str) -> Any:
    openslide = _openslide(path)
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise InputError(f"not a slide that can be read: {error}", path, "check the file") \
            from error  # fmt: skip


def _mpp(properties: Any) -> tuple[float, float] | None:
    try:
        y, x = (float(properties[f"openslide.mpp-{axis}"]) for axis in "yx")
    except (KeyError, ValueError):
        return None
    return (y, x) if 0 < y < np.inf and 0 < x < np.inf else None


def _files(path: str) -> tuple[str, ...]:
    """Return the files of a slide: some formats keep the pixels beside the file that is named."""
    folder, file = Path(path).with_suffix(""), Path(path)
    beside = list[Path]()
    if file.suffix.lower() in _ENDINGS and folder.is_dir():
        beside = [one for one in folder.rglob("*") if one.is_file()]
    elif file.suffix.lower() in (".dcm", ".dicom"):
        beside = [one for one in file.parent.glob(f"*{file.suffix}") if one != file]
    return (path, *sorted(map(str, beside)))


def _native_block(properties: dict[str, str], level: int) -> tuple[int, int]:
    height, width = (
        int(properties.get(f"openslide.level[{level}].tile-{side}", _DEFAULT_TILE))
        for side in ("height", "width")
    )
    return height, width


def find(path: str, view: View, *, checked: bool = True) -> Found:
    """Return what a slide says of itself.

    Raises
    ------
    InputError
        OpenSlide does not read it, or it has no such band or plane.
    UsageError
        The extra is not installed.
    """
    del checked  # pixels of a slide are always of one kind
    if view.plane:
        raise InputError("a slide has no planes to choose from", path, "leave --plane out")
    names = ("red", "green", "blue")
    bands = bands_in_use(view.bands, view.trained_bands, _BANDS, names, path)
    with _open(path) as slide:
        properties = dict(slide.properties)
        return Found(
            path=path,
            driver="openslide",
            bands=bands,
            count=len(_BANDS),
            names=names,
            stored_dtype="uint8",
            levels=tuple((height, width) for width, height in slide.level_dimensions),
            nodata=(None,) * len(bands),
            validity="alpha",
            georeference=Georeference(mpp=_mpp(properties)),
            metres=None,
            native_block=partial(_native_block, properties),
            files=_files(path),
        )


class SlideHandle:
    """An open slide at one level.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    """

    def __init__(self, info: RasterInfo) -> None:
        self._info = info
        self._slide = _open(info.path)
        self._down = self._slide.level_downsamples[info.level]

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return pixels, (C, h, w), and where there are any: sparse slides have holes."""
        whole = float(self._down).is_integer()
        rgba = self._region(box) if whole else self._paged(box)
        valid = rgba[..., 3] != 0
        pixels = np.stack([rgba[..., band - 1] for band in self._info.bands])
        return pixels, None if valid.all() else valid

    def _region(self, box: Window) -> NDArray[np.uint8]:
        """Return a region, (h, w, 4)."""
        corner = (round(box.col * self._down), round(box.row * self._down))
        try:
            image = self._slide.read_region(corner, self._info.level, (box.width, box.height))
        except Exception:
            # An error stays with the handle for ever; the next read must not meet it.
            self._slide.close()
            self._slide = _open(self._info.path)
            raise
        return np.asarray(image)

    def _paged(self, box: Window) -> NDArray[np.uint8]:
        """Return a region put together from pages that lie at fixed places.

        OpenSlide takes corners in pixels of the full resolution. Where a level's pixels do not
        begin at whole ones it interpolates, by a little else for every corner: so each pixel always
        comes out of the same call.
        """
        out = np.empty((box.height, box.width, 4), np.uint8)
        level_height, level_width = self._info.levels[self._info.level]
        whole = Window(0, 0, level_height, level_width)
        for row in range(box.row // _PAGE * _PAGE, box.row_stop, _PAGE):
            for col in range(box.col // _PAGE * _PAGE, box.col_stop, _PAGE):
                page = Window(row, col, _PAGE, _PAGE).intersection(whole)
                part = page.intersection(box)
                if part.pixels:
                    found = self._region(page)[part.slices(page.row, page.col)]
                    out[part.slices(box.row, box.col)] = found
        return out
