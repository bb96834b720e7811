"""What surrounds the network: `make bench-overhead`, or `overhead.py FOLDER [--only help ...]`.

Starting, small images, planning of ten million blocks, Dask's cost per block, exports, fsync.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning

sys.path.insert(0, str(Path(__file__).parent))
import inputs
from bench import command

from tilenet.config import PredictConfig
from tilenet.engine import run as engine
from tilenet.engine import spill
from tilenet.engine.cluster import open_executor
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.meter import Spans
from tilenet.engine.plan import Plan
from tilenet.engine.request import Job, Request, open_job, plan_for
from tilenet.engine.runfolder import STRIPS
from tilenet.engine.task import Blocks
from tilenet.geometry import Window
from tilenet.models.session import choose, network_shape, open_session
from tilenet.models.store import find_model
from tilenet.sinks import MaskSpec, MaskStore, write_geotiff
from tilenet.sources import open_raster

_run: list[Plan] = []  # of the run without a network, whose tasks share this process

SIDE, SMALL = 256, 2000
"""Side and number of the small images."""


def timed(line: list[str], runs: int = 5) -> dict[str, float]:
    """Return the median seconds and the peak memory of a command."""
    code = (
        "import resource, subprocess, sys, time; t = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=-3, stderr=-3);"
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    found = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", code, sys.executable, "-m", "tilenet", *line],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found.append([float(part) for part in done.stdout.split()])
    return {
        "seconds": statistics.median(s for s, _ in found),
        "peak_rss_mib": max(r for _, r in found) / 1024,
    }


def starting(folder: Path) -> dict[str, float]:
    """Return the seconds of `--help`."""
    del folder
    return timed(["--help"])


def one_small(folder: Path) -> dict[str, float]:
    """Return the seconds of one 512² image with the bundled model, its graph in the cache."""
    image = folder / "512.png"
    with rasterio.open(
        image, "w", driver="PNG", width=512, height=512, count=3, dtype="uint8"
    ) as f:
        f.write(inputs.picture()[:, :512, :512])
    line = ["predict", str(image), "--out", str(folder / "512.zarr"), "--overwrite"]
    timed(line, 1)
    return timed(line)


def planning(folder: Path) -> dict[str, float]:
    """Return the seconds of a dry run over ten million blocks (a sparse raster)."""
    side, path = 64 * 3200, folder / "sparse.tif"
    if not path.exists():
        profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8"}
        tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "interleave": "pixel"}
        with rasterio.open(path, "w", **profile, **tiles, sparse_ok=True, bigtiff="yes"):
            pass
    model = str(inputs.null_network(folder, 2))
    cut = ["--block", "64", "--chunk", "64", "--tile", "64", "--overlap", "16"]
    out = str(folder / "never.zarr")
    return timed(["predict", str(path), "--model", model, "--out", out, *cut, "--dry-run"], 1)


def forward_nothing(file: str, run: str, blocks: Blocks) -> tuple[Blocks, Spans]:
    """Stand in for a forward: the files of an empty half and of empty strips."""
    del run
    lattice, strips = _run[-1].lattice, Path(file).parent / STRIPS
    for block in blocks:
        for name in spill.needed_by(lattice, block):
            spill.SpillWriter(strips / name).close({})
    return blocks, Spans().close()


def join_nothing(file: str, run: str, blocks: Blocks) -> tuple[list[BlockRecord], Spans]:
    """Stand in for a join: reads what the forwards wrote."""
    del run
    lattice, strips = _run[-1].lattice, Path(file).parent / STRIPS
    for block in blocks:
        for giver in (block, *lattice.givers(block)):
            found = spill.SpillReader(strips / spill.name_for(lattice, giver, block))
            assert found.array("mask") is None
            found.close()
    return [BlockRecord(block, (), {}, 1, 0) for block in blocks], Spans().close()


def dask_alone(folder: Path) -> dict[str, float]:
    """Return milliseconds of wall time per block on an in-process Dask cluster.

    10,000 blocks that compute nothing: a forward, a join that waits for its neighbours, the files
    of their strips, the journal.
    """
    model = inputs.null_network(folder, 2)
    files = find_model(str(model), None, {})
    config = PredictConfig(model=str(model), tile=64, overlap=32, block=64, chunk=64)
    request = Request(config, files, network_shape(files), choose(files))
    raster, run = inputs.raster(folder, 6400, "deflate"), folder / "no-op"
    job = Job(raster, folder / "no-op.zarr")
    plan, _ = plan_for(open_job(job, request).info, job, request, named=True)
    _run.append(plan)
    shutil.rmtree(run, ignore_errors=True)
    (run / STRIPS).mkdir(parents=True)
    engine.forward_task, engine.join_task = forward_nothing, join_nothing
    blocks = plan.lattice.blocks
    with open_executor("local", blocks) as executor, Journal(run / "journal") as journal:
        start = time.perf_counter()
        engine.run_blocks(plan, run, journal, executor, lambda _: None)
        taken = time.perf_counter() - start
        assert len(journal.blocks) == blocks
    shutil.rmtree(run)
    return {"blocks": blocks, "ms_per_block": 1000 * taken / blocks}


def tiny_blocks(folder: Path) -> dict[str, float]:
    """Return milliseconds of wall time per block of a whole run of 10,000 tiny blocks.

    Reading, strips, chunks, journal, all fsyncs and the pyramid are in it.
    """
    model = str(inputs.null_network(folder, 2))
    raster = inputs.raster(folder, 6400, "deflate")
    cut = ("--block", "64", "--chunk", "64", "--tile", "64", "--overlap", "32")
    run = command(raster, model, folder / "tiny.zarr", *cut)
    return {"blocks": run["blocks"], "ms_per_block": 1000 * run["seconds"] / run["blocks"]}


def _small_images(folder: Path) -> Path:
    images = folder / "small"
    if not images.exists():
        images.mkdir()
        picture = inputs.picture()
        for k in range(SMALL):
            row, col = (k * 97) % (4096 - SIDE), (k * 331) % (4096 - SIDE)
            profile = {"width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8"}
            with rasterio.open(images / f"{k:05}.png", "w", driver="PNG", **profile) as f:
                f.write(picture[:, row : row + SIDE, col : col + SIDE])
    return images


def _forward_small(images: Path) -> float:
    """Return the seconds of the network alone on these images, read before."""
    files = find_model("nuclei", None, {})
    network_shape(files)
    session = open_session(files, choose(files, tile_pixels=1024 * 1024), "uint8")
    whole = Window(0, 0, SIDE, SIDE)
    corners = [
        (session.load(open_raster(path).read(whole, np.zeros(3))[0]), 0, 0)
        for path in sorted(images.iterdir())
    ]
    for _ in session.scores(corners[:64], (SIDE, SIDE)):
        pass
    start = time.perf_counter()
    for _ in session.scores(corners, (SIDE, SIDE)):
        pass
    return time.perf_counter() - start


def many_small(folder: Path) -> dict[str, float]:
    """Return the seconds of 2,000 images of 256² as PNG masks and as Zarr, and forward alone."""
    images, seconds = _small_images(folder), dict[str, float]()
    for kind in ("png", "zarr"):
        run = command(images, "nuclei", folder / f"masks-{kind}", "--format", kind)
        seconds[kind] = run["seconds"]
    alone = _forward_small(images)
    return {
        "forward_alone": alone, **seconds, "efficiency_png": alone / seconds["png"],
        "ms_more_per_zarr": 1000 * (seconds["zarr"] - alone) / SMALL,
    }  # fmt: skip


def exporting(folder: Path) -> dict[str, float]:
    """Return Mpx/s of exporting a 16,384² mask to a COG."""
    raster, out = inputs.raster(folder, 16384, "deflate"), folder / "export.zarr"
    command(raster, "nuclei", out) if not out.exists() else None
    side = 16384
    spec = MaskSpec(
        height=side, width=side, classes=find_model("nuclei", None, {}).card.class_infos(),
        georeference=open_raster(raster).info.georeference, chunk=PredictConfig().chunk,
        channels=(), zarr_format=2, title="nuclei",
    )  # fmt: skip
    store = MaskStore(out, spec)
    start = time.perf_counter()
    write_geotiff(lambda window: store.read("mask", window), spec, folder / "export.tif")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mpixels_per_second": side * side / 1e6 / seconds}


WITHOUT = "import os, sys; os.fsync = lambda _: None; "
RUN = "from tilenet.cli import run; sys.exit(run(sys.argv[1:]))"


def durability(folder: Path) -> dict[str, float]:
    """Return what fsync costs a run of the bundled model over 4,096²: medians of 5, by turns."""
    raster, found = inputs.raster(folder, 4096, "deflate"), {"with": [], "without": []}
    for turn in range(6):
        for kind, code in (("with", f"import sys; {RUN}"), ("without", WITHOUT + RUN)):
            out = folder / "durable.zarr"
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code, "predict", str(raster), "--out", str(out)],
                check=True, capture_output=True,
            )  # fmt: skip
            if turn:  # the first warms the caches
                found[kind].append(time.perf_counter() - start)
    whole, bare = statistics.median(found["with"]), statistics.median(found["without"])
    shutil.rmtree(folder / "durable.zarr")
    return {"seconds": whole, "seconds_without_fsync": bare, "overhead": whole / bare - 1}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "help": starting, "one-512": one_small, "plan-10M": planning, "dask": dask_alone,
    "tiny-blocks": tiny_blocks, "small-images": many_small, "cog": exporting,
    "durability": durability,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.only:
        found[name] = CASES[name](options.folder)
        sys.stdout.write(f"{name}: {json.dumps(found[name])}\n")
        sys.stdout.flush()
    for left in ("masks-png", "masks-zarr", "tiny.zarr"):
        shutil.rmtree(options.folder / left, ignore_errors=True)
    (options.folder / "overhead.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    main()
