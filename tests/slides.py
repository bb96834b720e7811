"""Generated slides: the layouts of scanners, around pictures of our own."""

from pathlib import Path

import numpy as np
import tifffile

APERIO = "Aperio Image Library v12.0.1\n{width}x{height} |AppMag = {mag}|MPP = {mpp}"


def halved(pixels):
    """Return (C, H, W) averaged over 2 × 2."""
    bands, height, width = pixels.shape
    even = pixels[:, : height // 2 * 2, : width // 2 * 2].astype(np.float32)
    mean = even.reshape(bands, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    return np.rint(mean).astype(pixels.dtype)


def write_svs(path, pixels, *, mpp=0.5, levels=1, compression="jpeg", tile=256):
    """Write (3, H, W) as Aperio does, with levels of half the size and a macro picture."""
    path = Path(path)
    # 33003 and 33005 are Aperio's numbers for JPEG 2000.
    with tifffile.TiffWriter(path) as tif:
        for _ in range(levels):
            rgb = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            text = APERIO.format(height=rgb.shape[0], width=rgb.shape[1], mag=20, mpp=mpp)
            tif.write(
                rgb, tile=(tile, tile), compression=compression, photometric="rgb",
                description=text, metadata=None, subfiletype=0,
                compressionargs={"level": 95} if compression == "jpeg" else {},
            )  # fmt: skip
            pixels = halved(pixels)
        macro = np.full((60, 90, 3), 200, np.uint8)
        tif.write(
            macro, rowsperstrip=60, compression="jpeg", description="Aperio\nmacro 90x60",
            metadata=None, subfiletype=9,
        )  # fmt: skip
    return path


def write_ome(path, stack, axes, *, mpp=None, levels=1, names=None):
    """Write a stack as OME-TIFF; `axes` are tifffile's letters."""
    metadata = {"axes": axes}
    if mpp is not None:
        metadata |= {
            "PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm",
        }  # fmt: skip
    if names is not None:
        metadata["Channel"] = {"Name": names}
    options = {"tile": (128, 128), "compression": "zlib"}
    if axes.endswith("S"):
        options["photometric"] = "rgb"
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(stack, subifds=levels - 1, metadata=metadata, **options)
        for level in range(1, levels):
            y, x = axes.index("Y"), axes.index("X")
            where = [slice(None)] * len(axes)
            where[y] = where[x] = slice(None, None, 2**level)
            tif.write(stack[tuple(where)], subfiletype=1, **options)
    return path
