"""Generated rasters: seeded, picture-like, small."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

UTM = "EPSG:32633"
TRANSFORM = Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)


def picture(height, width, bands=3, seed=0, dtype="uint8", high=255):
    """Return smooth noise with fine grain, (bands, height, width), 0 to `high`."""
    rng = np.random.default_rng(seed)
    out = np.empty((bands, height, width))
    for band in range(bands):
        coarse = rng.random((height // 16 + 2, width // 16 + 2))
        rows = np.linspace(0, coarse.shape[0] - 1.001, height)
        cols = np.linspace(0, coarse.shape[1] - 1.001, width)
        r, c = rows.astype(int), cols.astype(int)
        fr, fc = (rows - r)[:, None], (cols - c)[None]
        top = coarse[r][:, c] * (1 - fc) + coarse[r][:, c + 1] * fc
        low = coarse[r + 1][:, c] * (1 - fc) + coarse[r + 1][:, c + 1] * fc
        out[band] = top * (1 - fr) + low * fr
    out = 0.8 * out + 0.2 * rng.random(out.shape)
    return (out * high).astype(dtype)


def write_tif(path, pixels, *, georeferenced=False, nodata=None, alpha=None, block=128, levels=()):
    """Write (C, H, W) as a tiled, deflated GeoTIFF; `alpha` is a further band, (H, W) uint8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if alpha is not None:
        pixels = np.concatenate([pixels, alpha[None].astype(pixels.dtype)])
    profile = {
        "driver": "GTiff", "count": pixels.shape[0], "height": pixels.shape[1],
        "width": pixels.shape[2], "dtype": pixels.dtype, "tiled": True, "blockxsize": block,
        "blockysize": block, "compress": "deflate",
        "transform": TRANSFORM if georeferenced else None,
        "crs": UTM if georeferenced else None, "nodata": nodata,
    }  # fmt: skip
    if alpha is not None:
        profile["ALPHA"] = "YES"
    with warnings.catch_warnings():
        # That a plain image has no place on a map is what is wanted of it.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _write(path, pixels, profile, alpha=alpha is not None, levels=levels)
    return path


def _write(path, pixels, profile, *, alpha, levels):
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(pixels)
        if alpha:
            colours = [ColorInterp.gray, *[ColorInterp.undefined] * (pixels.shape[0] - 2)]
            if pixels.shape[0] == 4:
                colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
            dst.colorinterp = [*colours, ColorInterp.alpha]
        if levels:
            dst.build_overviews(list(levels), Resampling.average)


def write_image(path, pixels):
    """Write (C, H, W) uint8 as PNG or JPEG, by the path's ending."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, 2)
    Image.fromarray(plain).save(path)
    return path
