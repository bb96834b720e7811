"""Lanes on a device: what a block in flight has of its own there.

Two blocks are in flight: while the finished rows of one are fetched and stored, the device computes
the other's tiles. Tensors of the CPU go the same way, where nothing needs to wait for anything.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["LANES", "Lane", "Upload", "open_lane", "to_device", "upload"]

LANES = 2
"""Blocks in flight on a device."""

_WARM_UP = 3  # calls before a capture, which let libraries choose and allocate
_MOST_GRAPHS = 4  # tile shapes; each holds the memory of a forward

_logger = logging.getLogger(__name__)

Function = Callable[[torch.Tensor], torch.Tensor]


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


def upload(pixels: NDArray[Any], device: torch.device) -> Upload:
    """Begin to copy pixels to a device, beside what it computes."""
    if device.type != "cuda":
        return Upload(to_device(pixels, device))
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        return Upload(to_device(pixels, device), stream.record_event())


class Lane:
    """The order in which a device that needs no lanes does things: as it is told."""

    def entered(self, uploads: Iterable[Upload]) -> AbstractContextManager[None]:
        """Compute what follows here, once the pixels have arrived."""
        del uploads
        return nullcontext()

    def run(self, function: Function, inputs: torch.Tensor) -> torch.Tensor:
        """Return what a function gives, good until it runs here again."""
        return function(inputs)


class _CudaLane(Lane):
    """A stream, and what the network does for each shape as one CUDA graph.

    A graph starts all kernels of a forward at once; Python starts one after the other, which for
    small tiles takes longer than they do.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: OrderedDict[tuple[int, ...], Function | None] = OrderedDict()

    @contextmanager
    def entered(self, uploads: Iterable[Upload]) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            for one in uploads:
                assert one.ready is not None
                self._stream.wait_event(one.ready)
                one.pixels.record_stream(self._stream)  # its memory is ours until then
            yield
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def run(self, function: Function, inputs: torch.Tensor) -> torch.Tensor:
        shape = tuple(inputs.shape)
        if shape not in self._graphs:  # a single image is done before a capture has paid
            self._graphs[shape] = None
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return function(inputs)
        graph = self._graphs[shape]
        if graph is None:
            graph = self._graphs[shape] = self._captured(function, inputs)
        self._graphs.move_to_end(shape)
        return graph(inputs)

    def _captured(self, function: Function, inputs: torch.Tensor) -> Function:
        """Return a function as a graph, or itself if it cannot be one; both give the same."""
        start = time.perf_counter()
        try:
            graph = _Graph(function, inputs.clone(), self._stream)
            same = torch.equal(graph(inputs), function(inputs))
        except RuntimeError as error:  # torch's, CUDA's: also if memory is short
            torch.cuda.set_stream(self._stream)  # a capture that fails leaves its own behind
            _logger.info("the network runs without a CUDA graph: %s", str(error).split("\n")[0])
            return function
        if not same:
            _logger.info("the network runs without a CUDA graph, which gives other scores")
            return function
        seconds = time.perf_counter() - start
        _logger.info("captured the network as a CUDA graph in %.1f s", seconds)
        return graph


class _Graph:
    """A function of one tensor whose kernels were captured; its answer is good until the next.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function: Function, inputs: torch.Tensor, stream: torch.cuda.Stream) -> None:
        for _ in range(_WARM_UP):
            function(inputs)
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        # Other threads upload pixels meanwhile, which may allocate.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._answer = function(inputs)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._answer


def open_lane(device: torch.device) -> Lane:
    """Open a lane on a device."""
    return _CudaLane(device) if device.type == "cuda" else Lane()
