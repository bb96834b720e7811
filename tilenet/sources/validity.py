"""Which pixels of a raster are valid: by nodata values, alpha or a mask band."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags

__all__ = ["holds", "judged", "nodata_of", "validity_of"]


def validity_of(dataset: Any, bands: tuple[int, ...], colours: tuple[str, ...]) -> str:
    """Return what tells invalid pixels: "all" (none), "nodata", "alpha", "alpha+nodata", "mask".

    For GDAL a mask beats nodata, and that beats alpha, which it sees in pictures of 2 or 4 bands of
    8 or 16 bits. Here nodata and alpha both count, and alpha does in any picture.
    """
    # The colours are asked for beforehand: GDAL may have met broken pages of the file by now, and
    # would raise that then.
    every = dataset.mask_flag_enums
    flags = {flag for band in bands for flag in every[band - 1]}
    if flags != {MaskFlags.all_valid} and not flags & {MaskFlags.nodata, MaskFlags.alpha}:
        return "mask"
    alpha = ColorInterp.alpha.name
    alone = all(colours[band - 1] == alpha for band in bands)
    found = ["alpha"] if alpha in colours and not alone else []
    found += ["nodata"] if MaskFlags.nodata in flags else []
    return "+".join(found) or "all"


def nodata_of(dataset: Any, bands: tuple[int, ...]) -> tuple[float | None, ...]:
    """Return the nodata value of each band; None where it has none.

    The metadata NODATA_VALUES is GDAL's other way to tell one for each band.
    """
    values: tuple[float | None, ...] = dataset.nodatavals
    if not any(MaskFlags.nodata in flags for flags in dataset.mask_flag_enums):
        return tuple(values[band - 1] for band in bands)
    told = dataset.tags().get("NODATA_VALUES", "").split()
    if len(told) == dataset.count and values == (None,) * dataset.count:
        try:
            values = tuple(map(float, told))
        except ValueError:
            return (None,) * len(bands)
    return tuple(values[band - 1] for band in bands)


def judged(
    stored: NDArray[Any],
    nodata: tuple[float | None, ...],
    validity: str,
    valid: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Return which values the network must not see, and which pixels are valid, by nodata too.

    Parameters
    ----------
    stored : ndarray, shape (C, h, w)
        Numbers as they are in the file.
    nodata : tuple of float or None
        Per band.
    validity : str
        By `validity_of`. Unless it names nodata, that says nothing.
    valid : ndarray, shape (h, w), bool, or None
        By alpha or mask; None = all.

    Returns
    -------
    hidden : ndarray, shape (C, h, w), bool, or None
        Beside the pixels that are not valid: a band's nodata where another band has a value. None
        of bytes: each of their 256 values may be a colour. In wider types such a number (−9999)
        would reach far in the network.
    valid : ndarray, shape (h, w), bool, or None
        Without the pixels that are nodata in every band.
    """
    marked = _marked(stored, nodata) if "nodata" in validity else None
    if marked is None:
        return None, valid
    somewhere = ~marked.all(axis=0)
    valid = somewhere if valid is None else valid & somewhere
    return (None if stored.dtype.itemsize == 1 else marked), valid


def _marked(pixels: NDArray[Any], nodata: tuple[float | None, ...]) -> NDArray[np.bool_] | None:
    """Return where a value is its band's nodata, (C, h, w), or None if nowhere."""
    invalid = None
    for band, value in enumerate(nodata):
        if value is None:
            continue
        if np.isnan(value):
            same = np.isnan(pixels[band])
        elif pixels.dtype.kind in "iu" and not holds(pixels.dtype, value):
            continue  # a nodata value that the pixels cannot hold marks nothing
        else:
            with np.errstate(over="ignore"):
                same = pixels[band] == np.asarray(value).astype(pixels.dtype)
        if same.any():
            if invalid is None:
                invalid = np.zeros(pixels.shape, bool)
            invalid[band] = same
    return invalid


def holds(dtype: np.dtype[Any], value: float) -> bool:
    """Return whether pixels of an integer kind can have a value."""
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max and value == int(value)
