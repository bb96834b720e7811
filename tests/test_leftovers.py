"""What a crash leaves half done is neither taken for whole nor thrown away."""

import shutil

import networks
import pytest
import zarr
from crashes import Crash, crash, run
from rasters import picture, write_tif

from tilenet import durable, mask_api, watchdog
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import large, output, pack
from tilenet.engine.journal import Journal
from tilenet.engine.runfolder import PLAN, STORE, STRIPS, run_folder
from tilenet.errors import OutputError, ResourceError
from tilenet.predicting import asking
from tilenet.sources import open_raster

ALL = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.positional(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture
def source(tmp_path):
    return write_tif(tmp_path / "a.tif", picture(150, 200), georeferenced=True)


def unfinished(monkeypatch, source, out, model, **options):
    """Leave a run of which every block is made, and which has no mask yet."""
    with monkeypatch.context() as patch:
        patch.setattr(large, "export", crash)
        patch.setattr(large, "publish", crash)
        with pytest.raises(Crash):
            run(source, out, model, **options)


def files(out):
    if out.is_file():
        return {path.name: path.read_bytes() for path in out.parent.glob(f"{out.stem}.*")}
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture
def whole(source, model, tmp_path):
    """Return what undisturbed runs make, by name."""

    def make(name, **options):
        out = tmp_path / "undisturbed" / name
        out.parent.mkdir(exist_ok=True)
        run(source, out, model, **options)
        return files(out)

    return make


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_folder_that_is_half_removed_is_no_run(
    source, model, whole, tmp_path, monkeypatch, order
):
    """Whatever goes first: a store with holes must not be found by the next run of the plan."""
    out, remove = tmp_path / "x.tif", shutil.rmtree

    def some(path):
        if not (path / "mask").is_dir():
            remove(path)
            return
        for file in [file for file in sorted(path.rglob("*"))[::order] if file.is_file()][:9]:
            file.unlink()
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(durable.shutil, "rmtree", some)
        with pytest.raises(Crash):
            run(source, out, model)
    out.unlink()
    assert run(source, out, model).blocks_resumed == 0
    assert files(out) == whole("x.tif")
    assert not run_folder(out).exists()


@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
@pytest.mark.parametrize(("array", "left"), [("mask", ALL - 1), ("ovr_2x/mask", ALL)])
def test_chunks_that_have_gone_are_made_again(
    source, model, whole, tmp_path, monkeypatch, name, array, left
):
    out = tmp_path / name
    unfinished(monkeypatch, source, out, model)
    next((run_folder(out) / STORE / array / "c").rglob("*/0")).unlink()
    result = run(source, out, model)
    assert result.blocks_resumed == left
    assert files(out) == whole(name)


def test_chunks_that_go_before_the_end_make_no_hole(source, model, whole, tmp_path, monkeypatch):
    out = tmp_path / "x.tif"

    def purge(_plan):
        (run_folder(out) / STORE / "mask/c/0/0").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(large, "check_unchanged", purge)
        with pytest.raises(ResourceError, match="have gone"):
            run(source, out, model)
    assert run(source, out, model).blocks_resumed == ALL - 1
    assert files(out) == whole("x.tif")


@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
def test_one_block_would_do_for_what_is_half_done(
    source, model, whole, tmp_path, monkeypatch, name
):
    """A resume keeps the blocks as they were cut, even if this run would cut none."""
    out = tmp_path / name
    unfinished(monkeypatch, source, out, model)
    result = run(source, out, model, block=256)
    assert (result.blocks, result.blocks_resumed) == (ALL, ALL)
    assert files(out) == whole(name)


def test_a_plan_that_the_disk_does_not_give_just_now(source, model, tmp_path, monkeypatch):
    out = tmp_path / "x.zarr"
    unfinished(monkeypatch, source, out, model)
    plan = run_folder(out) / PLAN
    plan.rename(tmp_path / "away")
    plan.mkdir()  # to read it is an OSError, as on a network's disk that is gone
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ResourceError, match="plan of an unfinished run cannot be read"):
            run(source, out, model, **options)
    plan.rmdir()
    (tmp_path / "away").rename(plan)
    assert run(source, out, model).blocks_resumed == ALL


