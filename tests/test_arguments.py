"""What a command and the API are given, and where they stand: refused before any work begins."""

import json
import os
import subprocess
import sys

import networks
import pytest
from rasters import picture, write_image

from tilenet import mask_api
from tilenet.api import predict
from tilenet.config import PredictConfig, load_config
from tilenet.errors import UsageError
from tilenet.evaluate_api import evaluate
from tilenet.models.store import cache_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.positional(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.mark.parametrize(
    "line",
    [("predict", "", "--out", "m"), ("predict", "a", "--out", "m", "--model", " "),
     ("predict", "a", "--out="), ("evaluate", "--pred", "", "--truth", "b"), ("info", "")],
)  # fmt: skip
def test_a_variable_that_is_not_set(line, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png", picture(40, 50))
    done = cli(*line, "--json")
    assert done.code == 2
    assert "an empty argument; after " in done.err
    assert json.loads(done.out)["error"]["code"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_empty_name_in_a_program(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="an empty name"):
        predict([""], "m", PredictConfig(model=str(model)))


@pytest.mark.parametrize(
    "line",
    [("export", "m.tif", "s3://b/y.zarr"), ("evaluate", "--pred", "s3://b/a", "--truth", "t"),
     ("train", "d", "--out", "s3://b/m"), ("predict", "a.png", "--out", "s4://b/y.zarr"),
     ("predict", "a.png", "--out", "y.zarr", "--csv=s3://b/c.csv"),
     ("predict", "a.png", "--out", "y.zarr", "--summary", "https://h/s.json")],
)  # fmt: skip
def test_a_url_becomes_no_folder(line, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png", picture(40, 50))
    done = cli(*line)
    assert done.code == 2
    assert "takes no URL" in done.err or "nothing is known of s4://" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "two", [("--csv", "--summary"), ("--out", "--csv"), ("--out", "--summary")]
)
def test_two_outputs_are_two_files(two, cli, tmp_path):
    write_image(tmp_path / "a.png", picture(40, 50))
    more = [] if "--out" in two else ["--out", tmp_path / "y.zarr"]
    same = [word for option in two for word in (option, tmp_path / "x.tif")]
    done = cli("predict", tmp_path / "a.png", *same, *more)
    assert done.code == 2
    assert "are one file" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("text", ["tile = true", "threshold = true", "bands = [true, 1, 2]"])
def test_true_is_no_number(text, cli, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    done = cli("predict", "a.png", "--out", tmp_path / "x.png", "--config", tmp_path / "c.toml")
    assert done.code == 2
    assert "true and false are no values of it; --" in done.err


def test_a_number_in_a_file(tmp_path):
    (tmp_path / "c.toml").write_text("zarr_format = 3\nmosaic = true")
    config = load_config(tmp_path / "c.toml", {})
    assert (config.zarr_format, config.mosaic) == ("3", True)


def test_one_input_as_it_is(model, tmp_path):
    source = write_image(tmp_path / "a.png", picture(40, 50))
    config = PredictConfig(model=str(model))
    for name, given in (("x", source), ("y", str(source))):
        assert predict(given, tmp_path / f"{name}.png", config).exit_code == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_a_folder_that_has_gone(model, environment, tmp_path):
    source, gone = write_image(tmp_path / "a.png", picture(40, 50)), tmp_path / "gone"
    gone.mkdir()
    line = f"rmdir {gone}; exec {sys.executable} -m tilenet predict {source} --out {tmp_path}/x.png"
    line += f" --model {model} --summary {tmp_path}/s.json"
    done = subprocess.run(["sh", "-c", line], cwd=gone, env=environment, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "s.json").read_text())["folder"] is None


def test_nobody_knows_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert not cache_folder().parent.exists()


def test_finished_masks_by_their_names(model, tmp_path, cli):
    """Python's front doors take what the commands take: names."""
    image, mask = write_image(tmp_path / "a.png", picture(60, 70)), str(tmp_path / "a.zarr")
    predict([image], mask, PredictConfig(model=str(model)))
    written = mask_api.export(mask, str(tmp_path / "b.png"))
    assert evaluate(str(written), mask).as_dict()["mean_dice"] == 1
    assert mask_api.verify(mask, repair=True, source=str(image), model=str(model)).ok
    done = cli("verify", mask, "--input", image)
    assert done.code == 2
    assert (
        done.err
        == "tilenet: error: only a repair needs it; --input; give --repair, or leave it out\n"
    )


@pytest.mark.parametrize("command", ["predict", "info", "verify"])
def test_an_input_of_an_unknown_scheme(command, cli, tmp_path):
    more = ("--out", tmp_path / "m.zarr") if command == "predict" else ()
    done = cli(command, "s4://bucket/a.tif", *more)
    assert done.code == 3
    assert "nothing is known of s4://; s4://bucket/a.tif; " in done.err


def test_an_empty_network(cli, tmp_path):
    image = write_image(tmp_path / "a.png", picture(40, 50))
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "m.json").write_text(json.dumps(networks.card(2)))
    done = cli("predict", image, "--model", tmp_path / "m.onnx", "--out", tmp_path / "m.zarr")
    assert done.code == 4
    assert "an empty file; " in done.err
