"""Segment a slide and a fluorescence image with the bundled model, and draw what was found.

Run it with `make demo`, or ``python examples/demo.py FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.geometry import Window
from tilenet.sources import open_raster

IMAGES = Path(__file__).parent / "images"
OUTLINE = np.array([0, 255, 60], np.uint8)


def outlined(pixels: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Image.Image:
    """Return the image, (3, h, w), with the borders of class 1 drawn on it."""
    inside = mask == 1
    border = np.zeros_like(inside)
    border[1:] |= inside[1:] != inside[:-1]
    border[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    picture = pixels.transpose(1, 2, 0).copy()
    picture[border] = OUTLINE
    return Image.fromarray(picture)


def main(folder: Path) -> None:
    """Write two masks and their pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, output in (
        ("CMU-1-Small-Region.svs", "slide.zarr"),
        ("fluorescence.png", "fluorescence.png"),
    ):
        mask = folder / output
        result = predict([IMAGES / name], mask, PredictConfig(overwrite=True)).runs[0]
        raster = open_raster(IMAGES / name)
        pixels, _ = raster.read(Window(0, 0, result.height, result.width), np.zeros(3))
        if mask.suffix == ".zarr":
            classes = np.asarray(zarr.open_group(mask, mode="r")["mask"])
        else:
            classes = np.asarray(Image.open(mask))
        picture = mask.with_name(f"{mask.stem}-overlay.png")
        outlined(pixels, classes).save(picture)
        found = ", ".join(f"{c.name} {c.pixels / result.pixels:.1%}" for c in result.classes)
        sys.stdout.write(f"{name}: {found}\n  mask     {mask}\n  picture  {picture}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