def test_a_plan_of_another_version(source, model, tmp_path, monkeypatch):
    out = tmp_path / "x.zarr"
    unfinished(monkeypatch, source, out, model)
    plan = run_folder(out) / PLAN
    content = plan.read_bytes()
    plan.write_bytes(content.replace(b'"lattice"', b'"grid"'))
    with pytest.raises(OutputError, match="another version"):
        run(source, out, model)
    assert len(list((run_folder(out) / STORE / "mask/c").rglob("*/*"))) == ALL
    assert run(source, out, model, overwrite=True).blocks_resumed == 0


@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
@pytest.mark.parametrize("blocks", [64, 256], ids=["blocks", "block"])
def test_the_old_mask_comes_back_after_a_crash(source, model, tmp_path, monkeypatch, name, blocks):
    """The process ends when the old mask is out of the way, and its successor has no name yet."""
    out, options = tmp_path / name, {"block": blocks, "probabilities": True}
    run(source, out, model, **options)
    before = files(out)
    rename = durable.rename

    def last(source, target):
        if target == out:
            raise Crash
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "rename", last)
        patch.setattr(durable, "write", _crashing(durable.write, out))
        # The process is gone: what it would still tidy up stays.
        for module in (output, pack):
            patch.setattr(module, "put_back", lambda _out: None)
        patch.setattr(pack, "remove_run_folder", lambda _folder: None)
        with pytest.raises(Crash):
            run(source, out, model, **options, blend="hann", overwrite=True)
    assert not out.exists()
    with pytest.raises(OutputError, match="differs in blend"):
        run(source, out, model, **options, blend="hann")
    assert files(out) == before
    run(source, out, model, **options, blend="hann", overwrite=True)
    assert mask_api.verify(out).ok
    assert files(out) != before


@pytest.mark.parametrize("gone", [True, False], ids=["a crash", "a failure"])
@pytest.mark.parametrize("at", range(1, 6))
def test_an_old_mask_that_is_half_moved_away_comes_back(
    source, model, tmp_path, monkeypatch, at, gone
):
    """It is four files: whichever of them has moved when it ends, none is lost."""
    out, options, count = tmp_path / "x.tif", {"probabilities": True}, 0
    run(source, out, model, **options)
    before = files(out)
    replace = type(tmp_path).replace

    def moved(path, target):
        nonlocal count
        count += path.parent == tmp_path and not path.name.startswith(".")
        if count == at:
            count += 1
            raise Crash
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", moved)
        if gone:  # the process, and with it what it would still tidy up
            patch.setattr(output, "put_back", lambda _out: None)
            patch.setattr(type(tmp_path), "unlink", lambda *_a, **_k: None)
        try:
            run(source, out, model, **options, blend="hann", overwrite=True)
        except Crash:
            assert at <= 4
        else:
            assert at == 5
            return
    with pytest.raises(OutputError, match="differs in blend"):
        run(source, out, model, **options, blend="hann")
    assert files(out) == before


def _crashing(write, out):
    def crashing(path, *arguments, **options):
        if path == out:
            raise Crash
        write(path, *arguments, **options)

    return crashing


@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
def test_an_old_mask_is_there_until_the_new_one_is_whole(
    source, model, tmp_path, monkeypatch, name
):
    out, seen = tmp_path / name, []
    run(source, out, model)
    move = output.move_aside

    def look(path):
        seen.append(out.exists())
        made = run_folder(out) / (STORE if name == "x.zarr" else "export")
        seen.append(any(made.rglob("zarr.json" if name == "x.zarr" else ".x.tif.*")))
        move(path)

    monkeypatch.setattr(output, "move_aside", look)
    run(source, out, model, blend="hann", overwrite=True)
    assert seen[0]


