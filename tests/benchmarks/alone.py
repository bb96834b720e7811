"""The network alone: `alone.py RASTER MODEL BACKEND PRECISION TILE TILES RUNS` prints its seconds.

A process of its own for every case, which treats memory as the command does (`tilenet.cli.run`):
with the allocator as it comes, or after another network, torch takes longer here than in a run.
The pixels, 4,096² at the most, are in memory and on the device; what is timed is `Session.scores`
over as many tiles as the run's lattice has, of their size, and nothing is done with the answers.
A CPU that is not through after half a minute stops, and its seconds are scaled to all tiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from tilenet.geometry import Window
from tilenet.memory import return_large_arrays
from tilenet.models.session import Session, Tile, choose, open_session
from tilenet.models.store import find_model
from tilenet.sources import open_raster

SIDE, ENOUGH = 4096, 30.0


def timed(session: Session, tiles: list[Tile], tile: int, device: str) -> float:
    """Return the seconds that the network takes for tiles."""
    start = time.perf_counter()
    with closing(session.scores(tiles, (tile, tile))) as answers:
        for done, _ in enumerate(answers, 1):
            seconds = time.perf_counter() - start
            if device == "cpu" and seconds > ENOUGH:
                return seconds * len(tiles) / done
    if device != "cpu":  # what it has been told to do is not yet done
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(raster: str, model: str, backend: str, precision: str, *numbers: str) -> None:
    tile, count, runs = map(int, numbers)
    return_large_arrays()
    files = find_model(model, None, {})
    setup = choose(files, backend=backend, precision=precision, tile_pixels=tile * tile)
    session = open_session(files, setup, "uint8")
    source = open_raster(Path(raster))
    side = min(source.info.height, SIDE)
    loaded = session.load(source.read(Window(0, 0, side, side), np.zeros(3))[0])
    room = side - tile + 1
    tiles = [(loaded, (k * 257) % room, (k * 509) % room) for k in range(count)]
    timed(session, tiles[: 2 * setup.batch_size], tile, setup.device)
    seconds = [timed(session, tiles, tile, setup.device) for _ in range(runs)]
    sys.stdout.write(f"{statistics.median(seconds)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
