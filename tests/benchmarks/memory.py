"""Whether memory and seconds per pixel stay flat: `make bench-memory`, or `memory.py FOLDER`.

The null network at 2 and 8 classes and overlaps of 25 and 50 %, on rasters of growing sides: peak
memory of all processes against the smallest raster's, seconds per Mpx against 8,192².
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import inputs
from bench import command

TILE = 1024


def grow(
    folder: Path, compress: str, classes: int, overlap: int, sides: list[int]
) -> list[dict[str, Any]]:
    """Return the figures of one case for each side."""
    model = str(inputs.null_network(folder, classes))
    options = ("--tile", str(TILE), "--overlap", str(overlap))
    rows: list[dict[str, Any]] = []
    for side in sides:
        raster = inputs.raster(folder, side, compress)
        runs = [command(raster, model, folder / "mask.zarr", *options) for _ in range(2)]
        best = min(runs, key=lambda run: run["seconds"])
        rows.append({
            "compress": compress, "classes": classes, "overlap": overlap, "side": side,
            "peak_rss_mib": max(run["peak_rss_bytes"] for run in runs) / 2**20,
            "seconds": best["seconds"], "seconds_per_mpx": best["seconds"] / best["pixels"] * 1e6,
        })  # fmt: skip
        rows[-1]["of_smallest"] = rows[-1]["peak_rss_mib"] / rows[0]["peak_rss_mib"]
    shutil.rmtree(folder / "mask.zarr")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench"))
    parser.add_argument("--sides", nargs="+", type=int, default=[4096, 8192, 32768])
    parser.add_argument("--compress", nargs="+", default=["deflate", "jpeg"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for compress in options.compress:
        for classes in (2, 8):
            for overlap in (TILE // 4, TILE // 2):
                for row in grow(options.folder, compress, classes, overlap, options.sides):
                    found.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
    (options.folder / "memory.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
