"""Models that do not fit: weights, architectures, ONNX files, every key of tilenet.json."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
from cases import Case, Make, file, predict

ONNX = predict("--model", "m.onnx", source="{shared}/ok.tif")
FOLDER = predict("--model", "m", "--backend", "torch", source="{shared}/ok.tif")


def make_models(folder: Path) -> None:
    """Make what the cases start from: a small U-Net and a network of 1 × 1."""
    networks.unet(folder / "unet", depth=3, tile=64)
    networks.pointwise(folder / "pointwise.onnx")
    networks.broken(folder / "nan.onnx")
    networks.pointwise(folder / "fixed.onnx", side=48)


def _shared(folder: Path) -> Path:
    return folder.parent / "shared"


def onnx(card: str | bytes | None = None, **keys: Any) -> Make:
    """Return a maker of a good network with another card, or the card with other keys."""

    def make(folder: Path) -> None:
        file("m.onnx", (_shared(folder) / "conv.onnx").read_bytes())(folder)
        document = json.loads((_shared(folder) / "conv.json").read_text()) | keys
        # None takes a key away; NULL is JSON's own.
        kept = {k: None if v is NULL else v for k, v in document.items() if v is not None}
        file("m.json", json.dumps(kept) if card is None else card)(folder)

    return make


NULL = object()
DEEP = "[" * 100_000
CLASS = [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}, {"id": 2, "name": "c"}]
NAN, INF = float("nan"), float("inf")
NUMBERS = ["3", "x", [], {}, True]
"""Wrong wherever one number belongs; pydantic takes "3" for 3, which harms nobody."""

KEYS: dict[str, list[Any]] = {
    "schema": [None, NULL, 0, 2, "one", [], {}, 1.5],
    "name": [NULL, 7, [], {}],
    "classes": [
        None, NULL, 3, "abc", {}, [], [1, 2, 3], ["a", "b", "c"], [{}, {}, {}], CLASS[:2],
        [*CLASS, {"id": 3, "name": "d"}], CLASS[::-1], [CLASS[0]] * 3,
        [{"id": k + 1, "name": "a"} for k in range(3)], [{"id": k, "nom": "a"} for k in range(3)],
        [{"id": c, "name": "a"} for c in "xyz"], [{"id": k, "name": 5} for k in range(3)],
        [{"id": k, "name": NULL} for k in range(3)],
        [{"id": k, "name": "a", "color": [0, 0]} for k in range(3)],
        [{"id": k, "name": "a", "color": [0, 0, 256]} for k in range(3)],
        [{"id": k, "name": "a", "color": [0, 0, -1]} for k in range(3)],
        [{"id": k, "name": "a", "color": "red"} for k in range(3)],
        [{"id": k, "name": "a"} for k in range(300)], [{"id": -1, "name": "a"}],
    ],
    "bands": [None, NULL, 0, -1, 4, 10**9, "three", 2.5, [], ["r"], [1, 2, 3], {}],
    "value_range": [None, NULL, 255, [0], [0, 1, 2], [255, 0], [1, 1], [0, NAN], [-INF, 1],
                    ["a", "b"], {}, "0,255"],
    "mean": [None, NULL, 0.5, [], [0, 0], [0, 0, 0, 0], [NAN], [INF], ["a"], {}, [[0]], [10**400]],
    "std": [None, NULL, 1, [], [1, 1], [0], [-1], [1, 0, 1], [NAN], [INF], ["a"], {}],
    "activation": [None, NULL, "relu", "Softmax ", 1, [], {}, "sigmoid"],
    "threshold": [NULL, NAN, INF, "half", [], {}],
    "tile": [0, -64, 1.5, "big", [], {}, NAN, 10**12],
    "overlap": [-1, 1.5, "some", [], {}, 10**12],
    "divisor": [0, -32, 1.5, "all", [], {}, 10**12],
    "context": ["nearby", 1, [], {}],
    "margin": [NULL, 5, [5], [1, 2, 3], [-1, -1], [5000, 5000], ["a", "b"], {}],
    "mpp": [NAN, INF, "fine", [], {}],
    "ground_resolution": [NAN, INF, "fine", [], {}],
}  # fmt: skip
"""Values that are wrong for each key of a tilenet.json; None takes the key away."""


def _null(value: Any) -> Any:
    if isinstance(value, list):
        return [_null(v) for v in value]
    if isinstance(value, dict):
        return {k: _null(v) for k, v in value.items() if v is not NULL}
    return value


def _label(value: Any) -> str:
    if value is NULL:
        return "null"
    return "missing" if value is None else json.dumps(_null(value))[:60]


def _cards() -> list[Case]:
    texts: dict[str, str | bytes] = {
        "empty": "", "text": "no json", "a list": "[]", "a number": "1", "null": "null",
        "cut": '{"schema": 1, "classes": [', "not UTF-8": b'{"schema": 1, "name": "\xff"}',
        "UTF-16": '{"schema": 1}'.encode("utf-16"), "100,000 deep": DEEP,
        "100,000 deep inside": '{"schema": 1, "x": ' + DEEP,
        "of npm": '{"name": "a", "version": 3}',
        "of 5 MB": '{"schema": 1, "x": "' + "a" * 5_000_000 + '"}',
        "with a number of 10,000 digits": '{"schema": 1, "tile": ' + "9" * 10_000 + "}",
        "HTML": "<html></html>", "of COCO": '{"images": [], "annotations": []}',
    }  # fmt: skip
    cases = [
        Case(f"card {name}", onnx(card=text), (4,), ("m.json",), ONNX)
        for name, text in texts.items()
    ]
    for key, values in KEYS.items():
        for value in values:
            given = value if value is None or value is NULL else _null(value)
            word = "foreign" if key == "schema" else key.partition("_")[0]
            cases.append(
                Case(f"card: {key} {_label(value)}", onnx(**{key: given}), (4,), (word,), ONNX)
            )
    return cases


def _folder(change: Callable[[Path], object], **config: Any) -> Make:
    """Return a maker of a good model folder that is then changed."""

    def make(folder: Path) -> None:
        target = folder / "m"
        target.mkdir()
        for path in sorted((_shared(folder) / "unet").iterdir()):
            (target / path.name).write_bytes(path.read_bytes())
        if config:
            path = target / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        change(target)

    return make


def _keep(_: Path) -> None:
    pass


def _weights(data: bytes | Callable[[bytes], bytes]) -> Make:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return _folder(change)


def _header(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Return a maker of weights whose header is changed."""

    def changed(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _weights(changed)


def _tensors(change: Callable[[dict[str, Any]], object]) -> Make:
    def changed(folder: Path) -> None:
        import safetensors.torch

        path = folder / "model.safetensors"
        state = safetensors.torch.load_file(path)
        change(state)
        safetensors.torch.save_file(state, path)

    return _folder(changed)


FIRST = "encoder.conv1.weight"


def _fill(value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[FIRST][0, 0, 0, 0] = value

    return change


def _first(key: str, value: Any) -> Make:
    return _header(lambda header: header[FIRST].__setitem__(key, value))


def _rename(state: dict[str, Any]) -> None:
    state["module." + FIRST] = state.pop(FIRST)


def _torch_zip(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"
WEIGHTS: dict[str, Make] = {
    "empty": _weights(b""),
    "7 bytes": _weights(bytes(7)),
    "cut in the header": _weights(lambda data: data[:100]),
    "cut after the header": _weights(lambda d: d[: 8 + struct.unpack("<Q", d[:8])[0]]),
    "cut in half": _weights(lambda data: data[: len(data) // 2]),
    "a byte too short": _weights(lambda data: data[:-1]),
    "a byte too long": _weights(lambda data: data + b"\0"),
    "LFS pointer": _weights(LFS),
    "HTML": _weights(b"<!DOCTYPE html><html>404</html>" * 10),
    "pickle": _weights(pickle.dumps({"a": 1}) + bytes(100)),
    "zip of torch": _folder(_torch_zip),
    "header of 2^63 bytes": _weights(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "header of 200 MB": _weights(lambda data: struct.pack("<Q", 200_000_000) + data[8:]),
    "header no JSON": _weights(lambda data: data[:8] + b"x" * 50 + data[58:]),
    "header 100,000 deep": _weights(struct.pack("<Q", 100_000) + DEEP.encode()),
    "negative offset": _first("data_offsets", [-4, 100]),
    "offset beyond the end": _first("data_offsets", [0, 10**12]),
    "offsets crossed": _first("data_offsets", [100, 0]),
    "two tensors in one place": _header(lambda h: h.__setitem__("b", h[FIRST])),
    "shape of 2^60": _first("shape", [2**30, 2**30, 1, 1]),
    "negative shape": _first("shape", [-64, 3, 7, 7]),
    "dtype of nobody": _first("dtype", "F99"),
    "dtype of half": _first("dtype", "F16"),
    "no tensors": _weights(struct.pack("<Q", 2) + b"{}"),
    "NaN": _tensors(_fill(NAN)),
    "infinite": _tensors(_fill(INF)),
    "a key too few": _tensors(lambda state: state.pop(FIRST)),
    "a key too many": _tensors(lambda s: s.__setitem__("extra", s[FIRST].clone())),
    "a key renamed": _tensors(_rename),
    "a shape too small": _tensors(lambda s: s.__setitem__(FIRST, s[FIRST][:32].clone())),
    "a folder": _folder(lambda f: ((f / "model.safetensors").unlink(),
                                   (f / "model.safetensors").mkdir())),
    "a dangling link": _folder(lambda f: ((f / "model.safetensors").unlink(),
                               (f / "model.safetensors").symlink_to("gone"))),
    "missing": _folder(lambda f: (f / "model.safetensors").unlink()),
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "class of nobody": {"_model_class": "Nope"},
    "class 3": {"_model_class": 3},
    "class null": {"_model_class": None},
    "class ../../x": {"_model_class": "../../x"},
    "class os.system": {"_model_class": "os.system"},
    "another class": {"_model_class": "UnetPlusPlus"},
    "encoder of nobody": {"encoder_name": "nope"},
    "encoder 7": {"encoder_name": 7},
    "encoder ../..": {"encoder_name": "tu-../../x"},
    "another encoder": {"encoder_name": "resnet34"},
    "depth 0": {"encoder_depth": 0},
    "depth 99": {"encoder_depth": 99},
    "depth -1": {"encoder_depth": -1},
    "depth as text": {"encoder_depth": "three"},
    "depth null": {"encoder_depth": None},
    "channels 3": {"decoder_channels": [3]},
    "channels as text": {"decoder_channels": "abc"},
    "channels of 10^9": {"decoder_channels": [10**9, 16, 8]},
    "bands as text": {"in_channels": "three"},
    "bands 4": {"in_channels": 4},
    "bands 0": {"in_channels": 0},
    "bands null": {"in_channels": None},
    "classes 0": {"classes": 0},
    "classes -1": {"classes": -1},
    "classes 2": {"classes": 2},
    "classes 10^9": {"classes": 10**9},
    "classes as text": {"classes": "three"},
    "classes null": {"classes": None},
    "activation of nobody": {"activation": "__import__('os')"},
    "an unknown argument": {"nonsense": 1},
    "a head of nonsense": {"aux_params": {"classes": "x"}},
}
_HARMLESS = {"an unknown argument"}


def _text(name: str, content: str | bytes) -> Make:
    return _folder(lambda folder: file(name, content)(folder))


def _onnx_bytes(change: Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> None:
        onnx()(folder)
        path = folder / "m.onnx"
        path.write_bytes(change(path.read_bytes()))

    return make


def _graph(change: Callable[[Any], object]) -> Make:
    """Return a maker of a network whose protobuf is changed."""

    def changed(data: bytes) -> bytes:
        from onnx import ModelProto

        model = ModelProto.FromString(data)
        change(model)
        return model.SerializeToString()

    return _onnx_bytes(changed)


def _external(model: Any) -> None:
    """Let the weights lie in another file: somebody else's."""
    from onnx import TensorProto

    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"


def _dim(which: str, axis: int, value: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        dims = getattr(model.graph, which)[0].type.tensor_type.shape.dim
        dims[axis].dim_value = value

    return change


NETWORKS: dict[str, Make] = {
    "empty": _onnx_bytes(lambda data: b""),
    "text": _onnx_bytes(lambda data: b"no network"),
    "HTML": _onnx_bytes(lambda data: b"<!DOCTYPE html><html></html>"),
    "LFS pointer": _onnx_bytes(lambda data: LFS),
    "cut in half": _onnx_bytes(lambda data: data[: len(data) // 2]),
    "cut at 99 %": _onnx_bytes(lambda data: data[: len(data) * 99 // 100]),
    "pickle": _onnx_bytes(lambda data: pickle.dumps({"a": 1})),
    "operator of nobody": _graph(lambda m: setattr(m.graph.node[0], "op_type", "Nope")),
    "domain of nobody": _graph(lambda m: setattr(m.graph.node[0], "domain", "evil")),
    "opset 0": _graph(lambda m: setattr(m.opset_import[0], "version", 0)),
    "input of any rank": _graph(lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")),
    "no nodes": _graph(lambda m: m.graph.ClearField("node")),
    "no input": _graph(lambda m: m.graph.ClearField("input")),
    "no output": _graph(lambda m: m.graph.ClearField("output")),
    "no weights": _graph(lambda m: m.graph.ClearField("initializer")),
    "weights too short": _graph(
        lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[:8])
    ),
    "weights elsewhere": _graph(_external),
    "4 bands": _graph(_dim("input", 1, 4)),
    "input of 3 axes": _graph(lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop()),
    "input of text": _graph(
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8)
    ),
    "a node that feeds itself": _graph(
        lambda m: m.graph.node[0].input.__setitem__(0, m.graph.node[0].output[0])
    ),
}  # fmt: skip


def _bare(suffix: str, content: bytes) -> Case:
    name = f"m{suffix}"
    line = predict("--model", name, source="{shared}/ok.tif")
    return Case(f"model file {suffix}", file(name, content), (4,), (name,), line)


def _table() -> list[Case]:
    cases = _cards()
    for name, make in WEIGHTS.items():
        cases.append(Case(f"weights: {name}", make, (4,), ("m",), FOLDER))
    for name, config in CONFIGS.items():
        codes = (0,) if name in _HARMLESS else (4,)
        cases.append(Case(f"config: {name}", _folder(_keep, **config), codes, ("m",), FOLDER))
    texts = {
        "empty": "", "text": "no json", "a list": "[]", "100,000 deep": DEEP, "not UTF-8": b"\xff",
        "of 5 MB": '{"x": "' + "a" * 5_000_000 + '"}', "foreign": '{"name": "a"}',
    }  # fmt: skip
    for name, text in texts.items():
        cases.append(Case(f"config {name}", _text("config.json", text), (4,), ("config",), FOLDER))
        cases.append(Case(f"folder's card {name}", _text("tilenet.json", text), (4,),
                          ("tilenet.json",), FOLDER))  # fmt: skip
    for name, make in NETWORKS.items():
        cases.append(Case(f"ONNX: {name}", make, (4,), ("m.onnx",), ONNX))
    cases += [_bare(s, pickle.dumps({"a": 1})) for s in (".pt", ".pth", ".ckpt", ".bin", ".tar")]
    cases += [_bare(s, b"no model") for s in (".h5", ".pb", ".tflite", ".engine", "")]

    def named(name: str, *words: str) -> Case:
        line = predict("--model", name, source="{shared}/ok.tif")
        return Case(f"model {name[:40]!r}", file("m/a.txt", "a"), (4,), words, line)

    cases += [
        named("nope", "bundled"), named(""), named("a" * 300), named("../nuclei"), named("m"),
        named("/dev/zero"), named("nuclei/../nuclei"), named("http://127.0.0.1:9/m.onnx"),
        named("/proc/self/environ"), named("hf://"), named("hf://../../etc"),
        named("hf://a/b/c/d"), named("hf://a b/c"),
    ]  # fmt: skip

    def card(name: str, make: Make, *words: str) -> Case:
        line = predict("--model-config", "c.json", source="{shared}/ok.tif")
        return Case(f"--model-config {name}", make, (4,), words, line)

    cases += [
        card("missing", file("a", ""), "c.json"), card("text", file("c.json", "no"), "c.json"),
        card("a folder", file("c.json/a", ""), "c.json"), card("foreign", file("c.json", "{}")),
    ]  # fmt: skip
    fixed = predict("--model", "{shared}/fixed.onnx", "--tile", "64", source="{shared}/ok.tif")
    bad = predict("--model", "{shared}/pointwise.onnx", "--backend", "torch",
                  source="{shared}/ok.tif")  # fmt: skip
    cases += [
        Case("a network of one tile, another asked for", file("a", ""), (2,), ("48",), fixed),
        Case("torch for ONNX", file("a", ""), (4,), ("ONNX",), bad),
    ]
    return cases


MODELS = _table()
