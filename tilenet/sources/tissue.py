"""Where a slide has tissue, and a map data, by a small picture of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import UsageError
from tilenet.geometry import Window
from tilenet.sources.cover import BitMask, Cover
from tilenet.sources.opening import open_raster
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.sources.view import View
from tilenet.watchdog import watched

__all__ = ["find_cover", "find_tissue"]

_SIDE = 2048  # pixels of the small picture, at the most
_COARSE = 8.0  # micrometres a pixel: cells are no longer seen, and tissue is one area
_TIMES = 16  # as much coarser, where nothing tells the micrometres
_LEAST = 128  # pixels of its longer side, unless micrometres say otherwise
_STRIPE = 256
_BLACK = 30  # what is darker has no hue: borders that the scanner left, not tissue
_PLENTY = 0.2  # saturations beyond count as this, lest ink make pale tissue pass for glass
_GLASS = (0.75, 0.08)  # the least brightness and the most saturation that glass has
_APART = 0.04  # saturation by which tissue must differ from glass
_SPECK, _HOLE = 2, 256  # pixels of the small picture
_GROWN = 4
_MAP_GROWN = 4


def find_cover(info: RasterInfo, timeout: float = 600.0) -> Cover | None:
    """Return where a raster has tissue or data; None where a small picture cannot tell.

    A picture of three 8-bit bands without a CRS is a slide. Of any other raster it is the valid
    pixels of a small overview, if it has one.

    Parameters
    ----------
    info : RasterInfo
        The raster.
    timeout : float
        Seconds after which reading a stripe counts as stuck.

    Raises
    ------
    InputError
        The raster does not read.
    UsageError
        The extra `slides` is not installed.
    """
    is_slide = info.stored_dtype == "uint8" and info.count in (3, 4)
    if is_slide and info.georeference.crs_wkt is None:
        rgb, valid = _read(info, _slide_view(info), timeout)
        mask = find_tissue(np.moveaxis(rgb, 0, -1), valid, info.path)
    else:
        mask = _find_data(info, timeout)
    return None if mask is None else Cover(BitMask.of(mask), info.height, info.width)


def _slide_view(info: RasterInfo) -> View:
    """Return a view of a slide at which tissue shows and cells do not."""
    longer = max(info.levels[0])
    mpp = _full_mpp(info)
    coarser = min(_TIMES, longer / _LEAST) if mpp is None else _COARSE / mpp
    # In units of its own pixels, so that a file that tells no micrometres can be seen as well.
    factor = max(1.0, coarser, longer / _SIDE)
    return replace(_anyhow(info.view), bands=(1, 2, 3), source_mpp=1.0, mpp=factor)


def _anyhow(view: View) -> View:
    """Return a view without what it says of the resolution."""
    return replace(
        view, level=None, mpp=None, resolution=None, source_mpp=None, like=None,
        trained_mpp=None, trained_resolution=None,
    )  # fmt: skip


def _full_mpp(info: RasterInfo) -> float | None:
    """Return micrometres per pixel of the full resolution, as the run takes them to be."""
    if info.georeference.mpp is None:
        return None
    height, width = info.levels[0]
    y, x = info.georeference.mpp
    return min(y * info.height / height, x * info.width / width)


def _read(info: RasterInfo, view: View, timeout: float) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return a small view, (C, h, w), and which pixels are valid; in stripes."""
    with closing(open_raster(info.path, view, checked=False)) as raster:
        return _whole(raster, timeout)


def _whole(raster: Raster, timeout: float) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    info = raster.info
    pixels = np.empty((len(info.bands), info.height, info.width), info.dtype)
    valid = np.ones((info.height, info.width), bool)
    blank = np.full(len(info.bands), 255.0 if info.dtype == "uint8" else 0.0)
    for row in range(0, info.height, _STRIPE):
        stripe = Window(row, 0, min(_STRIPE, info.height - row), info.width)
        with watched(info.path, timeout):
            part, kept = raster.read(stripe, blank, [])
        pixels[:, row : stripe.row_stop] = part
        if kept is not None:
            valid[row : stripe.row_stop] = kept
    return pixels, valid


def _find_data(info: RasterInfo, timeout: float) -> NDArray[np.bool_] | None:
    """Return where a small level has valid pixels or is near to some."""
    small = [k for k, size in enumerate(info.levels) if k and max(size) <= _SIDE]
    if not small or (info.validity == "all" and np.dtype(info.dtype).kind != "f"):
        return None  # every block is asked itself
    _, valid = _read(info, replace(_anyhow(info.view), level=small[0]), timeout)
    return None if valid.all() else _grown(valid, _MAP_GROWN)


def _grown(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Return a mask and what is within a distance of it."""
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        return mask
    near: NDArray[np.bool_] = distance_transform_edt(~mask) <= radius
    return near


def find_tissue(
    rgb: NDArray[np.uint8], valid: NDArray[np.bool_], path: str
) -> NDArray[np.bool_] | None:
    """Return where a picture of a slide has tissue, and what is near.

    Saturation, lightly smoothed, is split by Otsu's threshold. A split is always found: it is
    followed only if one side looks like glass and the other differs from it.

    Parameters
    ----------
    rgb : ndarray, shape (h, w, 3)
        The picture.
    valid : ndarray, shape (h, w), bool
        Where it has pixels.
    path : str
        For messages.

    Returns
    -------
    ndarray, shape (h, w), bool, or None
        None where all of it is tissue, or nothing is for sure.

    Raises
    ------
    UsageError
        The extra `slides` is not installed.
    """
    try:
        from skimage.morphology import remove_small_holes, remove_small_objects
    except ImportError as error:
        raise UsageError(
            "finding tissue needs the extra slides", path, "pip install 'tilenet[slides]'"
        ) from error
    from scipy.ndimage import gaussian_filter

    value = rgb.max(axis=2)
    chroma = (value - rgb.min(axis=2)).astype(np.float32)
    seen = valid & (value >= _BLACK)
    saturation = np.divide(chroma, value, out=np.zeros_like(chroma), where=seen)
    smooth = gaussian_filter(np.minimum(saturation, _PLENTY), sigma=1)
    limit = _limit(smooth[seen], value[seen])
    if limit is None:
        return None
    stained = seen & (smooth > limit)
    whole = remove_small_holes(remove_small_objects(stained, max_size=_SPECK), max_size=_HOLE)
    return _grown(whole, _GROWN) if whole.any() else None


def _limit(saturation: NDArray[np.float32], value: NDArray[np.uint8]) -> float | None:
    """Return the saturation from which pixels, (n,), are tissue; None where none tells."""
    from skimage.filters import threshold_otsu

    if not saturation.size:
        return None  # all black
    threshold = float(threshold_otsu(saturation))  # type: ignore[no-untyped-call]  # skimage
    glass = saturation <= threshold
    if glass.all():
        return None  # of one colour
    clear = float(np.median(saturation[glass]))
    if np.median(value[glass]) < _GLASS[0] * 255 or clear > _GLASS[1]:
        return None  # no glass
    if float(np.median(saturation[~glass])) - clear < _APART:
        return None  # nothing stained
    # Otsu's threshold is half-way between the two; pale tissue is nearer to glass.
    return clear + max(0.5 * (threshold - clear), _APART / 2)
