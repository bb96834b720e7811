"""Folders: one run over many small rasters; a broken one loses only itself."""

import json
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
from rasters import picture, write_image, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig

COUNT = 60
BROKEN = Path("deep/er/broken.tif")
SIZES = [(40, 50), (64, 64), (65, 33), (100, 130), (7, 90), (1, 1)]

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def one_of(k, folder):
    """Write image number k, at one of three depths, in one of three formats."""
    pixels = picture(*SIZES[k % len(SIZES)], seed=k)
    name = Path(("", "deep", "deep/er")[k % 3]) / f"image{k:02}"
    if k % 4 == 0:
        write_tif(folder / f"{name}.tif", pixels, georeferenced=True)
    elif k % 4 == 1:
        write_tif(folder / f"{name}.tiff", pixels, nodata=0)
    else:
        write_image(folder / f"{name}.{'png' if k % 4 == 2 else 'jpg'}", pixels)
    return f"{name}.{'tif' if k % 4 == 0 else 'png'}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.positional(tmp_path_factory.mktemp("model") / "m.onnx", divisor=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of 60 images and a broken one, and the names of the masks."""
    path = tmp_path_factory.mktemp("images")
    masks = [one_of(k, path) for k in range(COUNT)]
    (path / BROKEN).write_bytes((path / masks[0]).read_bytes()[:300])
    (path / "notes.txt").write_text("not a raster")
    (path / ".hidden").mkdir()
    (path / ".hidden" / "a.png").write_bytes(b"")
    return path, masks


def arguments(folder, out, model):
    options = ["--tile", "64", "--overlap", "32", "--precision", "fp32"]
    return ["predict", folder, "--out", out, "--model", model, *options]


@pytest.fixture(scope="module")
def masks(command, folder, model, tmp_path_factory):
    """Run the command over the folder, in another process."""
    out = tmp_path_factory.mktemp("masks")
    return out, command(*arguments(folder[0], out, model), "--json")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_broken_image_loses_only_itself(folder, masks):
    _, done = masks
    assert done.code == 7, done.err
    found = json.loads(done.out)
    assert found["exit_code"] == 7
    assert len(found["runs"]) == COUNT
    [failed] = found["failed"]
    assert failed["input"] == str(folder[0] / BROKEN)
    assert failed["code"] == 3
    errors = [e for e in done.err.splitlines() if e.startswith("tilenet: error: ")]
    assert len(errors) == 2
    assert "broken.tif" in errors[0]
    assert errors[1] == f"tilenet: error: 1 of {COUNT + 1} inputs failed, in whole or in part"
    assert "Traceback" not in done.err


def test_formats_follow_the_georeference(folder, masks):
    out, done = masks
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.suffix in (".tif", ".png")}
    assert made == set(folder[1])
    runs = json.loads(done.out)["runs"]
    assert {str(Path(r["output"]).relative_to(out)) for r in runs} == made
    assert not [p for p in out.rglob(".*") if p.name.endswith(".tilenet")]


def test_each_mask_is_that_of_a_single_run(folder, masks, model, tmp_path):
    config = PredictConfig(model=str(model), tile=64, overlap=32, precision="fp32")
    sources = {p.stem: p for p in folder[0].rglob("image*")}
    for name in folder[1][::5]:
        alone = tmp_path / Path(name).name
        predict([sources[alone.stem]], alone, config)
        assert alone.read_bytes() == (masks[0] / name).read_bytes()


def test_figures_add_up(masks):
    found = json.loads(masks[1].out)
    sizes = [SIZES[k % len(SIZES)] for k in range(COUNT)]
    assert found["pixels"] == sum(h * w for h, w in sizes)
    for run in found["runs"]:
        counted = sum(c["pixels"] for c in run["classes"]) + run["nodata_pixels"]
        assert counted == run["pixels"] == run["width"] * run["height"]
        assert run["tiles_forwarded"] == run["tiles"] - run["tiles_skipped"]


