"""OpenVINO on CPUs: normalising and activation inside the compiled graph, which is kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.apart import run_apart
from tilenet.blend import Activation, Decision, Sums
from tilenet.errors import ModelError, blame
from tilenet.models.card import ModelCard
from tilenet.models.compiled import compiled_name, keep_compiled, kept_compiled
from tilenet.models.session import (
    NOBODY,
    NetworkShape,
    Setup,
    SumsLike,
    Tile,
    Took,
    check_answer,
    cpu_flags,
)
from tilenet.models.store import ModelFiles, cache_folder
from tilenet.quiet import ignoring, without_module

# With it, the import alone would report to Intel over the network, and wait for that at exit. Only
# OpenVINO's converter asks for it, which takes long to import and which we do not use.
with without_module("openvino_telemetry"), without_module("openvino.tools.ovc"):
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.frontend import FrontEndManager
    from openvino.preprocess import PrePostProcessor

__all__ = ["OpenVinoSession", "onnx_shape", "streams_for"]

_logger = logging.getLogger(__name__)
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Bytes go in as they are: 0…255 are exact in bf16. Wider integers would be rounded before the mean
# is taken off, so the copy into the request's tensor widens them.
_DTYPES = {"uint8": ov.Type.u8}
_COMPILED_AS = 1  # to be raised when what is done with a graph before it is compiled changes
# Tile shapes kept compiled, and their pixels: a folder of images has few, and each has activations.
_MAX_COMPILED, _MAX_COMPILED_PIXELS = 8, 4 << 20
# Large tiles: all cores on one, while the last one's scores are added up. Small ones: a stream of
# its own for each, because cores that share a small tile wait for each other; unless it is alone.
_SMALL_TILE, _MOST_STREAMS = 1 << 18, 4  # pixels; each stream holds its own activations


_one_at_a_time = threading.Lock()


def _core() -> ov.Core:
    """Return OpenVINO, one for as long as this process lives.

    Its plugin for CPUs gives a stack for signals to the thread that loads it, and unmaps it when
    the last user goes: from another thread, the first one's next signal is a segmentation fault.
    """
    with _one_at_a_time:
        return _made_once()


@cache
def _made_once() -> ov.Core:
    return ov.Core()


def _try_onnx(path: Path) -> None:
    """Raise ModelError if reading a file ends the process, as damaged ones can; once for each file.

    Another process tries it: nothing in this one would survive.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    mark = cache_folder() / "openvino" / f"{digest}-{ov.__version__.split('-')[0]}.read"
    # A cache that is somebody else's, or no right to start a process: it is read untried.
    with suppress(OSError):
        if mark.exists():
            return
        done = run_apart(__name__, "try_onnx", os.fsencode(path))
        if done.returncode < 0:
            raise ModelError("OpenVINO breaks down over it", path, "export it again")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def try_onnx() -> None:
    """Read the network that standard input names."""
    _load_onnx(os.fsdecode(sys.stdin.buffer.read()))


def _load_onnx(path: str) -> ov.Model:
    """Return a network as OpenVINO reads it, whatever it is."""
    # Core.read_model would try every format it knows, which log what they dislike.
    onnx = FrontEndManager().load_by_framework("onnx")
    return onnx.convert(onnx.load(path))


def _read_onnx(path: Path) -> ov.Model:
    try:
        _try_onnx(path)
        model = _load_onnx(str(path))
    except ModelError:
        raise
    except Exception as error:  # OpenVINO's failures have no other class in common
        raise blame(
            ModelError(f"OpenVINO cannot read it: {error}", path, "export it again")
        ) from error
    if len(model.inputs) != 1 or model.inputs[0].partial_shape.rank != ov.Dimension(4):
        raise ModelError("not one input of (N, C, H, W)", path, "export one image input")
    if not model.outputs or model.outputs[0].partial_shape.rank != ov.Dimension(4):
        raise ModelError("the first output is not (N, K, H, W)", path, "export the class scores")
    return model


def onnx_shape(path: Path) -> NetworkShape:
    """Return what an ONNX file says of its input and output.

    Raises
    ------
    ModelError
        The file is no network from images to images.
    """
    model = _read_onnx(path)
    shape = model.inputs[0].partial_shape
    channels = model.outputs[0].partial_shape[1]
    if channels.is_dynamic or shape[1].is_dynamic:
        raise ModelError("bands or classes are not fixed", path, "export them as fixed sizes")
    sides = (shape[2], shape[3])
    fixed = None if any(s.is_dynamic for s in sides) else tuple(s.get_length() for s in sides)
    return NetworkShape(shape[1].get_length(), channels.get_length(), fixed)


