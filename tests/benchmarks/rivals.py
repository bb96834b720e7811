"""tilenet against MONAI's sliding-window inference: `make bench-rivals` (MONAI is installed apart).

The same 4096² deflate GeoTIFF and `smp.Unet("resnet18")` weights, two classes; whole processes,
interleaved; medians. Each in its default arithmetic (fp32 there, bf16 here), and ours in fp32 too.
MONAI runs with its defaults at tile 512 and overlap 128, as its users do:
image read by rasterio, `sliding_window_inference`, argmax, mask written as a deflate GeoTIFF.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import inputs

MONAI = """
import sys, numpy as np, rasterio, torch, segmentation_models_pytorch as smp
from monai.inferers import sliding_window_inference
raster, model, out = sys.argv[1:]
network = smp.from_pretrained(model).eval()
with rasterio.open(raster) as source:
    profile, pixels = source.profile, source.read()
image = torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.25)[None]
with torch.inference_mode():
    scores = sliding_window_inference(image, (512, 512), 4, network, overlap=0.25)
mask = scores.argmax(1)[0].numpy().astype(np.uint8)
profile.update(count=1, photometric=None)
with rasterio.open(out, "w", **profile) as target:
    target.write(mask, 1)
"""


def seconds(line: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Run a process to its end; return wall seconds and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(text.decode())
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench"))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    apart = folder / "monai"
    if not apart.exists():
        install = [
            os.environ.get("UV", "uv"),
            "pip",
            "install",
            "--no-deps",
            "--target",
            str(apart),
        ]
        subprocess.run([*install, "--python", sys.executable, "monai"], check=True)
    raster, model = inputs.raster(folder, 4096, "deflate"), inputs.resnet_unet(folder)
    plain = dict(os.environ)
    cold = plain | {"XDG_CACHE_HOME": str(folder / "rival-cold")}
    theirs = plain | {"PYTHONPATH": str(apart)}
    ours = [sys.executable, "-m", "tilenet", "predict", str(raster), "--model", str(model)]
    out = folder / "rival.zarr"
    monai = [sys.executable, "-c", MONAI, str(raster), str(model), str(folder / "m.tif")]
    line = [*ours, "--out", str(out)]
    cases = {
        "MONAI": (monai, theirs),
        "tilenet, 512 / 128": ([*line, "--tile", "512", "--overlap", "128"], plain),
        "tilenet, defaults": (line, plain),
        "tilenet, defaults, fp32": ([*line, "--precision", "fp32"], plain),
        "tilenet, cold": (line, cold),
    }
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    for turn in range(options.runs + 1):  # the first turn warms the caches
        for name, (line, environment) in cases.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(folder / "rival-cold", ignore_errors=True)
            found = seconds(line, environment)
            if turn:
                taken[name].append(found)
    base = statistics.median(s for s, _ in taken["MONAI"])
    rows = {
        name: {
            "seconds": statistics.median(s for s, _ in runs),
            "times_faster": base / statistics.median(s for s, _ in runs),
            "peak_rss_mib": max(r for _, r in runs) / 2**20,
        }
        for name, runs in taken.items()
    }
    sys.stdout.write(json.dumps({"command": "make bench-rivals", **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
