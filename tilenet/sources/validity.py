"""Which pixels of a raster are valid: by nodata values, alpha or a mask band."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MaskFlags

__all__ = ["holds", "judged", "validity_of"]


def validity_of(dataset: Any, bands: tuple[int, ...]) -> str:
    """Return where GDAL finds invalid pixels: "all" (nowhere), "nodata", "alpha" or "mask"."""
    every = dataset.mask_flag_enums
    flags = [set(every[b - 1]) for b in bands]
    if all(f == {MaskFlags.all_valid} for f in flags):
        return "all"
    if any(MaskFlags.nodata in f for f in flags):
        return "nodata"
    return "alpha" if any(MaskFlags.alpha in f for f in flags) else "mask"


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
    marked = _marked(stored, nodata) if validity == "nodata" else None
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
