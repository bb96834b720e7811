"""Which tile and batch fit into a machine's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilenet.memory import memory_limit
from tilenet.models.devices import cores
from tilenet.models.footprint import Footprint, footprint
from tilenet.models.session import LANES, Setup, choose, usual_batch
from tilenet.models.store import ModelFiles

__all__ = ["Sizes", "Wanted", "choose_sizes", "decide"]

_SHARE = 0.85  # of memory; the system's own pages have the rest
_ENGINE = 200 << 20  # bytes beside the network: libraries, blocks, masks
_BLOCK_SIDE = 1536  # pixels, a block's usual width: the sums are one tile high
_LIBRARIES = 1 << 30  # bytes of torch with a network loaded, at the most
_PLENTY = 1 << 11
"""Bytes per pixel that hardly a network needs.

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
    channels : int
        What the network gives, K.
    device, backend, precision : str
        "auto" leaves the choice.
    batch_size : int or None
        Tiles per call; None leaves the choice.
    """

    tiles: tuple[int, ...]
    channels: int
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

    It is memory as a whole that counts, not what is free, and not among how many processes it is
    shared: the tile decides the mask, and the same command chooses the same however it is run.

    Parameters
    ----------
    files : ModelFiles
        The model.
    wanted : Wanted
        What was asked for.
    threads : int or None
        CPU threads; None: all cores.

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
    wished = Sizes(tile, setup)
    if len(wanted.tiles) == 1 and len(list(_batches(setup, tile, wanted))) == 1:
        return wished
    room = _SHARE * _memory(setup)
    surely = Footprint(_LIBRARIES + 2 * files.weights.stat().st_size, _PLENTY)
    if _bytes(surely, setup, tile, wanted.channels) <= room:
        return wished
    needs = footprint(files, setup)
    return wished if needs is None else decide(needs, room, setup, wanted)


def decide(needs: Footprint, room: float, setup: Setup, wanted: Wanted) -> Sizes:
    """Return the first tile of which one fits, and the largest batch of it.

    Parameters
    ----------
    needs : Footprint
        What the network takes.
    room : float
        Bytes that a run may take.
    setup : Setup
        Backend and device.
    wanted : Wanted
        What was asked for.
    """
    alone = replace(setup, batch_size=1)

    def fits(one: Setup, tile: int) -> bool:
        return _bytes(needs, one, tile, wanted.channels) <= room

    tile = next((one for one in wanted.tiles if fits(alone, one)), wanted.tiles[-1])
    sizes = [replace(setup, batch_size=one) for one in _batches(setup, tile, wanted)]
    batch = next((one for one in sizes if fits(one, tile)), sizes[-1])
    if tile == wanted.tiles[0]:
        return Sizes(tile, batch)
    why = f"a run would take {_said(needs, alone, wanted.tiles[0], wanted.channels)}, and may take "
    why += f"{room / (1 << 20):,.0f} MiB"
    if not fits(alone, tile):
        why += f"; this takes {_said(needs, alone, tile, wanted.channels)}, and may fail"
    return Sizes(tile, batch, why)


def _said(needs: Footprint, setup: Setup, tile: int, channels: int) -> str:
    size = _bytes(needs, setup, tile, channels) / (1 << 20)
    return f"about {size:,.0f} MiB" if size < math.inf else "more than could be tried"


def _batches(setup: Setup, tile: int, wanted: Wanted) -> Iterator[int]:
    """Yield the batch sizes that may be chosen, the best first."""
    batch = wanted.batch_size or usual_batch(setup.device, tile * tile)
    yield batch
    while wanted.batch_size is None and batch > 1:
        batch //= 2
        yield batch


def _memory(setup: Setup) -> int:
    """Return the bytes that this process may have; of a GPU, all of them."""
    if setup.device == "cpu":
        return memory_limit()
    import torch

    return int(torch.cuda.get_device_properties(setup.device).total_memory)


def _bytes(needs: Footprint, setup: Setup, tile: int, channels: int) -> float:
    """Return what a run takes: the network, and the sums of every block in flight."""
    calls = _at_once(setup, tile)
    lanes = calls if setup.device != "cpu" else 1
    sums = 4 * channels * tile * (_BLOCK_SIDE + tile) * lanes
    return needs.of(calls * setup.tiles_per_call * tile * tile) + sums + _ENGINE


def _at_once(setup: Setup, tile: int) -> int:
    """Return how many calls are in the network at one time, on a machine with all its cores."""
    if setup.backend == "openvino":
        from tilenet.models.openvino_backend import streams_for

        return streams_for(cores(), tile * tile)
    return 1 if setup.device == "cpu" else LANES
