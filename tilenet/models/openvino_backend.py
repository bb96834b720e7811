"""OpenVINO on CPUs: normalising and activation inside the compiled graph, which is kept on disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.blend import Decision, Sums
from tilenet.errors import ModelError, blame
from tilenet.models.compiled import compiled_name, keep_compiled, kept_compiled
from tilenet.models.openvino_graph import core, graph_of, makers, ov
from tilenet.models.session import NOBODY, Setup, SumsLike, Tile, Took, check_answer
from tilenet.models.store import ModelFiles

__all__ = ["OpenVinoSession", "streams_for"]

_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Tile shapes kept compiled, and their pixels: a folder of images has few, and each has activations.
_MAX_COMPILED, _MAX_COMPILED_PIXELS = 8, 4 << 20
# Large tiles: all cores on one, while the last one's scores are added up. Small ones: a stream of
# its own for each, because cores that share a small tile wait for each other; unless it is alone.
_SMALL_TILE, _MOST_STREAMS = 1 << 18, 4  # pixels; each stream holds its own activations


def streams_for(threads: int, pixels: int) -> int:
    """Return how many calls of so many pixels run at one time, if there are several."""
    return min(_MOST_STREAMS, threads) if pixels <= _SMALL_TILE else 1


class OpenVinoSession:
    """A network on the CPU through OpenVINO (see `tilenet.models.session.Session`).

    Parameters
    ----------
    files : ModelFiles
        SMP folder or ONNX file.
    setup : Setup
        Precision, threads, batch size.
    dtype : str
        Numpy name of the pixels: the graph takes them as they are.
    """

    def __init__(self, files: ModelFiles, setup: Setup, dtype: str) -> None:
        self._files, self._dtype = files, dtype
        self._where = str(files.weights)
        self._lost = sum(files.card.margin)
        self._setup = setup
        self._compiled: OrderedDict[tuple[int, int], list[ov.InferRequest]] = OrderedDict()
        self._spare: Sums | None = None
        self.channels = (
            int(files.config.get("classes", 1)) if files.kind == "smp"
            else int(self._model.outputs[0].partial_shape[1].get_length())
        )  # fmt: skip
        self.lock = threading.Lock()

    def load(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return the pixels: they are where the CPU reads them."""
        return pixels

    def sums(self, height: int, width: int, decision: Decision) -> Sums:
        """Return empty sums."""
        shape = (self.channels, height, width)
        spare, self._spare = self._spare, None
        return Sums(*shape, decision) if spare is None else spare.emptied(*shape, decision)

    def reuse(self, sums: SumsLike) -> None:
        """Keep sums for the next block: new pages from the system cost more than adding."""
        assert isinstance(sums, Sums)
        self._spare = sums

    @cached_property
    def _model(self) -> ov.Model:
        """The graph from raw pixels to scores: not needed where all it compiles to was kept."""
        return graph_of(self._files, self._dtype)

    def _compile(self, shape: tuple[int, int], streams: int) -> ov.CompiledModel:
        """Return the network for tiles of a shape; a process keeps what it needs first on disk."""
        options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self._setup.precision],
            "INFERENCE_NUM_THREADS": self._setup.threads,
            "NUM_STREAMS": streams,
        }
        card = self._files.card
        ends = (card.offset.tolist(), card.scale.tolist(), card.activation, card.margin)
        own = (self._files.sha256, *ends, self._dtype, shape, options)
        name = compiled_name((*own, *makers()))
        kept = kept_compiled(name)
        if kept is not None:
            with suppress(RuntimeError):
                content = ov.Tensor(np.frombuffer(kept, np.uint8))
                return core().import_model(content, "CPU", options)
        model = self._model.clone()
        bands = model.inputs[0].partial_shape[1].get_length()
        try:
            model.reshape([1, bands, *(side + self._lost for side in shape)])
            compiled = core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise blame(
                ModelError(
                    f"the network does not take tiles of {shape[0]}×{shape[1]}: {error}",
                    self._where,
                    "choose another --tile, or set divisor in its tilenet.json",
                )
            ) from error
        if not self._compiled:  # a folder of images may have thousands of shapes
            with suppress(RuntimeError):  # OpenVINO's own: it is compiled again
                # Not getbuffer: Python 3.12.1 breaks down over such a view in a reference cycle.
                keep_compiled(name, compiled.export_model().getvalue())
        return compiled

    def _requests(self, shape: tuple[int, int], tiles: int) -> list[ov.InferRequest]:
        """Return requests for tiles of a shape, one more than run at a time."""
        streams = streams_for(self._setup.threads, shape[0] * shape[1]) if tiles > 1 else 1
        requests = self._compiled.get(shape, [])
        if len(requests) <= streams:
            compiled = self._compile(shape, streams)
            out = compiled.outputs[0].shape
            check_answer((out[2], out[3]), shape, self._lost, self._where)
            requests = [compiled.create_infer_request() for _ in range(streams + 1)]
            self._compiled[shape] = requests
        self._compiled.move_to_end(shape)
        while len(self._compiled) > 1 and (
            len(self._compiled) > _MAX_COMPILED
            or sum(h * w for h, w in self._compiled) > _MAX_COMPILED_PIXELS
        ):
            self._compiled.popitem(last=False)
        return requests

    def scores(
        self, tiles: Sequence[Tile], shape: tuple[int, int], took: Took = NOBODY
    ) -> Generator[NDArray[np.float32]]:
        """Yield the scores of tiles; a yielded array is good until the next one is asked for."""
        start = time.perf_counter()
        free = deque(self._requests(shape, len(tiles)))
        took.prepared(time.perf_counter() - start)
        running: deque[tuple[ov.InferRequest, float]] = deque()
        height, width = (side + self._lost for side in shape)
        try:
            for pixels, row, col in tiles:
                if not free:
                    yield self._finish(*running[0], shape, took)
                    free.append(running.popleft()[0])
                request = free.popleft()
                request.input_tensors[0].data[0] = pixels[:, row : row + height, col : col + width]
                running.append((request, time.time()))
                request.start_async()
            for request, start in running:
                yield self._finish(request, start, shape, took)
        finally:  # the requests serve again, also if the caller broke off
            for request, _ in running:
                request.wait()

    @staticmethod
    def _finish(
        request: ov.InferRequest, start: float, shape: tuple[int, int], took: Took
    ) -> NDArray[np.float32]:
        request.wait()
        took.ran(start, start + request.latency / 1000)  # it may have ended long before
        scores: NDArray[np.float32] = request.output_tensors[0].data[0, :, : shape[0], : shape[1]]
        return scores
