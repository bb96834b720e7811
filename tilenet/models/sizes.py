"""Which tile and batch fit into a machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilenet.memory import memory_limit
from tilenet.models.footprint import footprint
from tilenet.models.session import Setup, choose, cores, usual_batch
from tilenet.models.store import ModelFiles

__all__ = ["Sizes", "Wanted", "choose_sizes"]

_SHARE = 0.85  # of memory; the system's own pages have the rest
_ENGINE = 200 << 20  # bytes beside the network: libraries, blocks, sums, masks
_PLENTY = 1 << 11
"""Bytes per pixel that no network is known to need.

A few hundred are usual, U-Net++ on a ResNet-152 takes 1,900 on torch. Where there are as many,
nothing is tried.
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for.

    Parameters
    ----------
    tiles : tuple of int
        Pixels a side, the best first; one, if it was asked for.
    device, backend, precision : str
        "auto" leaves the choice.
    batch_size : int or None
        Tiles per call; None leaves the choice.
    """

    tiles: tuple[int, ...]
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that fit, and what runs them.

    Parameters
    ----------
    tile : int
        Pixels a side.
    setup : Setup
        With the batch size.
    why : str
        In words, if memory made the tile smaller; else "".
    """

    tile: int
    setup: Setup
    why: str = ""


def choose_sizes(files: ModelFiles, wanted: Wanted, threads: int | None = None) -> Sizes:
    """Choose what runs a model, the first tile and with it the largest batch that memory takes.

    It is memory as a whole that counts, not what is free: so the same command chooses the same.

    Parameters
    ----------
    files : ModelFiles
        The model.
    wanted : Wanted
        What was asked for.
    threads : int or None
        CPU threads, of as many processes as there are such shares of the cores; None: all.

    Raises
    ------
    ModelError
        The machine cannot do what was asked for.
    """
    tile = wanted.tiles[0]
    setup = choose(
        files,
        device=wanted.device,
        backend=wanted.backend,
        precision=wanted.precision,
        batch_size=wanted.batch_size,
        tile_pixels=tile * tile,
        threads=threads,
    )
    wished, room = Sizes(tile, setup), max(0, _SHARE * _memory(setup) - _ENGINE)
    possible = list(_possible(setup, wanted))
    if len(possible) == 1 or _pixels(wished) * _PLENTY <= room:
        return wished
    needs = footprint(files, setup)
    if needs is None:
        return wished
    most = needs.pixels_in(room)
    found = next((one for one in possible if _pixels(one) <= most), possible[-1])
    if found.tile == tile:
        return found
    gib = (needs.fixed + needs.per_pixel * _pixels(Sizes(tile, found.setup))) / (1 << 30)
    why = f"the network would take {gib:.1f} GiB, and may take {room / (1 << 30):.1f}"
    return replace(found, why=why)


def _possible(setup: Setup, wanted: Wanted) -> Iterator[Sizes]:
    """Yield what may be chosen, the best first."""
    for tile in wanted.tiles:
        batch = wanted.batch_size or usual_batch(setup.device, tile * tile)
        yield Sizes(tile, replace(setup, batch_size=batch))
        while wanted.batch_size is None and batch > 1:
            batch //= 2
            yield Sizes(tile, replace(setup, batch_size=batch))


def _memory(setup: Setup) -> float:
    """Return the bytes that a process has: its share of the machine, or a GPU for itself."""
    if setup.device == "cpu":
        return memory_limit() * min(1.0, setup.threads / cores())
    import torch

    return float(torch.cuda.get_device_properties(setup.device).total_memory)


def _pixels(sizes: Sizes) -> int:
    """Return how many pixels are in the network at one time."""
    setup, in_one = sizes.setup, sizes.setup.batch_size * sizes.tile * sizes.tile
    if setup.backend == "openvino":
        from tilenet.models.openvino_backend import streams_for

        return in_one * streams_for(setup.threads, in_one)
    if setup.device == "cpu":
        return in_one
    from tilenet.models.lanes import LANES

    return in_one * LANES
