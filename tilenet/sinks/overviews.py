"""Coarser levels of a mask as plain GeoTIFFs, and a VRT that shows them as its overviews.

GDAL's own way to make them takes three times as long, and breaks ties otherwise than we do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window as RasterWindow

from tilenet.classes import NODATA
from tilenet.geometry import Window
from tilenet.pyramid import halve
from tilenet.quiet import ignoring
from tilenet.sinks.spec import MaskSpec

__all__ = [
    "BLOCK",
    "PLAIN",
    "as_rasterio",
    "coarser_levels",
    "new_level",
    "put",
    "windows_of",
    "with_overviews",
]

BLOCK = 512
"""Pixels a side of a file's own tiles."""

_SIDE = 6 * BLOCK  # four chunks of a usual store: one that two windows share is decoded twice

PLAIN = {
    "driver": "GTiff",
    "tiled": True,
    "blockxsize": BLOCK,
    "blockysize": BLOCK,
    "compress": "ZSTD",
    "zstd_level": 1,
    "bigtiff": "YES",
    "sparse_ok": True,
}
"""How files are written that are read once, and then gone."""


def windows_of(height: int, width: int, bands: int = 1) -> Iterator[Window]:
    """Yield the windows by which a file is written and read."""
    whole, side = Window(0, 0, height, width), _SIDE if bands == 1 else _SIDE // 2
    for row in range(0, height, side):
        for col in range(0, width, side):
            yield Window(row, col, side, side).intersection(whole)


def as_rasterio(window: Window) -> RasterWindow:
    """Return a window in rasterio's own order."""
    return RasterWindow(window.col, window.row, window.width, window.height)


def coarser_levels(plain: Path, spec: MaskSpec) -> dict[Path, tuple[int, int]]:
    """Return files and sizes of the coarser levels that are made while the mask is filled in.

    Of these, a window's part is whole blocks.
    """
    levels: dict[Path, tuple[int, int]] = {}
    height, width = spec.height, spec.width
    while max(height, width) > BLOCK and (_SIDE >> len(levels) + 1) % BLOCK == 0:
        height, width = (height + 1) // 2, (width + 1) // 2
        levels[plain.with_name(f"{len(levels) + 1}.tif")] = (height, width)
    return levels


def with_overviews(plain: Path, made: list[Path]) -> Path:
    """Make the mask's other coarser levels, and a VRT of ours that shows all as its overviews."""
    vrt, levels = plain.with_suffix(".vrt"), [plain, *made]
    rasterio.shutil.copy(str(plain), str(vrt), driver="VRT")
    while (coarser := _halved(levels[-1], plain.with_name(f"{len(levels)}.tif"))) is not None:
        levels.append(coarser)
    overviews = "".join(
        f'<Overview><SourceFilename relativeToVRT="1">{path.name}</SourceFilename>'
        "<SourceBand>1</SourceBand></Overview>"
        for path in levels[1:]
    )
    text = vrt.read_text().replace("</VRTRasterBand>", f"{overviews}</VRTRasterBand>")
    with ignoring(NotGeoreferencedWarning), rasterio.open(plain) as src:
        # GDAL writes ground control points into a VRT with four decimals.
        points = iter([(p.col, p.row, p.x, p.y, p.z) for p in src.gcps[0]])
    vrt.write_text(
        re.sub(
            r'Pixel="[^"]*" Line="[^"]*" X="[^"]*" Y="[^"]*"(?: Z="[^"]*")?',
            lambda _: 'Pixel="{!r}" Line="{!r}" X="{!r}" Y="{!r}" Z="{!r}"'.format(*next(points)),
            text,
        )
    )
    return vrt


def _halved(fine: Path, coarse: Path) -> Path | None:
    """Write the next coarser level of a mask, if it is larger than a block."""
    with ignoring(NotGeoreferencedWarning), rasterio.open(fine) as src:
        if max(src.shape) <= BLOCK:
            return None
        height, width = ((side + 1) // 2 for side in src.shape)
        with new_level(coarse, height, width) as dst:
            for window in windows_of(*src.shape):
                put(dst, halve(src.read(1, window=as_rasterio(window))), window, 1)
    return coarse


def new_level(path: Path, height: int, width: int) -> Any:
    """Open the file of a coarser level for writing."""
    shape = {"height": height, "width": width, "count": 1, "dtype": "uint8"}
    with ignoring(NotGeoreferencedWarning):
        return rasterio.open(path, "w", **PLAIN, **shape, nodata=NODATA)


def put(dst: Any, half: NDArray[np.uint8], window: Window, level: int) -> None:
    """Write a window of the full mask as a coarser level has it."""
    corner = (window.col >> level, window.row >> level, half.shape[1], half.shape[0])
    dst.write(half, 1, window=RasterWindow(*corner))
