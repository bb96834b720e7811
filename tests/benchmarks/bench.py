"""How fast the engine is and what it costs: `make bench`, or `bench.py FOLDER [--only null]`.

For every case: seconds of the network alone on the lattice's tiles, pixels in memory; of the run;
their ratio (engine efficiency); read, forward and write seconds, those in which the network waited
for pixels and those in which pixels waited for the network; pixels decoded per pixel; Mpx/s; peak
memory of all processes. Then the first run of a machine (no cached graph), and what the engine
itself costs per pixel against a loop written by hand. Written as JSON with the machine and the
versions beside the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import inputs

from tilenet.geometry import Window
from tilenet.models.session import choose, cores, has_cuda, network_shape, open_session
from tilenet.models.store import find_model
from tilenet.sources import open_raster

FILES = ("deflate", "jpeg")


def command(raster: Path, model: str, out: Path, *options: str) -> dict[str, Any]:
    """Run predict as a process of its own and return its JSON with the process' seconds."""
    if out.exists():
        shutil.rmtree(out)
    line = [sys.executable, "-m", "tilenet", "predict", str(raster), "--model", model]
    start = time.perf_counter()
    done = subprocess.run(
        [*line, "--out", str(out), "--json", *options], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) | {"process_seconds": seconds}


def forward_only(
    raster: Path, model: str, run: dict[str, Any], backend: str, precision: str
) -> float:
    """Return the seconds that the network alone takes for the run's tiles, pixels in memory."""
    files = find_model(model, None, {})
    network_shape(files)
    setup = choose(files, backend=backend, precision=precision)
    session = open_session(files, setup, "uint8")
    tile, side = run["tile"], min(run["height"], 4096)
    pixels, _ = open_raster(raster).read(Window(0, 0, side, side), np.zeros(3))
    loaded = session.load(pixels)
    room = side - tile
    corners = [
        (loaded, (k * 257) % (room + 1), (k * 509) % (room + 1)) for k in range(run["tiles"])
    ]
    for _ in session.scores(corners[:2], (tile, tile)):
        pass
    _wait_for(setup.device)
    start = time.perf_counter()
    for _ in session.scores(corners, (tile, tile)):
        pass
    _wait_for(setup.device)
    return time.perf_counter() - start


