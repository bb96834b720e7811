"""How good the bundled model is, and what tiling changes: `make quality` prints the tables.

1. Dice on the 35 held-out images of tests/data/nuclei.
2. A 4096² mosaic of them: pixels whose class differs from one forward pass over the whole mosaic,
   by tile, overlap and blend, in fp32 on both sides.
3. bf16 against fp32 on the mosaic.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.models.devices import cpu_precisions
from tilenet.models.session import choose, open_session
from tilenet.models.store import find_model

DATA = Path(__file__).parents[1] / "data" / "nuclei"
SIDE = 4096


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def modality(image: NDArray[np.uint8]) -> str:
    """Return what kind of microscopy an image, (h, w, 3), is from: by its colour and brightness."""
    spread = np.ptp(image.astype(int), axis=2).mean()
    return "H&E" if spread > 10 else "fluorescence" if image.mean() < 100 else "bright field"


def held_out(folder: Path) -> None:
    """Print the mean foreground Dice of the held-out images (both empty = 1)."""
    predict([DATA / "images"], folder / "held", PredictConfig(precision="fp32", format="png"))
    scores = defaultdict(list)
    for path in sorted((DATA / "images").glob("*.png")):
        truth = np.asarray(Image.open(DATA / "masks" / path.name)).astype(bool)
        found = np.asarray(Image.open(folder / "held" / path.name)) == 1
        total = truth.sum() + found.sum()
        dice = 1.0 if total == 0 else 2 * (truth & found).sum() / total
        for key in ("all", modality(np.asarray(Image.open(path).convert("RGB")))):
            scores[key].append(dice)
    for key, values in scores.items():
        say(f"| {key} | {len(values)} | {np.mean(values):.4f} |")


def mosaic(path: Path) -> None:
    """Write a SIDE² image of held-out images, shuffled, flipped, side by side."""
    rng = np.random.default_rng(0)
    images = [np.asarray(Image.open(p).convert("RGB")) for p in sorted((DATA / "images").glob("*"))]
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    row = 0
    while row < SIDE:
        col, height = 0, 256
        while col < SIDE:
            image = images[rng.integers(len(images))]
            image = image[:: rng.choice([1, -1]), :: rng.choice([1, -1])][:height]
            part = image[: SIDE - row, : SIDE - col]
            canvas[row : row + part.shape[0], col : col + part.shape[1]] = part
            col += part.shape[1]
        row += height
    Image.fromarray(canvas).save(path)


def whole_pass(path: Path) -> NDArray[np.float32]:
    """Return the probabilities of one fp32 forward pass over the whole image, (h, w)."""
    files = find_model("nuclei", None, {})
    session = open_session(files, choose(files, precision="fp32"), "uint8")
    pixels = np.ascontiguousarray(np.asarray(Image.open(path)).transpose(2, 0, 1))
    [scores] = session.scores([(session.load(pixels), 0, 0)], (SIDE, SIDE))
    return np.array(scores[0])


def tiled(path: Path, folder: Path, **options: object) -> tuple[NDArray[np.uint8], float]:
    """Return a mask made from tiles, (h, w), and tile pixels per image pixel."""
    out = folder / "tiled.zarr"
    config = PredictConfig.model_validate({"precision": "fp32", "overwrite": True, **options})
    run = predict([path], out, config).runs[0]
    mask = np.asarray(zarr.open_group(out, mode="r")["mask"])
    return mask, run.tiles * run.tile**2 / run.pixels


def seams(folder: Path) -> None:
    """Print how tiles, overlaps and blends change the mask of the mosaic."""
    path = folder / "mosaic.png"
    mosaic(path)
    whole = whole_pass(path)
    reference = whole >= 0.5
    sure = np.abs(whole - 0.5) > 0.1
    say("| tile / overlap | compute | blend | differing pixels, % | of the sure ones, % |")
    for tile, overlap in ((512, 128), (512, 256), (1024, 128), (1024, 256), (1024, 384)):
        for blend in ("gaussian", "hann", "linear", "crop"):
            mask, cost = tiled(path, folder, tile=tile, overlap=overlap, blend=blend)
            differs = (mask == 1) != reference
            say(
                f"| {tile} / {overlap} | {cost:.2f} | {blend} | {100 * differs.mean():.4f} | "
                f"{100 * differs[sure].mean():.4f} |"
            )
    default, cost = tiled(path, folder)
    differs = (default == 1) != reference
    say(f"| defaults | {cost:.2f} | gaussian | {100 * differs.mean():.4f} | |")


def bf16_against_fp32(folder: Path) -> str:
    """Return how the mosaic's mask in bf16 differs from the one in fp32, in words."""
    if "bf16" not in cpu_precisions():
        return "bf16 against fp32: this processor has no bf16 arithmetic"
    path = folder / "mosaic.png"
    mosaic(path)
    exact, _ = tiled(path, folder, probabilities=True)
    scores = np.asarray(zarr.open_group(folder / "tiled.zarr", mode="r")["prob"])[0]
    sure = np.abs(scores / 255 - 0.5) > 0.1
    other = tiled(path, folder, precision="bf16")[0] != exact
    return (
        f"bf16 against fp32, bundled model: {100 * other.mean():.4f} % of all pixels differ, and "
        f"{100 * other[sure].mean():.4f} % of those whose margin is above 0.1"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        say("| held-out images | number | mean Dice |")
        held_out(Path(name))
        seams(Path(name))
        say(bf16_against_fp32(Path(name)))
    say(json.dumps({"command": "make quality"}))


if __name__ == "__main__":
    main()
