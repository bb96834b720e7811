"""What runs a network: the protocol that the engine sees, and the choice of a backend."""

from __future__ import annotations

import platform
import re
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from tilenet.blend import Decision
from tilenet.errors import ModelError, UsageError
from tilenet.models.devices import Precision, cores, cpu_precisions, has_cuda, usual_precision
from tilenet.models.store import ModelFiles

__all__ = [
    "LANES",
    "NOBODY",
    "Backend",
    "NetworkShape",
    "Session",
    "Setup",
    "SumsLike",
    "Tile",
    "Took",
    "Weights",
    "check_answer",
    "choose",
    "network_shape",
    "open_session",
    "usual_batch",
]

Backend = Literal["torch", "openvino", "inductor"]

_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}

Weights = tuple[NDArray[np.float64], NDArray[np.float64]]

LANES = 2
"""Blocks in flight on a device that computes beside the processor."""

Tile = tuple[Any, int, int]
"""What `Session.load` gave, and the row and column of the tile's first pixel in it."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """What a network takes and gives.

    Parameters
    ----------
    bands, channels : int
        Input and output channels.
    fixed : tuple of int or None
        The only tile height and width it takes; None if any multiple of its divisor will do.
    """

    bands: int
    channels: int
    fixed: tuple[int, int] | None


class SumsLike(Protocol):
    """Weighted sums over a rectangle, on whatever device (see `tilenet.blend.Sums`)."""

    @property
    def nonfinite(self) -> int:
        """How many scores were not finite."""

    def add(self, scores: Any, row: int, col: int, weights: Weights) -> None:
        """Add one tile's scores."""

    def take(self, rows: slice, cols: slice) -> NDArray[np.int32]:
        """Return sums, (K, h, w), good until the sums change."""

    def decide(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return classes, (h, w)."""

    def quantise(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return probabilities, (K, h, w)."""

    def shift(self, rows: int) -> None:
        """Drop the first rows; what comes free is 0."""


class Took(Protocol):
    """Takes note of what a network's work took."""

    def ran(self, start: float, stop: float) -> None:
        """Note a forward, in seconds of the system's clock; they come in the order of their starts.

        On a device that computes beside the processor, with what is added up there.
        """

    def prepared(self, seconds: float) -> None:
        """Note that the network was converted, loaded or compiled."""


class _Nobody:
    def ran(self, start: float, stop: float) -> None:
        pass

    def prepared(self, seconds: float) -> None:
        pass


NOBODY = _Nobody()
"""Takes note of nothing."""


class Session(Protocol):
    """A network that is ready to run on one device.

    A tile's scores depend on its own pixels only, not on its place in a batch or its companions
    (`tilenet.models.contract` checks it); nor, with OpenVINO, on the number of threads.
    """

    channels: int

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while tiles are forwarded and added up: by one block, on a device by two."""

    def load(self, pixels: NDArray[Any]) -> Any:
        """Bring a block's pixels, (C, H, W) in their own dtype, to the device."""

    def scores(
        self, tiles: Sequence[Tile], shape: tuple[int, int], took: Took = NOBODY
    ) -> Generator[Any]:
        """Yield the scores, (K, h, w) float32, of tiles of one shape, in order; tell what it took.

        Tiles may come from several blocks or images. A yielded array is good until the next. Close
        the generator, in the thread that took from it, if not all are taken.
        """

    def sums(self, height: int, width: int, decision: Decision) -> SumsLike:
        """Return empty sums on the device."""

    def reuse(self, sums: SumsLike) -> None:
        """Take back sums of which nothing is needed any more: the next may have their memory."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a network runs on. Resolved once; part of a plan's identity, but for the thread count.

    What does not change the scores is not: on CPUs, the batch size.

    Parameters
    ----------
    backend : {"torch", "openvino", "inductor"}
        Library; inductor is torch with the network compiled.
    device : str
        "cpu", "cuda" or "cuda:i".
    precision : {"fp32", "bf16", "fp16"}
        Arithmetic of the network; sums are always int32.
    threads : int
        CPU threads.
    batch_size : int
        Tiles per forward call on a GPU. A CPU forwards them one by one: there, what several at a
        time give differs in the last bits from what one does.
    why : str
        The choice in words.
    """

    backend: Backend
    device: str
    precision: Precision
    threads: int
    batch_size: int
    why: str

    @property
    def device_class(self) -> str:
        """The kind of device; machines of one kind give the same bytes."""
        return self.device.partition(":")[0]

    @property
    def tiles_per_call(self) -> int:
        """How many tiles are forwarded together."""
        return 1 if self.device == "cpu" else self.batch_size

    @property
    def library(self) -> str:
        """The package whose version decides the bytes."""
        return "openvino" if self.backend == "openvino" else "torch"


def network_shape(files: ModelFiles) -> NetworkShape:
    """Return a model's shape without loading its weights.

    Raises
    ------
    ModelError
        The network does not fit its card.
    """
    if files.kind == "onnx":
        from tilenet.models.openvino_graph import onnx_shape

        shape = onnx_shape(files.weights)
    else:
        config = files.config
        shape = NetworkShape(int(config.get("in_channels", 3)), int(config.get("classes", 1)), None)
    if shape.bands != files.card.band_count:
        raise ModelError(
            f"the network takes {shape.bands} bands, its card says {files.card.band_count}",
            files.weights,
            "correct bands in tilenet.json",
        )
    files.card.check_channels(shape.channels, str(files.weights))
    return shape


def check_answer(answer: tuple[int, int], shape: tuple[int, int], lost: int, where: str) -> None:
    """Raise ModelError unless a network's answer covers its tile.

    Parameters
    ----------
    answer : tuple of int
        Height and width of the scores.
    shape : tuple of int
        Of the tile.
    lost : int
        Pixels on each axis that the card's margin adds to what the network sees; with none, the
        answer must be the tile.
    where : str
        The model.
    """
    if answer == shape or (lost and answer[0] >= shape[0] and answer[1] >= shape[1]):
        return
    seen = (shape[0] + lost, shape[1] + lost)
    raise ModelError(
        f"a tile of {seen[0]}×{seen[1]} gives scores of {answer[0]}×{answer[1]}",
        where,
        "the network must keep the size, or its tilenet.json name the margin it loses",
    )


def _check_device(wanted: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", wanted):
        raise UsageError(f"no device {wanted}", "--device", "choose auto, cpu, cuda or cuda:i")


def _choose_device(wanted: str) -> str:
    kind, _, index = wanted.partition(":")
    if kind == "auto":
        return "cuda" if has_cuda() else "cpu"
    if kind == "cuda" and not has_cuda():
        raise ModelError("no CUDA device on this machine", "--device", "use --device cpu")
    if index:
        import torch

        if int(index) >= torch.cuda.device_count():
            raise ModelError("no such CUDA device", f"--device {wanted}", "choose another, or cpu")
    return wanted


def _choose_precision(device: str, wanted: str) -> Precision:
    asked = _PRECISIONS.get(wanted)
    if asked is None and wanted != "auto":
        raise UsageError(f"no precision {wanted}", "--precision", "choose auto, fp32, bf16 or fp16")
    if asked is None:
        return usual_precision(device)
    if device == "cpu" and asked not in cpu_precisions():
        raise ModelError(
            f"this processor has no {asked} arithmetic", "--precision", "use --precision fp32"
        )
    return asked


def _choose_backend(files: ModelFiles, device: str, wanted: str) -> Backend:
    """Return the library for a device; raises ModelError if it, or what it needs, is not here."""
    has_openvino = find_spec("openvino") is not None
    if wanted == "openvino" or files.kind == "onnx":
        if not has_openvino:
            raise ModelError("OpenVINO is not installed", "--backend", "pip install openvino")
        return "openvino"
    if wanted == "inductor":
        from tilenet.models.inductor import check_compiler

        check_compiler(device.partition(":")[0])
        return "inductor"
    return "torch" if wanted == "torch" or device != "cpu" or not has_openvino else "openvino"


def choose(
    files: ModelFiles,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    tile_pixels: int = 1 << 20,
    threads: int | None = None,
) -> Setup:
    """Choose the fastest way to run a model that this machine has.

    Parameters
    ----------
    files : ModelFiles
        The model.
    device, backend, precision : str
        What was asked for; "auto" leaves the choice.
    batch_size : int or None
        Tiles per call; None chooses by tile size.
    tile_pixels : int
        Pixels of one tile.
    threads : int or None
        CPU threads; None takes all cores.

    Raises
    ------
    ModelError
        The machine cannot do what was asked for.
    UsageError
        Nothing is called so.
    """
    if backend not in ("auto", *get_args(Backend)):
        do = "choose auto, torch, openvino or inductor"
        raise UsageError(f"no backend {backend}", "--backend", do)
    _check_device(device)
    if files.kind == "onnx" and backend in ("torch", "inductor"):
        raise ModelError(f"{backend} cannot run ONNX", "--backend", "use --backend openvino")
    chosen_device = _choose_device(
        "cpu" if backend == "openvino" or files.kind == "onnx" else device
    )
    if chosen_device != device and device != "auto":
        raise ModelError(f"OpenVINO does not run on {device}", "--device", "use --device cpu")
    chosen = _choose_backend(files, chosen_device, backend)
    chosen_precision = _choose_precision(chosen_device, precision)
    why = {
        ("openvino", "cpu"): f"OpenVINO is the fastest on this {platform.machine()} CPU",
        ("torch", "cpu"): "OpenVINO is not used here",
        ("inductor", "cpu"): "the network is compiled",
    }.get((chosen, chosen_device.partition(":")[0]), "a CUDA device is there")
    batch_size = batch_size or usual_batch(chosen_device, tile_pixels)
    return Setup(chosen, chosen_device, chosen_precision, threads or cores(), batch_size, why)


def usual_batch(device: str, tile_pixels: int) -> int:
    """Return how many tiles of so many pixels go into a call where memory is no matter."""
    # On CPUs one tile at a time fills the cores; a GPU wants about 8 Mpx, in its two lanes.
    return 1 if device == "cpu" else min(64, max(1, (1 << 22) // max(1, tile_pixels)))


def open_session(files: ModelFiles, setup: Setup, dtype: str) -> Session:
    """Load a model on its backend.

    Parameters
    ----------
    files : ModelFiles
        The model.
    setup : Setup
        From `choose`.
    dtype : str
        Numpy name of the pixels.

    Raises
    ------
    ModelError
        The model does not load, or does not fit its card.
    """
    if setup.backend == "openvino":
        from tilenet.models.openvino_backend import OpenVinoSession

        return OpenVinoSession(files, setup, dtype)
    from tilenet.models.torch_backend import TorchSession

    return TorchSession(files, setup)
