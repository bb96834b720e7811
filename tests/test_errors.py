"""Every mistake has its exit code and one line that says what, where, what to do."""

import json
import pickle
import shutil

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
import zarr
from PIL import Image
from rasters import picture, write_tif

from tilenet.cli import app
from tilenet.errors import DeviceError, ResourceError, convert_errors, error_of_one
from tilenet.models.devices import has_cuda

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

VRT = """<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1">
<SimpleSource><SourceFilename relativeToVRT="1">ok.tif</SourceFilename></SimpleSource>
</VRTRasterBand></VRTDataset>"""


def inputs(here):
    write_tif(here / "ok.tif", picture(40, 50))
    write_tif(here / "complex.tif", picture(40, 50).astype(np.complex64))
    write_tif(here / "int64.tif", picture(40, 50).astype(np.int64))
    write_tif(here / "two.tif", picture(40, 50, 2))
    write_tif(here / "five.tif", picture(40, 50, 5))
    Image.fromarray(picture(40, 50, 1)[0]).convert("P").save(here / "palette.png")
    (here / "text.tif").write_text("no raster\n" * 100)
    (here / "empty.tif").write_bytes(b"")
    (here / "vrt.tif").write_text(VRT)
    cut = (here / "ok.tif").read_bytes()
    (here / "cut.tif").write_bytes(cut[: len(cut) * 2 // 3])
    (here / "empty").mkdir()


def outputs(here):
    (here / "theirs").mkdir()
    (here / "theirs" / "work.txt").write_text("a day's work")
    (here / "theirs.tif").write_bytes(b"not ours")
    zarr.create_group(here / "theirs.zarr", zarr_format=3)


def models(here):
    networks.conv(here / "conv.onnx")
    networks.conv(here / "foreign.onnx")
    (here / "foreign.json").write_text('{"name": "package", "version": 3}')
    networks.conv(here / "cardless.onnx")
    (here / "cardless.json").unlink()
    networks.conv(here / "classes.onnx")
    document = json.loads((here / "conv.json").read_text())
    document["classes"] = document["classes"][:2]
    (here / "classes.json").write_text(json.dumps(document))
    (here / "not.onnx").write_bytes(b"\x08\x08no network")
    shutil.copy(here / "conv.json", here / "not.json")
    (here / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    (here / "pickled").mkdir()
    (here / "pickled" / "config.json").write_text("{}")
    (here / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    networks.unet(here / "cardless", depth=3, with_card=False)
    networks.unet(here / "nan", depth=3)
    weights = here / "nan" / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    state["encoder.conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(state, weights)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    inputs(folder)
    outputs(folder)
    models(folder)
    return folder


KEYS = ("--classes", "--mean", "--std", "--value-range", "--activation")
CONVERT = "safetensors.torch as s; s.save_file(torch.load("
CASES = {
    "missing file": (3, "missing.tif", (), ["missing.tif"]),
    "folder without rasters": (3, "empty", ("--out", "masks"), ["no rasters"]),
    "text": (3, "text.tif", (), ["text.tif"]),
    "empty file": (3, "empty.tif", (), ["empty.tif"]),
    "cut file": (3, "cut.tif", (), ["cut.tif"]),
    "complex": (3, "complex.tif", (), ["complex64"]),
    "int64": (3, "int64.tif", (), ["int64"]),
    "palette": (3, "palette.png", (), ["palette", "-expand"]),
    "vrt in disguise": (3, "vrt.tif", (), ["vrt.tif"]),
    "band 9": (3, "ok.tif", ("--bands", "1,2,9"), ["no band 9", "--bands"]),
    "band 0": (3, "ok.tif", ("--bands", "0,1,2"), ["no band 0"]),
    "level 7": (3, "ok.tif", ("--level", "7"), ["no level 7"]),
    "too few bands": (4, "two.tif", (), ["2 bands", "wants 3", "--bands"]),
    "too many bands": (4, "five.tif", (), ["5 bands", "wants 3", "--bands"]),
    "foreign file": (5, "ok.tif", ("--out", "theirs.tif"), ["theirs.tif"]),
    "foreign folder": (5, "ok.tif", ("--out", "theirs", "--format", "zarr"), ["theirs"]),
    "foreign store": (5, "ok.tif", ("--out", "theirs.zarr"), ["theirs.zarr"]),
    "the input itself": (5, "ok.tif", ("--out", "ok.tif"), ["ok.tif"]),
    "unknown model": (4, "ok.tif", ("--model", "nope"), ["nope", "nuclei"]),
    "pickle": (4, "ok.tif", ("--model", "model.pt"), ["pickle", CONVERT]),
    "folder of pickle": (4, "ok.tif", ("--model", "pickled"), ["pytorch_model.bin", CONVERT]),
    "empty model folder": (4, "ok.tif", ("--model", "empty"), ["model.safetensors"]),
    "not a model": (4, "ok.tif", ("--model", "ok.tif"), ["not a model"]),
    "broken onnx": (4, "ok.tif", ("--model", "not.onnx"), ["not.onnx"]),
    "foreign card": (4, "ok.tif", ("--model", "foreign.onnx"), ["foreign json", "--model-config"]),
    "no card": (4, "ok.tif", ("--model", "cardless"), KEYS),
    "no card, onnx": (4, "ok.tif", ("--model", "cardless.onnx"), KEYS),
    "weights not finite": (4, "ok.tif", ("--model", "nan"), ["NaN"]),
    "two classes of three": (4, "ok.tif", ("--model", "classes.onnx"), ["2 classes", "make 3"]),
    "no backend": (2, "ok.tif", ("--backend", "tensorflow"), ["tensorflow"]),
    "no device": (2, "ok.tif", ("--device", "quantum"), ["quantum"]),
    "no second CPU": (2, "ok.tif", ("--device", "cpu:1"), ["cpu:1"]),
    "no number": (2, "ok.tif", ("--device", "cpu:x"), ["cpu:x"]),
    "no precision": (2, "ok.tif", ("--precision", "fp8"), ["fp8"]),
    "tile 0": (2, "ok.tif", ("--tile", "0"), ["--tile"]),
    "tile x": (2, "ok.tif", ("--tile", "x"), ["--tile"]),
    "overlap -1": (2, "ok.tif", ("--overlap", "-1"), ["--overlap"]),
    "overlap over 75 %": (2, "ok.tif", ("--tile", "64", "--overlap", "50"), ["--overlap", "75 %"]),
    "overlap over the default": (2, "ok.tif", ("--overlap", "900"), ["--overlap"]),
    "block of no chunks": (2, "ok.tif", ("--block", "100"), ["--block"]),
    "batch 0": (2, "ok.tif", ("--batch-size", "0"), ["--batch-size"]),
    "blend": (2, "ok.tif", ("--blend", "average"), ["--blend"]),
    "bands x": (2, "ok.tif", ("--bands", "3,,1"), ["--bands"]),
    "bands of other names": (3, "ok.tif", ("--bands", "r,g,nir"), ["nir", "red, green, blue"]),
    "threshold nan": (2, "ok.tif", ("--threshold", "nan"), ["--threshold"]),
    "unknown flag": (2, "ok.tif", ("--tiel", "64"), ["--tiel"]),
    "unknown scheduler": (2, "ok.tif", ("--scheduler", "slurmy"), ["--scheduler", "slurmy"]),
    "processes:0": (2, "ok.tif", ("--scheduler", "processes:0"), ["--scheduler"]),
    "ending": (2, "ok.tif", ("--out", "mask.xyz"), ["mask.xyz"]),
    "no config": (2, "ok.tif", ("--config", "missing.toml"), ["missing.toml"]),
}


def assert_one_line(done, code, words):
    assert done.code == code, done.err
    lines = done.err.strip().splitlines()
    assert all(line.startswith("tilenet: ") for line in lines), done.err
    errors = [line for line in lines if line.startswith("tilenet: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.err
    for word in words:
        assert word in errors[0]


def line(source, extra, out="x.zarr"):
    defaults = {"--out": out, "--model": "conv.onnx"}
    given = dict(zip(extra[::2], extra[1::2], strict=True))
    return ["predict", source, *(part for pair in (defaults | given).items() for part in pair)]


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_the_code(cli, here, tmp_path, monkeypatch, case):
    monkeypatch.chdir(here)
    code, source, extra, words = CASES[case]
    done = cli(*line(source, extra, tmp_path / "x.zarr"), "--json")
    assert_one_line(done, code, words)
    error = json.loads(done.out)["error"]
    assert error["code"] == code
    assert error["what"]
    assert set(error) == {"code", "what", "where", "do"}
    assert not list(tmp_path.iterdir())
    assert (here / "theirs" / "work.txt").read_text() == "a day's work"
    assert (here / "theirs.tif").read_bytes() == b"not ours"


def test_no_out(cli, here):
    assert_one_line(cli("predict", here / "ok.tif"), 2, ["--out"])


def test_no_input(cli):
    assert_one_line(cli("predict", "--out", "x.zarr"), 2, ["inputs"])


def test_no_command(cli):
    assert_one_line(cli("predicate"), 2, ["predicate"])


def test_without_json_stdout_stays_empty(cli, here, monkeypatch):
    monkeypatch.chdir(here)
    done = cli(*line("missing.tif", ()))
    assert (done.code, done.out) == (3, "")


def test_debug_shows_the_traceback(cli, here, monkeypatch):
    monkeypatch.chdir(here)
    done = cli(*line("missing.tif", ()), "--debug")
    assert done.code == 3
    assert "Traceback" in done.err
    assert "tilenet: error: no such file" in done.err


def test_every_command_has_debug(cli):
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert "--debug" in cli(name, "--help").out, name
    done = cli("info", "missing.tif", "--debug")
    assert done.code == 3
    assert "Traceback" in done.err
    assert "tilenet: error: no such file" in done.err


def test_names_from_strangers_stay_on_one_line(cli, tmp_path, here):
    name = tmp_path / "two\nlines\x1b[31m.tif"
    name.write_text("text")
    done = cli("predict", name, "--out", tmp_path / "x.zarr", "--model", here / "conv.onnx")
    assert_one_line(done, 3, ["\\x1b[31m"])


@pytest.mark.skipif(has_cuda(), reason="this machine has CUDA")
@pytest.mark.parametrize("model", ["nuclei", "conv.onnx"])
def test_cuda_where_there_is_none(cli, here, monkeypatch, model):
    monkeypatch.chdir(here)
    done = cli(*line("ok.tif", ("--model", model, "--device", "cuda")))
    assert_one_line(done, 4, ["--device"])


@pytest.mark.parametrize(
    ("source", "extra", "code"),
    [
        ("missing.tif", (), 3),
        ("two.tif", (), 4),
        ("ok.tif", ("--out", "theirs.tif"), 5),
        ("ok.tif", ("--tile", "0"), 2),
    ],
)
def test_the_command_exits_with_the_code(command, here, source, extra, code):
    done = command(*line(source, extra), cwd=here)
    assert_one_line(done, code, [])


@pytest.mark.long
def test_nobody_at_the_address(command, here):
    write_tif(here / "blocks.tif", picture(150, 150))
    extra = ("--scheduler", "tcp://127.0.0.1:9", "--tile", "64", "--chunk", "64", "--block", "64")
    done = command(*line("blocks.tif", extra, "y.zarr"), "--json", cwd=here)
    assert_one_line(done, 9, ["tcp://127.0.0.1:9"])
    assert json.loads(done.out)["error"]["code"] == 9


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ResourceError, "memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for"), ResourceError, "memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ResourceError, "memory"),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            ResourceError, "memory",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            ResourceError, "memory",
        ),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for"),
            DeviceError, "the device failed: CUDA error: uncorrectable ECC error encountered; x",
        ),
    ],
)  # fmt: skip
def test_what_torch_says_of_a_device(error, kind, words):
    with pytest.raises(ResourceError, match=words) as caught, convert_errors("x"):
        raise error
    assert type(caught.value) is kind
    assert caught.value.code == 6
    assert caught.value.__cause__ is error
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (kind, str(caught.value))
    assert error_of_one(error, "x") is None  # the next input would meet it too


def test_a_defect_is_no_devices():
    with pytest.raises(RuntimeError, match="shapes"), convert_errors("x"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--mean", ".5,.5", ["mean: give 1 or 3 numbers; --mean; correct it"]),
        ("--std", "0", ["std: must be above 0; --std;"]),
        ("--value-range", "1,1", ["value_range: lo must be below hi; --value-range;"]),
        ("--classes", "a,b", ["2 classes", "3 output channels", "correct --classes or"]),
    ],
)
def test_a_wrong_flag_in_place_of_a_card_is_named(flag, value, words, cli, here, monkeypatch):
    monkeypatch.chdir(here)
    given = dict(zip(KEYS, ("a,b,c", "0", "1", "0,255", "softmax"), strict=True)) | {flag: value}
    extra = tuple(part for pair in given.items() for part in pair)
    done = cli(*line("ok.tif", ("--model", "cardless", *extra)), "--backend", "torch")
    assert_one_line(done, 4, words)
    assert "cardless/tilenet.json" not in done.err


def test_flags_make_up_for_a_missing_card(cli, here, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    given = ("a,b,c", "0", "1", "0,255", "softmax")
    extra = tuple(part for pair in zip(KEYS, given, strict=True) for part in pair)
    out = tmp_path / "x.zarr"
    done = cli(*line("ok.tif", ("--model", "cardless", *extra), out), "--backend", "torch")
    assert done.code == 0, done.err
    assert out.is_dir()
