"""Flags, configuration files, tables of training data, masks that are given as input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import MODEL, Case, Make, file, files, nothing, predict
from cases_files import VRT
from cases_models import DEEP
from cases_tiff import plain

FLAGS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "--tile": (["0", "-1", "x", "1.5", "", "100000", "1e3", "nan", "９"], (2,)),
    "--overlap": (["-1", "x", "1.5", "", "900", "100000", "nan"], (2,)),
    "--blend": (["average", "", "1", "gauss ian"], (2,)),
    "--batch-size": (["0", "-1", "x", "1.5", "", "100000"], (2,)),
    "--block": (["0", "-1", "x", "1.5", "", "100", "999999999999999999999"], (2,)),
    "--chunk": (["0", "-1", "x", "1.5", "", "100000"], (2,)),
    "--level": (["-1", "x", "1.5", ""], (2,)),
    "--bands": (["", "1;2;3", "1,2,"], (2,)),
    "--threshold": (["nan", "inf", "x", ""], (2,)),
    "--format": (["jpg", "", "ZARR?", "tif "], (2,)),
    "--zarr-format": (["4", "0", "x", ""], (2,)),
    "--scheduler": (
        ["x", "", "processes:0", "processes:-1", "processes:x", "processes:", "tcp://", "tcp:9",
         "http://127.0.0.1:9", "file:///etc/passwd", "slurm", "local:3"], (2,),
    ),
    "--mean": (["x", ",", "1,x"], (2,)),
    "--std": (["x", ""], (2,)),
    "--value-range": (["x", "1", "1,2,3", "nan,1", "0,inf"], (2,)),
    "--activation": (["relu", "", "SOFTMAX"], (2,)),
    "--device": (["gpu", "", "quantum", "cpu:x", "cuda:99", "cuda:x"], (2, 4)),
    "--backend": (["tensorflow", "", "onnxruntime"], (2,)),
    "--precision": (["fp8", "", "int8", "fp64"], (2,)),
}  # fmt: skip
"""Values that are wrong for each option."""

FITTING: dict[str, list[tuple[str, str]]] = {
    "level 7": [("--level", "7")], "band 9": [("--bands", "1,2,9")],
    "band 0": [("--bands", "0,1,2")],
    "band by no name": [("--bands", "x")], "band by a number in text": [("--bands", "1.5")],
    "bands without commas": [("--bands", "1 2 3")],
    "a band of 2^70": [("--bands", f"1,2,{2**70}")], "band -1": [("--bands", "1,2,-1")],
    "level of 2^70": [("--level", f"{2**70}")],
}  # fmt: skip
CARD: dict[str, tuple[str, ...]] = {
    "two means": ("--mean", "1,2"), "std 0": ("--std", "0"), "std -1": ("--std", "-1"),
    "range backwards": ("--value-range", "9,1"), "two classes": ("--classes", "a,b"),
    "one softmax class too many": ("--classes", "a,b,c,d"),
    "threshold of 2^40": ("--threshold", "1e12", "--activation", "none"),
}  # fmt: skip

LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown command": (("predicate",), ("predicate",)),
    "an unknown flag": ((*predict(), "--tiel", "3"), ("--tiel",)),
    "a flag without its value": ((*predict(), "--tile"), ("--tile",)),
    "no output": (("predict", "in.tif"), ("--out",)),
    "no input": (("predict", "--out", "x.zarr"), ("inputs",)),
    "a value for a switch": ((*predict(), "--probabilities=yes"), ("--probabilities",)),
    "info of nothing": (("info",), ("path",)),
    "info of two": (("info", "a", "b"), ("b",)),
    "models of something": (("models", "a"), ("a",)),
    "evaluate nothing": (("evaluate",), ("two things",)),
    "evaluate half": (("evaluate", "--pred", "in.tif"), ("two things",)),
    "evaluate both ways": (
        ("evaluate", "--pred", "a", "--truth", "b", "--model", "c", "--data", "d"), ("two things",)
    ),
    "train nothing": (("train", "--out", "m"), ()),
    "train without output": (("train", "in.tif"), ("--out",)),
}  # fmt: skip

TOMLS: dict[str, str | bytes] = {
    "text": "no toml at all", "cut": 'model = "nuc', "binary": bytes(range(256)),
    "not UTF-8": b'model = "\xff"', "UTF-16": 'tile = 64'.encode("utf-16"),
    "JSON": '{"tile": 64}', "YAML": "tile: 64\n", "100,000 deep": "tile = " + DEEP,
    "a key twice": "tile = 64\ntile = 128\n", "an unknown key": "tiel = 64\n",
    "a table": "[predict]\ntile = 64\n", "a list for a number": "tile = [64]\n",
    "a number for text": "model = 3\n", "a table for text": '[model]\nname = "a"\n',
    "tile 0": "tile = 0\n", "tile of text": 'tile = "large"\n', "tile NaN": "tile = nan\n",
    "threshold infinite": "threshold = inf\n",
    "overlap over 75 %": "tile = 64\noverlap = 60\n", "block of no chunks": "block = 100\n",
    "date": "tile = 1979-05-27\n",
    "blend of nobody": 'blend = "mean"\n', "format of nobody": 'format = "jpg"\n',
    "no-skip of text": 'no-skip = "perhaps"\n', "classes of numbers": "classes = [1, 2, 3]\n",
    "value_range of one": "value_range = [1]\n", "mean of text": 'mean = ["a"]\n',
    "10,000 digits": "tile = " + "9" * 10_000 + "\n",
}  # fmt: skip
FITTING_TOMLS: dict[str, tuple[str, int]] = {
    "one band": ("bands = 1\n", 4),
    "one band by name": ('bands = ["red"]\n', 4),
    "model with a NUL": ('model = "a\\u0000b"\n', 4),
    "model config with a NUL": ('model_config = "a\\u0000b"\n', 4),
    "device with a NUL": ('device = "a\\u0000b"\n', 4),
    "scheduler with a NUL": ('scheduler = "a\\u0000b"\n', 2),
}

TABLES: dict[str, str | bytes] = {
    "empty": "", "header only": "image,mask\n", "no such columns": "a,b\n1,2\n",
    "binary": bytes(range(256)) * 10, "not UTF-8": b"image,mask\n\xff,\xfe\n",
    "missing files": "image,mask\na.tif,b.tif\n", "a hole": "image,mask\nin.tif,\n",
    "a NUL": "image,mask\nin.tif\0,in.tif\n", "one column": "image\nin.tif\n",
    "a folder": "image,mask\n.,.\n", "itself": "image,mask\nt.csv,t.csv\n",
    "a field of 1 MB": "image,mask\n" + "a" * 1_000_000 + ",b\n",
    "VRTs": "image,mask\na.vrt,a.vrt\n", "the network": "image,mask\nhttp://127.0.0.1:9/a.tif,b\n",
    "/vsicurl": "image,mask\n/vsicurl/http://127.0.0.1:9/a.tif,in.tif\n",
}  # fmt: skip

ROOT: dict[str, str | bytes] = {
    "empty": "", "text": "no json", "cut": '{"zarr_format": 3,', "a list": "[]", "null": "null",
    "format 9": '{"zarr_format": 9, "node_type": "group"}', "not UTF-8": b"\xff\xfe",
    "an array": '{"zarr_format": 3, "node_type": "array", "shape": [1], "data_type": "object"}',
    "no attributes": '{"zarr_format": 3, "node_type": "group"}', "100,000 deep": DEEP,
    "attributes of text": '{"zarr_format": 3, "node_type": "group", "attributes": "a"}',
    "tilenet of text": '{"zarr_format": 3, "node_type": "group", "attributes": {"tilenet": "a"}}',
    "schema 99": json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {
        "tilenet": {"schema": 99, "spec": {}}}}),
    "spec empty": json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {
        "tilenet": {"schema": 1, "spec": {}}}}),
}  # fmt: skip

SPEC: dict[str, Callable[[dict[str, Any]], object]] = {
    "height of text": lambda s: s.update(height="tall"),
    "height -1": lambda s: s.update(height=-1),
    "height null": lambda s: s.update(height=None),
    "chunk 0": lambda s: s.update(chunk=0),
    "chunk of text": lambda s: s.update(chunk="big"),
    "classes of text": lambda s: s.update(classes="abc"),
    "classes of numbers": lambda s: s.update(classes=[1]),
    "a class without colour": lambda s: s["classes"][0].pop("color"),
    "no place": lambda s: s.update(georeference=None),
    "transform of text": lambda s: s["georeference"].update(transform="here"),
    "transform of 3": lambda s: s["georeference"].update(transform=[1, 2, 3]),
    "zarr_format 9": lambda s: s.update(zarr_format=9),
    "channels null": lambda s: s.update(channels=None),
}


def make_mask(folder: Path) -> None:
    """Make a finished mask, for what is read to be nearly right."""
    import os

    from tilenet.cli import run

    os.chdir(folder)
    code = run(["predict", "ok.tif", "--out", "mask.zarr", "--model", "conv.onnx"])
    assert code == 0


def mask(change: Callable[[Path], object]) -> Make:
    """Return a maker of a finished mask that is then changed."""

    def make(folder: Path) -> None:
        import shutil

        shutil.copytree(folder.parent / "shared" / "mask.zarr", folder / "x.zarr")
        change(folder / "x.zarr")

    return make


def _spec(change: Callable[[dict[str, Any]], object]) -> Make:
    def changed(root: Path) -> None:
        path = root / "zarr.json"
        document = json.loads(path.read_text())
        change(document["attributes"]["tilenet"]["spec"])
        document.pop("consolidated_metadata", None)
        path.write_text(json.dumps(document))

    return mask(changed)


INFO = ("info", "x.zarr")
EVALUATE = ("evaluate", "--pred", "x.zarr", "--truth", "{shared}/truth.tif")


def _masks() -> list[Case]:
    cases = []
    for name, text in ROOT.items():
        make = file("x.zarr/zarr.json", text)
        cases.append(Case(f"store, info: {name}", make, (3,), ("x.zarr",), INFO))
        cases.append(Case(f"store, evaluate: {name}", make, (3,), ("x.zarr",), EVALUATE))
        cases.append(Case(f"store, output: {name}", make, (5,), ("x.zarr",),
                          predict(source="{shared}/ok.tif")))  # fmt: skip
    for name, change in SPEC.items():
        cases.append(Case(f"mask, info: {name}", _spec(change), (3,), ("x.zarr",), INFO))
    v2 = {
        "object dtype": '{"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": '
        '[{"id": "pickle"}], "compressor": null, "fill_value": null, "order": "C"}',
        "array of text": "x",
    }
    for name, text in v2.items():
        make = files(**{"x.zarr/__zarray": text, "x.zarr/0": "a"})
        cases.append(Case(f"store of format 2, info: {name}", make, (3,), ("x.zarr",), INFO))
    document = mask(lambda root: (root / "tilenet/plan/c/0").write_bytes(b"[" * 50))
    cases += [
        Case("mask given to predict", mask(lambda root: None), (4,), ("1 bands",),
             predict(source="x.zarr", out="y.zarr")),
        Case("mask whose plan is damaged", document, (8,), ("x.zarr",), INFO),
        Case("mask without a chunk, evaluated", mask(
             lambda root: (root / "mask/c/0/0").write_bytes(b"")), (3, 8), ("x.zarr",), EVALUATE),
        Case("mask and truth of two sizes", file("t.tif", plain()), (3,), (),
             ("evaluate", "--pred", "{shared}/truth.tif", "--truth", "t.tif")),
        Case("evaluate what is not there", nothing, (3,), ("gone",),
             ("evaluate", "--pred", "gone.tif", "--truth", "gone.tif")),
        Case("evaluate a VRT", file("a.tif", VRT.format("/etc/passwd")), (3,), ("a.tif",),
             ("evaluate", "--pred", "a.tif", "--truth", "{shared}/truth.tif")),
        Case("evaluate an empty folder", lambda f: (f / "a").mkdir(), (3,), ("a",),
             ("evaluate", "--pred", "a", "--truth", "a")),
    ]  # fmt: skip
    return cases


def _table() -> list[Case]:
    here = nothing
    ok = "{shared}/ok.tif"
    cases = [
        Case(f"{flag} {value!r}", here, codes, (flag,), predict(flag, value, source=ok))
        for flag, (values, codes) in FLAGS.items()
        for value in values
    ]
    for name, [pair] in FITTING.items():
        cases.append(Case(f"no {name}", here, (3,), (), predict(*pair, source=ok)))
    for name, extra in CARD.items():
        cases.append(Case(f"card from flags: {name}", here, (4,), (), predict(*extra, source=ok)))
    for name, (line, words) in LINES.items():
        cases.append(Case(f"line: {name}", file("in.tif", plain()), (2,), words, line))
    for name, text in TOMLS.items():
        line = ("predict", ok, "--out", "x.zarr", "--config", "c.toml")
        cases.append(Case(f"TOML: {name}", file("c.toml", text), (2,), (), line))
        line = ("train", "in.tif", "--out", "m", "--config", "c.toml")
        make = files(in__tif=plain(), c__toml=text)
        cases.append(Case(f"TOML, train: {name}", make, (2,), (), line))
    for name, (text, code) in FITTING_TOMLS.items():
        line = ("predict", ok, "--out", "x.zarr", "--config", "c.toml")
        cases.append(Case(f"TOML: {name}", file("c.toml", text), (code,), (), line))
    for name, text in TABLES.items():
        make = files(t__csv=text, in__tif=plain(), a__vrt=VRT.format("in.tif"))
        line = ("train", "t.csv", "--out", "m", "--epochs", "1")
        cases.append(Case(f"table: {name}", make, (3, 7), (), line))
    missing = predict("--config", "gone.toml", source=ok)
    cases += [
        Case("TOML: missing", here, (2,), ("gone.toml",), missing),
        Case("TOML: a folder", lambda f: (f / "c.toml").mkdir(), (2,), ("c.toml",),
             predict("--config", "c.toml", source=ok)),
        Case("TOML: empty", file("c.toml", ""), (0,), (),
             ("predict", ok, "--out", "x.zarr", "--config", "c.toml", *MODEL)),
    ]  # fmt: skip
    return [*cases, *_masks()]


USAGE = _table()