def _wait_for(device: str) -> None:
    """Wait for what a GPU has been told to do."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


@contextmanager
def gpu_watched(found: dict[str, float]) -> Iterator[None]:
    """Note the share of the time within in which the GPU was busy, as its driver sees it."""
    line = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    watch = subprocess.Popen([*line, "--loop-ms=100"], stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        watch.terminate()
        said = [float(one) for one in watch.communicate()[0].split() if one.isdecimal()]
        found["gpu_busy"] = statistics.fmean(said) / 100 if said else math.nan


def measure(
    raster: Path, model: str, folder: Path, backend: str, precision: str, runs: int
) -> dict[str, Any]:
    """Return the figures of one case: medians over warm runs."""
    options = ("--backend", backend, "--precision", precision)
    out = folder / "mask.zarr"
    busy: dict[str, float] = {}
    with gpu_watched(busy) if has_cuda() else nullcontext():
        warm = [command(raster, model, out, *options) for _ in range(runs)]
    shutil.rmtree(out)
    run = sorted(warm, key=lambda r: r["process_seconds"])[len(warm) // 2]
    alone = forward_only(raster, model, run, backend, precision)
    seconds = statistics.median(r["seconds"] for r in warm)
    return {
        "raster": raster.name, "model": Path(model).stem, "backend": backend,
        "precision": precision, "mpixels": run["pixels"] / 1e6, "tiles": run["tiles"],
        "forward_alone": alone, "run": seconds,
        "process": statistics.median(r["process_seconds"] for r in warm),
        "efficiency": alone / seconds, "read": run["read_seconds"],
        "forward": run["forward_seconds"], "write": run["write_seconds"],
        "network_waited": run["wait_seconds"], "pixels_waited": run["queue_seconds"],
        "read_amplification": run["read_amplification"],
        "mpixels_per_second": run["pixels"] / 1e6 / seconds,
        "peak_rss_mib": max(r["peak_rss_bytes"] for r in warm) / 2**20, **busy,
    }  # fmt: skip


def report(row: dict[str, Any]) -> None:
    cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
    sys.stdout.write("| " + " | ".join(cells) + " |\n")
    sys.stdout.flush()


def cold(raster: Path, model: str, folder: Path) -> dict[str, Any]:
    """Return the first run of a machine: the graph is converted, nothing is cached."""
    cache = folder / "cold-cache"
    shutil.rmtree(cache, ignore_errors=True)
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(cache)  # for the child only: restored below
    try:
        run = command(raster, model, folder / "cold.zarr")
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
    return {"cold": run["process_seconds"], "peak_rss_mib": run["peak_rss_bytes"] / 2**20}


def by_hand(raster: Path, model: str, folder: Path) -> float:
    """Return the seconds of a loop written by hand for one network, as a process of its own."""
    line = [sys.executable, str(Path(__file__).with_name("loop.py")), str(raster), model]
    start = time.perf_counter()
    subprocess.run([*line, str(folder / "loop.zarr")], check=True)
    return time.perf_counter() - start


def marginal(folder: Path, model: str, runs: int) -> dict[str, float]:
    """Return Mpx/s from 8,192² to 16,384², start-up left out: ours, by hand, and their ratio."""
    small, large = (inputs.raster(folder, side, "deflate") for side in (8192, 16384))
    ours, hand = [], []
    for _ in range(runs):
        seconds = [
            command(r, model, folder / "mask.zarr")["process_seconds"] for r in (small, large)
        ]
        ours.append(seconds[1] - seconds[0])
        hand.append(by_hand(large, model, folder) - by_hand(small, model, folder))
    pixels = (16384**2 - 8192**2) / 1e6
    rates = [pixels / statistics.median(taken) for taken in (ours, hand)]
    return {"ours": rates[0], "by_hand": rates[1], "ratio": rates[0] / rates[1]}


CASES = (
    *(("null2", side, c, "openvino:bf16") for side in (4096, 8192, 16384) for c in FILES),
    *(("null8", side, "deflate", "openvino:bf16") for side in (8192, 16384)),
    *(("nuclei", side, c, "openvino:bf16") for side in (4096, 8192) for c in FILES),
    *(("nuclei", 4096, "deflate", case) for case in ("openvino:fp32", "torch:bf16", "torch:fp32")),
    *(("unet-resnet18", 8192, "deflate", case) for case in ("openvino:bf16", "torch:bf16")),
)
"""Network, side, compression, backend and precision."""

GPU_CASES = (
    *(("unet-resnet34", 16384, c, "torch:fp16") for c in FILES),
    ("nuclei", 8192, "jpeg", "torch:fp16"), ("unet-resnet34", 8192, "deflate", "torch:fp32"),
)  # fmt: skip
"""The same where there is a CUDA device; `gpu_busy` has what starting takes in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench"))
    parser.add_argument("--only", default="", help="part of a case's words")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    models = {
        "null2": lambda: str(inputs.null_network(folder, 2)),
        "null8": lambda: str(inputs.null_network(folder, 8)),
        "nuclei": lambda: "nuclei",
        "unet-resnet18": lambda: str(inputs.resnet_unet(folder)),
        "unet-resnet34": lambda: str(inputs.resnet_unet(folder, "resnet34")),
    }
    rows: list[dict[str, Any]] = []
    for case in GPU_CASES if has_cuda() else CASES:
        if options.only not in " ".join(map(str, case)):
            continue
        name, side, compress, setup = case
        raster = inputs.raster(folder, side, compress)
        rows.append(measure(raster, models[name](), folder, *setup.split(":"), options.runs))
        if len(rows) == 1:
            report({key: key for key in rows[0]})
            report(dict.fromkeys(rows[0], "---"))
        report(rows[-1])
    first = cold(inputs.raster(folder, 4096, "deflate"), "nuclei", folder)
    sys.stdout.write(f"cold, nuclei: {first}\n")
    engine = marginal(folder, models["null2"](), options.runs)
    sys.stdout.write(f"null network, Mpx/s: {engine}\n")
    document = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores()},
        "versions": {n: version(n) for n in ("tilenet", "torch", "openvino", "rasterio", "zarr")},
        "command": "make bench", "cold": first, "null_mpixels_per_second": engine, "rows": rows,
    }  # fmt: skip
    (folder / "bench.json").write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
