"""Networks as OpenVINO's graphs, from raw pixels to scores; what is converted is kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from tilenet.apart import run_apart
from tilenet.blend import Activation
from tilenet.errors import ModelError, blame
from tilenet.models.card import ModelCard
from tilenet.models.devices import cpu_flags
from tilenet.models.session import NetworkShape
from tilenet.models.store import ModelFiles, cache_folder
from tilenet.quiet import ignoring, without_module

# With it, the import alone would report to Intel over the network, and wait for that at exit. Only
# OpenVINO's converter asks for it, which takes long to import and which we do not use.
with without_module("openvino_telemetry"), without_module("openvino.tools.ovc"):
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.frontend import FrontEndManager
    from openvino.preprocess import PrePostProcessor

__all__ = ["core", "graph_of", "makers", "onnx_shape", "ov", "try_onnx"]

_logger = logging.getLogger(__name__)
# Bytes go in as they are: 0…255 are exact in bf16. Wider integers would be rounded before the mean
# is taken off, so the copy into the request's tensor widens them.
_DTYPES = {"uint8": ov.Type.u8}
_COMPILED_AS = 1  # to be raised when what is done with a graph before it is compiled changes


_one_at_a_time = threading.Lock()


def core() -> ov.Core:
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
    if not path.stat().st_size:  # OpenVINO takes it for a network without inputs
        raise ModelError("an empty file", path, "export it again")
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
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
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
    return core().read_model(folder / "graph.xml")


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
def makers() -> tuple[object, ...]:
    """Return what a compiled network depends on besides the graph: OpenVINO, processor, us."""
    names = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
    said = [core().get_property("CPU", name) for name in names]
    return _COMPILED_AS, ov.__version__, *said, sorted(cpu_flags())


def graph_of(files: ModelFiles, dtype: str) -> ov.Model:
    """Return a model's graph from raw pixels to scores.

    Parameters
    ----------
    files : ModelFiles
        SMP folder or ONNX file.
    dtype : str
        Numpy name of the pixels.

    Raises
    ------
    ModelError
        OpenVINO does not read or reproduce it.
    """
    model = _read_onnx(files.weights) if files.kind == "onnx" else _cached_graph(files)
    return _with_ends(model, files.card, dtype)