def test_an_export_that_was_killed_gives_the_old_one_back(source, model, tmp_path, monkeypatch):
    mask, out = tmp_path / "x.zarr", tmp_path / "y.tif"
    run(source, mask, model)
    mask_api.export(mask, out)
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", _crashing(durable.write, out))
        patch.setattr(output, "put_back", lambda _out: None)
        for name in ("put_back", "remove_run_folder"):
            patch.setattr(f"tilenet.engine.replaced.{name}", lambda _path: None)
        with pytest.raises(Crash):
            mask_api.export(mask, out, overwrite=True)
    assert not out.exists()
    with pytest.raises(OutputError, match="the output exists"):
        mask_api.export(mask, out)
    assert files(out) == before
    assert zarr.open_group(mask, mode="r")["mask"].shape == (150, 200)


def test_a_folder_goes_on_with_what_its_runs_were_begun_with(tmp_path, monkeypatch):
    """Torch began one mask, and "auto" would take OpenVINO: for that one it is torch."""
    options = {"block": 96, "chunk": 96, "precision": "fp32", "tile": 96, "overlap": 32}
    inputs = tmp_path / "in"
    inputs.mkdir()
    first, second = (write_tif(inputs / f"{k}.tif", picture(150, 200, seed=k)) for k in (1, 2))
    masks = tmp_path / "masks"

    def make(paths, out, **more):
        return predict(paths, out, PredictConfig(format="zarr", **options | more)).runs

    with monkeypatch.context() as patch:
        patch.setattr(large, "publish", crash)
        with pytest.raises(Crash):
            make([first], masks / "1.zarr", backend="torch")
    runs = make([inputs], masks)
    assert [(run.backend, run.blocks_resumed) for run in runs] == [("torch", 6), ("openvino", 0)]
    make([first], tmp_path / "alone.zarr", backend="torch")
    assert files(masks / "1.zarr") == files(tmp_path / "alone.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(large, "publish", crash)
        with pytest.raises(Crash):
            make([second], masks / "3.zarr", backend="torch")
    with pytest.raises(OutputError, match="differs in backend"):
        make([second], masks / "3.zarr", backend="openvino")


@pytest.mark.parametrize("several", [False, True], ids=["one input", "a folder"])
def test_torch_keeps_its_threads(tmp_path, monkeypatch, several):
    """Its kernels follow them: begun by one process of two, a mask goes on as one of its own."""
    options = {"block": 96, "chunk": 96, "precision": "fp32", "tile": 96, "overlap": 32}
    config = PredictConfig(format="zarr", backend="torch", **options)
    (tmp_path / "in").mkdir()
    scene = write_tif(tmp_path / "in" / "1.tif", picture(150, 200))
    out = tmp_path / "masks" / "1.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(large, "publish", crash)
        patch.setattr(asking, "cores", lambda: 3)
        with pytest.raises(Crash):
            predict([scene], out, config)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(large, "_finish", lambda plan, *_a, **_k: seen.append(plan) or crash())
        with pytest.raises(Crash):
            predict([scene.parent if several else scene], out.parent if several else out, config)
    assert [plan.setup.threads for plan in seen] == [3]


def test_a_block_that_was_lost_and_not_noted_is_made(source, model, whole, tmp_path, monkeypatch):
    """Its neighbours get their answers too: the run ended between the mark and the journal."""
    out = tmp_path / "x.zarr"
    append = Journal.append

    def some(self, records):
        if len(self.blocks) >= 2:
            raise Crash
        append(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", some)
        with pytest.raises(Crash):
            run(source, out, model)
    (run_folder(out) / STRIPS / "5.lost").touch()
    assert run(source, out, model).blocks_resumed >= 2
    assert files(out) == whole("x.zarr")


def test_the_last_look_at_the_source_is_watched(source, model, tmp_path, monkeypatch):
    late = []

    def look(path, view):
        late.extend(one for _, _, one in watchdog._reads.values())
        return open_raster(path, view)

    monkeypatch.setattr(large, "open_raster", look)
    run(source, tmp_path / "x.zarr", model)
    assert late == [str(source)]
