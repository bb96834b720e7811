"""PyTorch: channels-last, bf16 where there is hardware for it. The same network code everywhere.

Inductor is the same with the network compiled (`tilenet.models.inductor`).

On CUDA a block goes up once in its own dtype, beside what is computed; tiles are views of it there,
and everything up to the classes stays on the device (`TorchSums`), where two blocks are in flight.
On the CPU numpy adds up a tile, a few rows at a time, while the next is forwarded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from itertools import batched
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilenet.blend import AXIS_ONE, ONE, Decision, Sums
from tilenet.errors import ModelError
from tilenet.memory import keep_large_arrays
from tilenet.models.build import build_network
from tilenet.models.inductor import CompiledNetwork
from tilenet.models.lanes import Lane, Upload, open_lane, to_device, upload
from tilenet.models.session import (
    LANES,
    NOBODY,
    Setup,
    SumsLike,
    Tile,
    Took,
    Weights,
    check_answer,
)
from tilenet.models.store import ModelFiles

__all__ = ["TorchSession", "TorchSums"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_BATCH_NORMS = (
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
)  # fmt: skip

_FLAGS: tuple[tuple[Any, str, object], ...] = (
    (torch.backends.cudnn, "enabled", True),
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cudnn, "deterministic", True),
    # Not by `allow_tf32`: it cannot be asked for where a program has set these one by one.
    (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]  # torch
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
)


class _Exact:
    """Makes fp32 mean fp32, not TF32, and chooses no kernel by a race that may end otherwise.

    The flags are the process', and CUDA's alone: the first who enters sets them, the last who
    leaves puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._flags = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._set()
            self._inside += 1

    def _set(self) -> None:
        for owner, name, wanted in _FLAGS:
            found = getattr(owner, name)
            # "none" is exact too, and once set it would no longer follow what is above it.
            if found not in (wanted, "none"):
                self._flags.callback(setattr, owner, name, found)
                setattr(owner, name, wanted)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._flags.close()


_exact = _Exact()