def _convert(files: ModelFiles) -> ov.Model:
    """Convert an SMP network; raises ModelError where that is not possible."""
    try:
        return _traced(files)
    except (ModelError, MemoryError, OSError):
        raise
    except Exception as error:  # torch's tracer and OpenVINO raise whatever they meet
        raise blame(
            ModelError(
                f"OpenVINO cannot convert it: {error}", files.weights.parent, "try --backend torch"
            )
        ) from error


def _traced(files: ModelFiles) -> ov.Model:
    """Convert a network that is traced on a small image: quick, and in little memory."""
    import torch
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from tilenet.models.build import build_network

    network = build_network(files)
    lost = sum(files.card.margin)
    side = 2 * files.divisor + lost
    generator = torch.Generator().manual_seed(0)
    example = torch.rand((1, files.card.band_count, side, side), generator=generator)
    # torch calls its tracer deprecated; Python's own category covers all it warns of here.
    with torch.inference_mode(), ignoring(Warning):
        # ov.convert_model would do, but it reports its use over the network.
        pytorch = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(network, example_input=example)
        model = pytorch.convert(pytorch.load(decoder))
        # A network whose trace holds the example's size would be silently wrong elsewhere.
        probe = torch.rand(
            (1, files.card.band_count, side, 3 * side - 2 * lost), generator=generator
        )
        expected = network(probe).numpy()
    model.reshape([-1, files.card.band_count, -1, -1])
    compiled = _core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = compiled(probe.numpy())[0]
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-2, atol=1e-2):
        raise ModelError(
            "OpenVINO does not reproduce this network", files.weights.parent, "use --backend torch"
        )
    return model


def _digest(graph: Path) -> str:
    """Return the hash of a graph's files."""
    digest = hashlib.sha256()
    for name in ("graph.xml", "graph.bin"):
        with (graph / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_whole(graph: Path) -> bool:
    """Whether a graph that was kept is as it was written: nothing else would tell wrong weights."""
    try:
        return (graph / "sha256").read_text() == _digest(graph)
    except (OSError, ValueError):
        return False


def _keep_graph(model: ov.Model, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temp:
        made = Path(temp) / "graph"
        ov.save_model(model, made / "graph.xml", compress_to_fp16=False)
        (made / "sha256").write_text(_digest(made))
        if _is_whole(folder):  # another run was quicker, and may be reading it
            return
        if folder.exists():
            folder.rename(Path(temp) / "damaged")
        made.rename(folder)


def _cached_graph(files: ModelFiles) -> ov.Model:
    """Return the converted graph from the cache, converting it the first time."""
    folder = cache_folder() / "openvino" / f"{files.sha256}-{ov.__version__.split('-')[0]}"
    if not _is_whole(folder):
        _logger.info("converting %s for OpenVINO, once", files.card.name)
        model = _convert(files)
        try:
            _keep_graph(model, folder)
        except (OSError, RuntimeError) as error:  # OpenVINO's own, on a full disk
            _logger.warning("the graph is not cached: %s; the next run converts again", error)
            return model
    return _core().read_model(folder / "graph.xml")


def _activated(scores: ov.Output, activation: Activation) -> ov.Node:
    if activation == "softmax":
        return ops.softmax(scores, 1)
    if activation == "sigmoid":
        return ops.sigmoid(scores)
    return scores.node


def _with_ends(model: ov.Model, card: ModelCard, dtype: str) -> ov.Model:
    """Return the graph from raw pixels to scores."""
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(_DTYPES.get(dtype, ov.Type.f32)).set_layout(
        ov.Layout("NCHW")
    )
    steps.input().model().set_layout(ov.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(
        [float(v) for v in card.offset]
    ).scale([float(v) for v in card.scale])
    model = steps.build()
    output = model.outputs[0].node.input_value(0)
    if output.get_element_type() != ov.Type.f32:
        output = ops.convert(output, "f32").output(0)
    return ov.Model(
        [_activated(output, card.activation)], model.get_parameters(), f"tilenet {card.name}"
    )


@cache
def _makers() -> tuple[object, ...]:
    """Return what a compiled network depends on besides the graph: OpenVINO, processor, us."""
    core = _core()
    said = [core.get_property("CPU", k) for k in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    return _COMPILED_AS, ov.__version__, *said, sorted(cpu_flags())


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
        files = self._files
        model = _read_onnx(files.weights) if files.kind == "onnx" else _cached_graph(files)
        return _with_ends(model, files.card, self._dtype)

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
        name = compiled_name((*own, *_makers()))
        kept = kept_compiled(name)
        if kept is not None:
            with suppress(RuntimeError):
                content = ov.Tensor(np.frombuffer(kept, np.uint8))
                return _core().import_model(content, "CPU", options)
        model = self._model.clone()
        bands = model.inputs[0].partial_shape[1].get_length()
        try:
            model.reshape([1, bands, *(side + self._lost for side in shape)])
            compiled = _core().compile_model(model, "CPU", options)
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
