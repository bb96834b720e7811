"""The course of a run: killed, resumed, repeated; its folder, its commands, its exit codes."""

import contextlib
import errno
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import labelled
import numpy as np
import psutil
import pytest
import rasterio
import torch
from clusters import wait_for
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from tilenet import durable
from tilenet.errors import OutputError, UsageError
from tilenet.evaluate_api import evaluate_model
from tilenet.quiet import ignoring
from tilenet.train_api import train
from tilenet.training.augmentation import apply_geometry, change_colours, draw_geometry
from tilenet.training.checkpoint import BEST, LAST, RunState, write_checkpoint
from tilenet.training.config import TrainConfig, dump_toml, load_train_config

TINY = {
    "arch": "classic-unet", "options": {"widths": [4, 8], "dropout": 0.3}, "tile": 32,
    "batch_size": 2, "epochs": 3, "steps": 3, "workers": 0, "device": "cpu", "precision": "fp32",
    "rotate": 20.0, "elastic": 3.0,
}  # fmt: skip
FLAGS = [
    "--arch", "classic-unet", "--set", "options={widths=[4, 8], dropout=0.3}", "--tile", 32,
    "--batch-size", 2, "--epochs", 3, "--steps", 3, "--workers", 0, "--device", "cpu",
    "--precision", "fp32", "--set", "rotate=20.0", "--set", "elastic=3.0",
]  # fmt: skip


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the data and the folder of an undisturbed run."""
    root = tmp_path_factory.mktemp("run")
    data = labelled.pairs(root / "data")
    train(TrainConfig(data=data, **TINY), root / "model")
    return data, root / "model"


def test_folder_holds_what_the_readme_says(finished):
    _, model = finished
    assert {p.name for p in model.iterdir()} >= {
        "config.json", "tilenet.json", "model.safetensors", "train.toml", "metrics.json",
        "metrics.csv", "report.html", "checkpoints",
    }  # fmt: skip
    assert not (model / ".tilenet-cache").exists()
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["steps"] == 9
    assert 0 <= metrics["data_wait_share"] <= 1
    assert len((model / "metrics.csv").read_text().splitlines()) == 4
    page = (model / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.count("<img") >= 1
    assert page.count("<svg") == 2


def test_predict_runs_the_folder_with_no_other_flag(finished, cli, tmp_path):
    data, model = finished
    image = sorted((data / "images").iterdir())[0]
    done = cli("predict", image, "--out", tmp_path / "mask.png", "--model", model)
    assert done.code == 0, done.err
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (64, 64)


def test_recipe_gives_identical_weights(finished, cli, tmp_path):
    _, model = finished
    done = cli("train", "--config", model / "train.toml", "--out", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert digest(tmp_path / "again") == digest(model)
    assert json.loads(done.out)["output"] == str(tmp_path / "again")


def test_loader_processes_do_not_change_the_weights(finished, tmp_path):
    data, model = finished
    train(TrainConfig(data=data, **(TINY | {"workers": 1})), tmp_path / "worker")
    assert digest(tmp_path / "worker") == digest(model)


def test_stopped_anywhere_it_resumes_to_the_same_bytes(finished, tmp_path):
    data, model = finished
    config = TrainConfig(data=data, **TINY)

    class StopError(Exception):
        pass

    def stop_at(wanted):
        def progress(done, _all, _shown):
            if done == wanted:
                raise StopError

        return progress

    out = tmp_path / "model"
    for number, step in enumerate((2, 4, 7, 9)):
        with pytest.raises(StopError):
            train(config, out, resume=number > 0, progress=stop_at(step))
    train(config, out, resume=True)
    assert digest(out) == digest(model)
    history = (out / "metrics.csv").read_text()
    assert history == (model / "metrics.csv").read_text()


def test_killed_process_resumes_to_the_same_bytes(finished, tmp_path, environment):
    data, model = finished
    out = tmp_path / "model"
    line = [sys.executable, "-m", "tilenet", "train", data, "--out", out, *map(str, FLAGS)]
    process = subprocess.Popen([*line, "--resume"], env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 90
    while not (out / "checkpoints" / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    done = subprocess.run([*line, "--resume"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(model)


@pytest.mark.long
def test_a_killed_process_leaves_no_loader_behind(finished, tmp_path, environment):
    data, _ = finished
    line = [
        sys.executable, "-m", "tilenet", "train", data, "--out", tmp_path / "m",
        *map(str, FLAGS), "--workers", "2", "--steps", "100000",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(line, env=environment, stderr=log, start_new_session=True)
    group = psutil.Process(process.pid)

    def loaders():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that went while we looked
            servers = [c for c in group.children() if "forkserver" in " ".join(c.cmdline())]
            return [worker for server in servers for worker in server.children()]
        return []

    try:
        wait_for(lambda: len(loaders()) >= 2, 90, "no loader came")
        family = group.children(recursive=True)
        time.sleep(1)  # they have begun to work
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_a_finished_run_is_not_replaced(finished, tmp_path):
    data, model = finished
    config = TrainConfig(data=data, **TINY)
    with pytest.raises(OutputError, match="a run is there already"):
        train(config, model)
    other = TrainConfig(data=data, **(TINY | {"lr": 0.5}))
    with pytest.raises(OutputError, match="another --lr"):
        train(other, model, resume=True, given=frozenset(["lr"]))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="not of a run"):
        train(config, tmp_path / "foreign", overwrite=True)
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]


def test_broken_pairs_print_one_line_each(cli, tmp_path):
    data = labelled.pairs(tmp_path / "data")
    (data / "masks" / "i1.png").unlink()
    Image.new("L", (9, 9)).save(data / "masks" / "i2.png")
    done = cli("train", data, "--out", tmp_path / "model", *FLAGS)
    assert done.code == 3
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith("tilenet: error:")]
    assert len(lines) == 3
    assert "i1.png" in lines[0]
    assert "sizes differ" in lines[1]
    assert lines[2].startswith("tilenet: error: 2 broken")


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--loss", "magic"], 2),
        (["--arch", "magic"], 2),
        (["--tile", "33"], 2),
        (["--set", "nonsense=1"], 2),
        (["--encoder-weights", "missing.pth", "--arch", "unet"], 4),
        (["--classes", "a,b,c,d"], 2),
        (["--class-weights", "auto", "--loss", "lovasz"], 2),
        (["--border-w0", "10", "--loss", "dice"], 2),
    ],
)
def test_wrong_options(flags, code, cli, tmp_path):
    data = labelled.pairs(tmp_path / "data")
    done = cli("train", data, "--out", tmp_path / "model", *FLAGS, *flags)
    assert done.code == code, done.err
    assert not (tmp_path / "model").exists()


def test_set_takes_keys_that_are_flags_too(finished, cli, tmp_path):
    data, _ = finished
    sets = ["--set", "lr=0.0003", "--set", "epochs=7", "--epochs", "1"]
    done = cli("train", data, "--out", tmp_path / "m", *FLAGS, *sets)
    assert done.code == 0, done.err
    known = load_train_config(tmp_path / "m" / "train.toml", {})
    assert (known.lr, known.epochs) == (0.0003, 1)  # a flag wins


def test_another_config_is_not_resumed_in_vain(finished, cli, tmp_path):
    data, model = finished
    config = tmp_path / "c.toml"
    config.write_text(f'data = "{data}"\nepochs = 80\n')
    done = cli("train", "--resume", "--config", config, "--out", model)
    assert (done.code, "another --epochs" in done.err) == (5, True), done.err
    config.write_text(f'data = "{data}"\nepochs = 3\nsteps = 0\n')
    assert cli("train", "--resume", "--config", config, "--out", model).code == 0


def test_a_checkpoint_that_finds_no_room(tmp_path):
    """The system's own error, not torch's about the archive it could not finish."""
    out = tmp_path / "model"
    (out / "checkpoints").mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_checkpoint(out / LAST, RunState(), {"x": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    del caught
    gc.collect()  # torch's writer, had it met the error, would end this process now
    assert not list((out / "checkpoints").iterdir())


def test_what_a_killed_writer_left_goes(finished, tmp_path):
    data, model = finished
    out = shutil.copytree(model, tmp_path / "m")
    for name in (LAST, BEST):
        durable.temporary(out / name).write_bytes(b"half")
    train(TrainConfig(data=data, **TINY), out, resume=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["best.pt", "last.pt"]


def test_images_of_several_files_are_judged(finished, tmp_path):
    """ENVI's pixels are nothing without the header beside them."""
    data = tmp_path / "data"
    shutil.copytree(finished[0] / "masks", data / "masks")
    (data / "images").mkdir()
    for path in (finished[0] / "images").iterdir():
        with Image.open(path) as image:
            pixels = np.moveaxis(np.asarray(image), -1, 0)
        with ignoring(NotGeoreferencedWarning):
            profile = {"driver": "ENVI", "width": 64, "height": 64, "count": 3, "dtype": "uint8"}
            target = data / "images" / f"{path.stem}.img"
            with rasterio.open(target, "w", **profile) as dst:
                dst.write(pixels)
    found = evaluate_model(str(finished[1]), TrainConfig(data=data)).as_dict()
    assert found == evaluate_model(str(finished[1]), TrainConfig(data=finished[0])).as_dict()