def _cast(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a network, all but its BatchNorms, which take any input and give the same.

    Of a running variance bf16 keeps 8 bits; fp16 ends at 65504, and beyond a channel is constant.
    """
    norms = [one for one in network.modules() if isinstance(one, _BATCH_NORMS)]
    exact = [one.state_dict() for one in norms]
    network.to(dtype)
    for norm, state in zip(norms, exact, strict=True):
        norm.float().load_state_dict(state)
    return network


def _axis(weights: NDArray[np.float64], factor: float, device: torch.device) -> torch.Tensor:
    """Return the weights of one axis on a device: few differ, and every tile takes two."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return _axis_there(weights.tobytes(), factor, device, stream)


@lru_cache(maxsize=256)
def _axis_there(
    weights: bytes, factor: float, device: torch.device, stream: torch.cuda.Stream | None
) -> torch.Tensor:
    """Return weights for one stream: another would have to wait for them, and free them later."""
    del stream
    return to_device((np.frombuffer(weights) * factor).astype(np.float32), device)


class TorchSums:
    """`tilenet.blend.Sums` on a torch device; the same integers, bit for bit.

    Parameters
    ----------
    channels, height, width : int
        Shape of the sums.
    decision : Decision
        Activation and threshold.
    device : torch.device
        Where the sums live.
    """

    def __init__(
        self, channels: int, height: int, width: int, decision: Decision, device: torch.device
    ) -> None:
        self._sums = torch.zeros((channels, height, width), dtype=torch.int32, device=device)
        self._decision = decision
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def nonfinite(self) -> int:
        """How many scores were not finite."""
        return int(self._nonfinite)

    def add(self, scores: torch.Tensor, row: int, col: int, weights: Weights) -> None:
        """Add one tile's scores, (K, h, w) float32; what lies outside is cut off."""
        height = min(scores.shape[1], self._sums.shape[1] - row)
        width = min(scores.shape[2], self._sums.shape[2] - col)
        scores = scores[:, :height, :width]
        # isfinite by way of x − x, which is NaN for NaN and ±Inf: no wait for the device.
        bad = (scores - scores) != 0
        self._nonfinite += bad.sum()
        scores = scores.masked_fill(bad, 0.0)
        scale = float(AXIS_ONE) / (1 << self._decision.bits)
        if self._decision.bits:
            limit = float(1 << self._decision.bits)
            scores = scores.clamp(-limit, limit)
        rows = _axis(weights[0], scale, scores.device)
        cols = _axis(weights[1], float(AXIS_ONE), scores.device)
        plane = rows[:height, None] * cols[None, :width]
        whole = (scores * plane).to(torch.int32)
        self._sums[:, row : row + height, col : col + width] += whole

    def take(self, rows: slice, cols: slice) -> NDArray[np.int32]:
        """Return sums, (K, h, w), good until the sums change."""
        taken: NDArray[np.int32] = self._sums[:, rows, cols].cpu().numpy()
        return taken

    def decide(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return classes, (h, w): `tilenet.blend.decide` on the device."""
        sums, channels = self._sums[:, rows, cols], self._sums.shape[0]
        if channels == 1:
            return (sums[0] >= self._decision.level).to(torch.uint8).cpu().numpy()
        # torch.argmax over the classes is many times slower than this running maximum.
        best = sums[0].clone()
        index = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for k in range(1, channels):
            index.masked_fill_(sums[k] > best, k)
            torch.maximum(best, sums[k], out=best)
        if self._decision.thresholded(channels):
            index = (index + 1) * (best >= self._decision.level)
        return index.cpu().numpy()

    def quantise(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return probabilities, (K, h, w): `tilenet.blend.quantise` on the device."""
        one = ONE >> self._decision.bits
        wide = self._sums[:, rows, cols].to(torch.int64) * 255 + one // 2
        whole = torch.div(wide, one, rounding_mode="floor").clamp(0, 255)
        return whole.to(torch.uint8).cpu().numpy()

    def shift(self, rows: int) -> None:
        """Drop the first rows, move the others up, clear what comes free."""
        rows = min(rows, self._sums.shape[1])
        kept = self._sums[:, rows:].clone()
        self._sums.zero_()
        self._sums[:, : kept.shape[1]] = kept


class TorchSession:
    """A network on torch (see `tilenet.models.session.Session`).

    Parameters
    ----------
    files : ModelFiles
        SMP folder.
    setup : Setup
        Backend ("torch" or "inductor"), device, precision, threads, batch size.
    """

    def __init__(self, files: ModelFiles, setup: Setup) -> None:
        self._device = torch.device(setup.device)
        self._on_device = self._device.type != "cpu"
        self._dtype = _DTYPES[setup.precision]
        if setup.device_class == "cpu":
            torch.set_num_threads(setup.threads)
        network = _cast(build_network(files), self._dtype).to(self._device)
        network = network.to(memory_format=torch.channels_last)
        self._network: Callable[[torch.Tensor], torch.Tensor] = (
            CompiledNetwork(network, files.card.name) if setup.backend == "inductor" else network
        )
        self._activation = files.card.activation
        self._lost = sum(files.card.margin)
        self._where = str(files.weights.parent)
        self._offset = self._per_band(files.card.offset)
        self._scale = self._per_band(files.card.scale)
        self.channels = int(files.config.get("classes", 1))
        self._together = setup.tiles_per_call
        lanes = LANES if self._on_device else 1
        self.lock: AbstractContextManager[Any] = threading.BoundedSemaphore(lanes)
        self._lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(lanes):
            self._lanes.put(open_lane(self._device))

    def _per_band(self, values: NDArray[np.float64]) -> torch.Tensor:
        tensor = torch.tensor(np.asarray(values), dtype=torch.float32, device=self._device)
        return tensor[None, :, None, None]

    def load(self, pixels: NDArray[Any]) -> Upload:
        """Begin to bring pixels, (C, H, W), to the device in their own dtype."""
        return upload(pixels, self._device)

    def sums(self, height: int, width: int, decision: Decision) -> Sums | TorchSums:
        """Return empty sums on the device."""
        if self._on_device:
            return TorchSums(self.channels, height, width, decision, self._device)
        return Sums(self.channels, height, width, decision)

    def reuse(self, sums: SumsLike) -> None:
        """Let go of sums: torch keeps a device's memory itself."""

    def scores(
        self, tiles: Sequence[Tile], shape: tuple[int, int], took: Took = NOBODY
    ) -> Generator[Any]:
        """Yield the scores of tiles, (K, h, w) float32, in order.

        Until it ends, what the caller's thread does on the device follows in the same order.
        """
        lane = self._lanes.get()
        try:
            batches = batched(tiles, self._together)
            with lane.entered({id(one): one for one, _, _ in tiles}.values()):
                if self._on_device:  # which computes by itself; the caller waits for its sums
                    with self._timed(took):
                        for batch in batches:
                            yield from self._forward(batch, shape)
                else:
                    yield from self._ahead(batches, shape, took)
        finally:
            self._lanes.put(lane)

    @contextmanager
    def _timed(self, took: Took) -> Iterator[None]:
        """Tell how long the network ran within, and how long it was compiled."""
        start, before = time.time(), self._compiling
        yield
        spent = self._compiling - before
        took.prepared(spent)
        took.ran(start + spent, time.time())

    @property
    def _compiling(self) -> float:
        """Seconds that were spent compiling so far."""
        network = self._network
        return network.compiling if isinstance(network, CompiledNetwork) else 0.0

    def _ahead(
        self, batches: Iterable[tuple[Tile, ...]], shape: tuple[int, int], took: Took
    ) -> Iterator[NDArray[np.float32]]:
        """Yield scores on the CPU while the next batch is forwarded."""
        keep_large_arrays()

        def forward(batch: tuple[Tile, ...]) -> torch.Tensor:
            with self._timed(took):
                return self._forward(batch, shape)

        with ThreadPoolExecutor(1, "tilenet-torch") as ahead:
            running: deque[Future[torch.Tensor]] = deque()
            for batch in batches:
                running.append(ahead.submit(forward, batch))
                if len(running) > 1:
                    yield from running.popleft().result().numpy()
            for last in running:
                yield from last.result().numpy()

    def _forward(self, batch: Sequence[Tile], shape: tuple[int, int]) -> torch.Tensor:
        """Return the scores of one batch, (n, K, h, w)."""
        height, width = (side + self._lost for side in shape)
        views = [one.pixels[:, r : r + height, c : c + width] for one, r, c in batch]
        views += [torch.zeros_like(views[0])] * (self._together - len(views))
        with torch.inference_mode(), _exact if self._on_device else nullcontext():
            raw = torch.stack(views).to(torch.float32)  # (N, C, h, w)
            inputs = ((raw - self._offset) / self._scale).to(
                self._dtype, memory_format=torch.channels_last
            )
            try:
                logits = self._network(inputs).to(torch.float32)  # (N, K, h, w)
            except (
                NotImplementedError, TypeError, ValueError, AttributeError, AssertionError
            ) as error:  # fmt: skip
                raise ModelError(
                    f"it cannot run: {error}", self._where, "check config.json"
                ) from error
            check_answer((logits.shape[-2], logits.shape[-1]), shape, self._lost, self._where)
            logits = logits[..., : shape[0], : shape[1]]
            if self._activation == "softmax":
                logits = logits.softmax(dim=1)
            elif self._activation == "sigmoid":
                logits = logits.sigmoid()
            scores: torch.Tensor = logits.contiguous()[: len(batch)]
            return scores
