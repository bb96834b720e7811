"""How fast the engine is and what it costs: `make bench`, or `bench.py FOLDER [--only null]`.

For every case: seconds of the network alone on the lattice's tiles, in a process of its own, pixels
in memory; of the run; their ratio (engine efficiency); read, forward and write seconds, those in
which the network waited for pixels and those in which pixels waited for the network; pixels decoded
per pixel; Mpx/s; peak memory of all processes. Then the first run of a machine (no cached graph),
what the engine itself costs per pixel against a loop written by hand, and what bf16 changes in the
bundled model's masks. Written as JSON with the machine and the versions beside the table. A
processor without bf16 runs the cases in fp32.
"""

from __future__ import annotations

import argparse
import itertools
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

sys.path.insert(0, str(Path(__file__).parent))
import inputs
import quality

from tilenet.models.devices import cores, cpu_precisions, has_cuda

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


def forward_only(raster: Path, model: str, planned: dict[str, Any], *words: str) -> float:
    """Return the seconds that the network alone takes for a run's tiles (see `alone.py`)."""
    script = str(Path(__file__).with_name("alone.py"))
    line = [sys.executable, script, str(raster), model, *words]
    done = subprocess.run(
        [*line, str(planned["tile"]), str(planned["tiles"]), "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


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
    """Return the figures of one case: medians over warm runs.

    The network alone is timed before and after each of them, for a machine's speed changes.
    """
    options = ("--backend", backend, "--precision", precision)
    out = folder / "mask.zarr"
    busy: dict[str, float] = {}
    planned = command(raster, model, out, *options, "--dry-run")["estimate"]
    alone, warm = [forward_only(raster, model, planned, backend, precision)], []
    for _ in range(runs):
        with gpu_watched(busy) if has_cuda() else nullcontext():
            warm.append(command(raster, model, out, *options))
        alone.append(forward_only(raster, model, planned, backend, precision))
    shutil.rmtree(out)
    run = sorted(warm, key=lambda r: r["process_seconds"])[len(warm) // 2]
    ratios = [
        (before + after) / 2 / one["seconds"]
        for one, (before, after) in zip(warm, itertools.pairwise(alone), strict=True)
    ]
    return {
        "raster": raster.name, "model": Path(model).stem, "backend": backend,
        "precision": precision, "mpixels": run["pixels"] / 1e6, "tiles": run["tiles"],
        "forward_alone": statistics.median(alone),
        "run": statistics.median(r["seconds"] for r in warm),
        "process": statistics.median(r["process_seconds"] for r in warm),
        "efficiency": statistics.median(ratios), "read": run["read_seconds"],
        "forward": run["forward_seconds"], "write": run["write_seconds"],
        "network_waited": run["wait_seconds"], "pixels_waited": run["queue_seconds"],
        "read_amplification": run["read_amplification"],
        "mpixels_per_second": run["mpixels_per_second"],
        "peak_rss_mib": max(r["peak_rss_bytes"] for r in warm) / 2**20, **busy,
    }  # fmt: skip


def report(row: dict[str, Any]) -> None:
    cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
    say("| " + " | ".join(cells) + " |")


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
    *(
        ("unet-resnet18", 8192, "deflate", f"{backend}:bf16")
        for backend in ("openvino", "torch", "inductor")
    ),
)
"""Network, side, compression, backend and precision."""

GPU_CASES = (
    *(("unet-resnet34", 16384, c, "torch:fp16") for c in FILES),
    ("unet-resnet34", 16384, "deflate", "inductor:fp16"),
    ("nuclei", 8192, "jpeg", "torch:fp16"), ("unet-resnet34", 8192, "deflate", "torch:fp32"),
)  # fmt: skip
"""The same where there is a CUDA device; `gpu_busy` has what starting takes in it."""


def cases() -> tuple[tuple[str, int, str, str], ...]:
    """Return the cases that this machine can run."""
    if has_cuda():
        return GPU_CASES
    if "bf16" in cpu_precisions():
        return CASES
    say("this processor has no bf16 arithmetic: its cases are left out, fp32 takes their place")
    return tuple(dict.fromkeys((*case, setup.replace("bf16", "fp32")) for *case, setup in CASES))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


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
    for case in cases():
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
    say(f"cold, nuclei: {first}")
    engine = marginal(folder, models["null2"](), options.runs)
    say(f"null network, Mpx/s: {engine}")
    rounded = quality.bf16_against_fp32(folder)
    say(rounded)
    document = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores()},
        "versions": {n: version(n) for n in ("tilenet", "torch", "openvino", "rasterio", "zarr")},
        "command": "make bench", "cold": first, "null_mpixels_per_second": engine, "bf16": rounded,
        "rows": rows,
    }  # fmt: skip
    (folder / "bench.json").write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