def test_evaluate_a_mask(cli, tmp_path):
    truth = np.zeros((10, 10), np.uint8)
    truth[:5] = 255
    pred = np.zeros((10, 10), np.uint8)
    pred[:4] = 1
    Image.fromarray(truth).save(tmp_path / "t.png")
    Image.fromarray(pred).save(tmp_path / "p.png")
    done = cli("evaluate", "--pred", tmp_path / "p.png", "--truth", tmp_path / "t.png", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [c["id"] for c in found["classes"]] == [0, 1]
    assert found["classes"][1]["dice"] == pytest.approx(2 * 40 / 90, abs=1e-6)
    assert found["classes"][1]["iou"] == pytest.approx(0.8)
    assert found["classes"][1]["recall"] == pytest.approx(0.8)
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["mean_iou"] == pytest.approx((0.8 + 50 / 60) / 2, abs=1e-6)
    assert len(found["per_image"]) == 1
    Image.fromarray(pred[:5]).save(tmp_path / "p.png")
    done = cli("evaluate", "--pred", tmp_path / "p.png", "--truth", tmp_path / "t.png")
    assert done.code == 3
    assert "sizes differ" in done.err
    assert cli("evaluate", "--pred", tmp_path / "p.png").code == 2
    both = ("--pred", tmp_path / "p.png", "--truth", tmp_path / "t.png")
    done = cli("evaluate", *both, "--bands", "1")
    assert (done.code, "--bands" in done.err) == (2, True)


@pytest.mark.parametrize("cut", ["pred.png", "truth.png"])
def test_evaluate_refuses_a_cut_off_mask(cut, cli, tmp_path):
    # GDAL's short cut for whole PNGs would give whatever memory held before.
    noise = np.random.default_rng(0).integers(0, 2, (256, 256)).astype(np.uint8)
    pred, truth = tmp_path / "pred.png", tmp_path / "truth.png"
    for path in (pred, truth):
        Image.fromarray(noise).save(path)
    labelled.cut(tmp_path / cut)
    done = cli("evaluate", "--pred", pred, "--truth", truth)
    assert done.code == 3, done.out
    assert str(tmp_path / cut) in done.err


def test_evaluate_a_model_and_folders_agree(finished, cli, tmp_path):
    data, model = finished
    found = evaluate_model(str(model), TrainConfig(data=data)).as_dict()
    assert len(found["per_image"]) == 6
    done = cli("predict", data / "images", "--out", tmp_path / "masks", "--model", model)
    assert done.code == 0, done.err
    done = cli("evaluate", "--pred", tmp_path / "masks", "--truth", data / "masks", "--json")
    assert done.code == 0, done.err
    again = json.loads(done.out)
    assert again["mean_dice"] == found["mean_dice"]
    assert again["accuracy"] == found["accuracy"]


def test_evaluate_needs_no_second_image(finished, cli, tmp_path):
    data, model = finished
    for kind in ("images", "masks"):
        (tmp_path / "one" / kind).mkdir(parents=True)
        (tmp_path / "one" / kind / "i3.png").write_bytes((data / kind / "i3.png").read_bytes())
    done = cli("evaluate", "--model", model, "--data", tmp_path / "one", "--json")
    assert done.code == 0, done.err
    [image] = json.loads(done.out)["per_image"]
    assert image["image"] == "i3"
    mask = tmp_path / "mask.zarr"
    assert cli("predict", data / "images" / "i3.png", "--out", mask, "--model", model).code == 0
    done = cli("evaluate", "--pred", mask, "--truth", data / "masks" / "i3.png", "--json")
    assert json.loads(done.out)["mean_iou"] == image["mean_iou"]


def test_tensorboard_takes_the_course(finished, tmp_path):
    data, model = finished
    train(TrainConfig(data=data, **TINY, track="tensorboard"), tmp_path / "model")
    assert list((tmp_path / "model" / "tensorboard").iterdir())
    assert digest(tmp_path / "model") == digest(model)


def test_changed_data_are_not_gone_on_with(tmp_path):
    data = labelled.pairs(tmp_path / "data")

    class StopError(Exception):
        pass

    def stop(done, _all, _shown):
        if done == 4:
            raise StopError

    with pytest.raises(StopError):
        train(TrainConfig(data=data, **TINY), tmp_path / "model", progress=stop)
    Image.fromarray(labelled.rgb(labelled.disc(9)[0])).save(data / "images" / "i2.png")
    with pytest.raises(OutputError, match="data have changed"):
        train(TrainConfig(data=data, **TINY), tmp_path / "model", resume=True)


def test_a_loss_that_is_no_number_stops_the_run(cli, tmp_path):
    data = labelled.pairs(tmp_path / "data")
    done = cli(
        "train", data, "--out", tmp_path / "model", *FLAGS, "--lr", "1e30", "--set", "clip=0"
    )
    assert done.code == 4
    assert "the loss is not finite at step" in done.err


def test_half_weights_are_half_the_size(finished, cli, tmp_path):
    data, model = finished
    train(TrainConfig(data=data, half_weights=True, **TINY), tmp_path / "half")
    sizes = [(m / "model.safetensors").stat().st_size for m in (tmp_path / "half", model)]
    assert sizes[0] < 0.65 * sizes[1]
    done = cli("info", tmp_path / "half", "--json")
    assert done.code == 0, done.err


def test_missing_extra_is_one_line(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    done = cli("train", tmp_path, "--out", tmp_path / "model")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "training needs the extra train; accelerate is not installed" in done.err
    monkeypatch.setitem(sys.modules, "geopandas", None)
    data = tmp_path / "polygons"
    data.mkdir()
    (data / "p.geojson").write_text("{}")
    Image.new("RGB", (64, 64)).save(data / "a.png")
    done = cli("evaluate", "--model", "nuclei", "--data", data)
    assert done.code == 2
    assert "polygons need the extra vector" in done.err


@pytest.mark.long
def test_two_processes_train_one_model(finished, tmp_path, environment):
    data, model = finished
    out = tmp_path / "model"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [sys.executable, *launch, "-m", "tilenet", "train", data, "--out", out, *map(str, FLAGS)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"  # one of them speaks
    assert done.stderr.count("epoch 3 of 3") == 1
    # The same windows, so nearly the same course: batches are split, their losses averaged.
    losses = [
        [float(row.split(",")[3]) for row in (m / "metrics.csv").read_text().splitlines()[1:]]
        for m in (out, model)
    ]
    np.testing.assert_allclose(*losses, atol=0.15)


@pytest.mark.parametrize("schedule", ["plateau", "constant"])
def test_schedules_and_early_stopping(schedule, finished, tmp_path):
    data, _ = finished
    keys = TINY | {"lr": 1e-12, "epochs": 6, "steps": 1, "patience": 2, "warmup": 0.0, "ema": 0.0}
    result = train(TrainConfig(data=data, schedule=schedule, **keys), tmp_path / "model")
    assert result.metrics["epochs"] < 6


def test_config_survives_toml(tmp_path):
    config = TrainConfig(data=tmp_path, class_weights=(1.0, 2.5), classes=("a", "b"), **TINY)
    (tmp_path / "t.toml").write_text(dump_toml(config))
    assert load_train_config(tmp_path / "t.toml", {}) == config


@pytest.mark.parametrize("bands", [1, 3, 7])
def test_augmentation_moves_image_and_label_together(bands):
    config = TrainConfig(data=".", rotate=45, elastic=4, scale=(0.5, 2), brightness=0, contrast=0)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        how = draw_geometry(config, 64, generator)
        y, x = torch.meshgrid(torch.arange(how.side), torch.arange(how.side), indexing="ij")
        label = ((y // 24 + x // 24) % 2).to(torch.int32)[None].repeat(2, 1, 1)
        image = label[:1].float().repeat(bands, 1, 1)
        moved, moved_label = apply_geometry(image, label, how, 64, config.elastic)
        assert moved.shape == (bands, 64, 64)
        assert set(moved_label.unique().tolist()) == {0, 1}
        agree = (moved[0] > 0.5) == (moved_label[0] > 0)
        assert agree.float().mean() > 0.9
        assert moved.min() >= -0.01  # no invented corner
        changed = change_colours(moved, TrainConfig(data="."), generator)
        assert changed.shape == moved.shape
        assert torch.isfinite(changed).all()


def test_a_pattern_without_an_image_leaves_the_model(finished, tmp_path):
    data, model = finished
    shutil.copytree(model, tmp_path / "model")
    with pytest.raises(UsageError, match="matches no image"):
        train(
            TrainConfig(data=data, often={"none*": 2}, **TINY), tmp_path / "model", overwrite=True
        )
    assert digest(tmp_path / "model") == digest(model)
    assert (tmp_path / "model" / "report.html").exists()


def test_saturation_moves_the_bands_to_and_from_their_mean():
    off = dict.fromkeys(("brightness", "contrast", "gamma", "noise", "blur"), 0)
    config = TrainConfig(data=".", saturation=1, **off)
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    grey, factors = image.mean(0), []
    for seed in range(200):
        changed = change_colours(image, config, torch.Generator().manual_seed(seed))
        factor = (changed - grey)[0, 0, 0] / (image - grey)[0, 0, 0]
        torch.testing.assert_close(changed, (image - grey) * factor + grey)
        factors.append(float(factor))
    assert 0 <= min(factors) < 0.1
    assert 1.9 < max(factors) <= 2