def test_shared_batches_give_the_same_bytes(cli, folder, masks, model, tmp_path):
    done = cli(*arguments(folder[0], tmp_path / "m", model), "--batch-size", "4")
    assert done.code == 7
    assert contents(tmp_path / "m") == contents(masks[0])


def test_a_rerun_does_nothing(cli, folder, masks, model):
    before = {p: p.stat().st_mtime_ns for p in masks[0].rglob("*") if p.is_file()}
    done = cli(*arguments(folder[0], masks[0], model), "--json")
    assert done.code == 7  # the broken one is still broken
    runs = json.loads(done.out)["runs"]
    assert len(runs) == COUNT
    assert not any(run["tiles_forwarded"] for run in runs)
    assert {p: p.stat().st_mtime_ns for p in masks[0].rglob("*") if p.is_file()} == before


def test_a_foreign_mask_fails_alone(cli, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for k in range(3):
        write_image(source / f"{k}.png", picture(30, 40, seed=k))
    out.mkdir()
    (out / "1.png").write_bytes(b"theirs")
    done = cli(*arguments(source, out, model), "--json")
    found = json.loads(done.out)
    assert (done.code, len(found["runs"])) == (7, 2)
    assert [(Path(f["input"]).name, f["code"]) for f in found["failed"]] == [("1.png", 5)]
    assert (out / "1.png").read_bytes() == b"theirs"


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_a_name_too_long_for_a_mask_fails_alone(cli, model, tmp_path, pattern):
    source, long = tmp_path / "in", "n" * 245 + ".png"
    for name in ("0.png", "1.png", "2.png", long):
        write_image(source / name, picture(30, 40))
    done = cli(*arguments(source / pattern, tmp_path / "out", model), "--json")
    assert done.code == 7, done.err
    found = json.loads(done.out)
    assert [Path(run["input"]).name for run in found["runs"]] == ["0.png", "1.png", "2.png"]
    assert [Path(one["input"]).name for one in found["failed"]] == [long]


def test_the_dry_run_complains_as_the_run_does(cli, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for k in range(3):
        write_image(source / f"{k}.png", picture(30, 40, seed=k))
    (source / "2.png").write_text("text")
    (source / "3.png").write_text("text")
    dry, run = (cli(*arguments(source, out, model), *more) for more in (["--dry-run"], []))
    told = [[line for line in done.err.splitlines() if "error: " in line] for done in (dry, run)]
    assert (dry.code, run.code) == (7, 7)
    assert [len(one) for one in told] == [3, 3]
    assert told[0] == told[1]
    assert told[0][2] == "tilenet: error: 2 of 4 inputs failed, in whole or in part"


def test_colliding_stems(cli, model, tmp_path):
    source = tmp_path / "in"
    write_image(source / "a.png", picture(30, 40))
    write_image(source / "A.jpg", picture(30, 40))
    done = cli(*arguments(source, tmp_path / "out", model))
    assert done.code == 5
    assert "a.png" in done.err
    assert "A.jpg" in done.err
    assert not (tmp_path / "out").exists()


def test_several_files(cli, model, tmp_path):
    one = write_image(tmp_path / "x" / "one.png", picture(30, 40))
    two = write_tif(tmp_path / "y" / "two.tif", picture(300, 200), georeferenced=True)
    options = ["--chunk", "64", "--block", "128", "--format", "zarr", "--probabilities"]
    line = arguments(one, tmp_path / "out", model)
    done = cli(*line, two, *options, "--json")
    assert done.code == 0, done.err
    runs = json.loads(done.out)["runs"]
    assert [Path(r["output"]).name for r in runs] == ["one.zarr", "two.zarr"]
    assert [r["blocks"] for r in runs] == [1, 6]  # the larger one is cut into blocks


def test_a_file_where_the_folder_should_be(cli, folder, model, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = cli(*arguments(folder[0], tmp_path / "out", model))
    assert done.code == 5


def test_two_processes(command, folder, masks, model, tmp_path):
    line = arguments(folder[0], tmp_path / "m", model)
    done = command(*line, "--scheduler", "processes:2")
    assert done.code == 7, done.err
    assert contents(tmp_path / "m") == contents(masks[0])


def test_library_call(model, tmp_path):
    for k in range(3):
        write_image(tmp_path / "in" / f"{k}.png", picture(30, 40, seed=k))
    calls = []
    config = PredictConfig(model=str(model), tile=64, overlap=0)
    result = predict(
        [tmp_path / "in"], tmp_path / "out", config, lambda done, known: calls.append((done, known))
    )
    assert (len(result.runs), result.failed, result.exit_code) == (3, (), 0)
    assert result.pixels == 3 * 30 * 40 == calls[-1][0]
    assert np.all(np.diff([done for done, _ in calls]) > 0)


def test_a_link_to_nothing_fails_alone(tmp_path, model, cli):
    images = tmp_path / "images"
    images.mkdir()
    one_of(0, images)
    for name in ("gone.tif", "gone.txt"):
        (images / name).symlink_to(tmp_path / "nothing")
    done = cli(*arguments(images, tmp_path / "masks", model), "--json")
    assert done.code == 7, done.err
    found = json.loads(done.out)
    assert len(found["runs"]) == 1
    assert [(one["input"], one["code"]) for one in found["failed"]] == [
        (str(images / "gone.tif"), 3)
    ]
    assert "no such file" in found["failed"][0]["error"]


def test_the_dry_run_knows_what_the_run_would_leave_or_refuse(cli, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for k in range(2):
        write_image(source / f"{k}.png", picture(30, 40, seed=k))
    assert cli(*arguments(source, out, model)).code == 0
    (source / "0.png").write_text("gone bad since")
    line = (*arguments(source, out, model), "--skip-finished", "--dry-run", "--json")
    done = cli(*line)
    assert done.code == 0, done.err
    assert [one["skipped"] for one in json.loads(done.out)["estimate"]] == [True, True]
    write_image(source / "1.jpg", picture(30, 40))
    for dry in ((), ("--dry-run",)):
        assert cli(*arguments(source, tmp_path / "new", model), *dry).code == 5


def test_a_signature_is_nowhere(cli, model, served, tmp_path):
    folder, address, _ = served
    write_tif(folder / "a.tif", picture(30, 40), georeferenced=True)
    names = [f"{address}/{name}.tif?sig=SECRET" for name in "ab"]
    for dry in ((), ("--dry-run",)):
        done = cli("predict", *names, "--out", tmp_path / "out", "--model", model, "--json",
                   "--allow-remote", "--csv", tmp_path / "a.csv", *dry)  # fmt: skip
        assert done.code == 7
        assert "b.tif" in done.out
        assert "SECRET" not in done.out + done.err
    assert "b.tif" in (tmp_path / "a.csv").read_text()
    assert "SECRET" not in (tmp_path / "a.csv").read_text()


def test_a_threshold_without_effect_is_told(cli, model, tmp_path):
    write_image(tmp_path / "a.png", picture(30, 40))
    done = cli("predict", tmp_path / "a.png", "--out", tmp_path / "x.png", "--model", model,
               "--threshold", "0.8")  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.count("--threshold has no effect") == 1


def test_letters_that_a_terminal_does_not_have(folder, model, environment, tmp_path):
    write_image(tmp_path / "水.png", picture(30, 40))
    line = [sys.executable, "-m", "tilenet", "predict", tmp_path / "水.png", "--out",
            tmp_path / "水.mask.png", "--model", model]  # fmt: skip
    done = subprocess.run(line, env=environment | {"PYTHONIOENCODING": "latin-1"},
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\\u6c34.mask.png\n")


def test_a_result_that_nobody_takes_is_in_the_summary(model, environment, tmp_path):
    write_image(tmp_path / "a.png", picture(30, 40))
    line = [sys.executable, "-m", "tilenet", "predict", tmp_path / "a.png", "--out",
            tmp_path / "x.png", "--model", model, "--summary", tmp_path / "s.json"]  # fmt: skip
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, env=environment, stdout=full, stderr=-3, check=False)
    found = json.loads((tmp_path / "s.json").read_text())
    assert (done.returncode, found["exit_code"]) == (6, 6)
    assert found["finished"] == 1
