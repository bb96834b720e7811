"""Lanes on a device: the order in which what belongs to one block is done there.

Two blocks are in flight: while the finished rows of one are fetched and stored, the device computes
the other's tiles. Tensors of the CPU go the same way, where nothing needs to wait for anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Lane", "Upload", "open_lane", "to_device", "upload"]


@dataclass(frozen=True, slots=True)
class Upload:
    """Pixels on their way to a device.

    Parameters
    ----------
    pixels : torch.Tensor
        (C, H, W) there.
    ready : torch.cuda.Event or None
        When they have arrived; None if they are there.
    """

    pixels: torch.Tensor
    ready: torch.cuda.Event | None = None


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device in the order of the current stream, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _uploads(device: torch.device) -> torch.cuda.Stream:
    """Return a device's stream for uploads: one, whose memory serves again."""
    # Streams of a priority come from a pool of 32 that goes round: another priority has another.
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # torch
    return stream


def upload(pixels: NDArray[Any], device: torch.device) -> Upload:
    """Begin to copy pixels to a device, beside what it computes."""
    if device.type != "cuda":
        return Upload(to_device(pixels, device))
    stream = _uploads(device)
    with torch.cuda.stream(stream):
        return Upload(to_device(pixels, device), stream.record_event())


class Lane:
    """A lane of a device that does all at once, as it is told."""

    def entered(self, uploads: Iterable[Upload]) -> AbstractContextManager[None]:
        """Let what this thread does on the device happen here, once the pixels have arrived."""
        del uploads
        return nullcontext()


class _CudaLane(Lane):
    """A stream of its own, which follows what the caller has begun and is followed by the rest."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch

    @contextmanager
    def entered(self, uploads: Iterable[Upload]) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                for one in uploads:
                    assert one.ready is not None
                    self._stream.wait_event(one.ready)
                    one.pixels.record_stream(self._stream)  # nobody else's memory until then
                yield
        finally:
            outside.wait_stream(self._stream)


def open_lane(device: torch.device) -> Lane:
    """Open a lane on a device."""
    return _CudaLane(device) if device.type == "cuda" else Lane()
