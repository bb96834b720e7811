"""Which pixels of a raster are valid: by nodata values, alpha or a mask band."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MaskFlags

__all__ = ["invalid_values", "validity_of"]


def validity_of(dataset: Any, bands: tuple[int, ...]) -> str:
    """Return where GDAL finds invalid pixels: "all" (nowhere), "nodata", "alpha" or "mask"."""
    every = dataset.mask_flag_enums
    flags = [set(every[b - 1]) for b in bands]
    if all(f == {MaskFlags.all_valid} for f in flags):
        return "all"
    if any(MaskFlags.nodata in f for f in flags):
        return "nodata"
    return "alpha" if any(MaskFlags.alpha in f for f in flags) else "mask"


def invalid_values(
    pixels: NDArray[Any], nodata: tuple[float | None, ...]
) -> NDArray[np.bool_] | None:
    """Return where a value is its band's nodata, (C, h, w), or None if nowhere."""
    invalid = None
    for band, value in enumerate(nodata):
        if value is None:
            continue
        if np.isnan(value):
            same = np.isnan(pixels[band])
        elif pixels.dtype.kind in "iu" and not _holds(pixels.dtype, value):
            continue  # a nodata value that the pixels cannot hold marks nothing
        else:
            same = pixels[band] == np.asarray(value).astype(pixels.dtype)
        if same.any():
            if invalid is None:
                invalid = np.zeros(pixels.shape, bool)
            invalid[band] = same
    return invalid


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max and value == int(value)
