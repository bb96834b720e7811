"""What a crash, a foreign file or a failure leaves at the mask's path, and what a rerun does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import rasterio
from crashes import BLOCKS, Crash, crash, run
from rasters import picture, write_image, write_tif

from tilenet import durable, mask_api, stops
from tilenet.api import predict
from tilenet.cli import run as command_line
from tilenet.config import PredictConfig
from tilenet.engine import large, output, pack, task
from tilenet.engine.document import decode_sidecar, encode_document, encode_sidecar
from tilenet.engine.runfolder import locked, run_folder
from tilenet.errors import InterruptError, OutputError, ResourceError
from tilenet.stops import stopping_on_signals

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

ONE_BLOCK = BLOCKS | {"block": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.positional(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture
def source(tmp_path):
    return write_tif(tmp_path / "a.tif", picture(150, 200), georeferenced=True)


def pixels(result):
    return {c.id: c.pixels for c in result.classes}


def mask_of(path):
    with rasterio.open(path) as src:
        return src.read(1)


# -- crashes


@pytest.mark.parametrize("then", ["finished", "overwritten", "removed"])
def test_a_crash_after_the_rename(source, model, tmp_path, monkeypatch, then):
    import shutil

    import zarr

    out = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(large, "remove_run_folder", crash)
        with pytest.raises(Crash):
            run(source, out, model)
    before = zarr.open_group(out, mode="r")["mask"][...]
    if then == "removed":
        shutil.rmtree(out)
    result = run(source, out, model, overwrite=then == "overwritten")
    assert result.blocks_resumed == (12 if then == "finished" else 0)
    mask = zarr.open_group(out, mode="r")["mask"][...]
    assert np.array_equal(mask, before)
    assert pixels(result) == {k: int((mask == k).sum()) for k in range(len(pixels(result)))}
    assert not run_folder(out).exists()


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "strips"]])
@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
def test_a_crash_while_the_run_folder_is_removed(source, model, tmp_path, name, left):
    out = tmp_path / name
    run(source, out, model)
    run_folder(out).mkdir()
    for part in left:
        (run_folder(out) / part).touch()
    assert run(source, out, model).blocks_resumed == 12
    assert not run_folder(out).exists()


def test_a_crash_once_the_old_mask_is_replaced(source, model, tmp_path, monkeypatch):
    """The old one lies in the run folder still; the same command makes room again."""
    out = tmp_path / "x.zarr"
    run(source, out, model)
    with monkeypatch.context() as patch:
        patch.setattr(large, "remove_run_folder", crash)
        with pytest.raises(Crash):
            run(source, out, model, overwrite=True)
    assert (run_folder(out) / "replaced" / "x.zarr").is_dir()
    assert run(source, out, model, overwrite=True).complete
    assert not run_folder(out).exists()
    assert mask_api.verify(out).ok


def test_what_lies_beside_a_store_is_not_ours(source, model, tmp_path):
    out = tmp_path / "x.zarr"
    run(source, out, model)
    (tmp_path / "x.zarr.aux.xml").write_text("theirs")
    assert run(source, out, model, overwrite=True).blocks_resumed == 0
    assert (tmp_path / "x.zarr.aux.xml").read_text() == "theirs"


def test_a_repair_leaves_an_unfinished_run_alone(source, model, tmp_path, monkeypatch):
    out = tmp_path / "x.zarr"
    run(source, out, model)
    chunk = next(p for p in (out / "mask" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    other = {"overwrite": True, "overlap": 32}
    with monkeypatch.context() as patch:
        patch.setattr(large, "publish", crash)
        with pytest.raises(Crash):
            run(source, out, model, **other)
    with pytest.raises(OutputError, match="unfinished run"):
        mask_api.verify(out, repair=True)
    assert run(source, out, model, **other).blocks_resumed == 12


@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK])
@pytest.mark.parametrize("name", ["x.zarr", "x.tif", "x.png"])
@pytest.mark.parametrize("same", [True, False])
def test_a_run_that_another_one_overtakes(source, model, tmp_path, monkeypatch, blocks, name, same):
    """Both found the output free; the slower one must not replace what the faster one made."""
    out, looked = tmp_path / name, []
    faster = blocks if same else blocks | {"overlap": 32}
    check = pack.check_output

    def overtaken(path, plan, *, overwrite):
        found = check(path, plan, overwrite=overwrite)
        if not looked:
            looked.append(path)
            run(source, out, model, **faster)
        return found

    monkeypatch.setattr(pack, "check_output", overtaken)
    if same:
        assert run(source, out, model, **blocks).complete
    else:
        with pytest.raises(OutputError, match=r"overlap|another run"):
            run(source, out, model, **blocks)
    monkeypatch.undo()
    result = run(source, out, model, **faster)
    assert result.blocks_resumed == result.blocks
    assert not run_folder(out).exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK])
@pytest.mark.parametrize("name", ["x.zarr", "x.tif", "x.png", "x.ome.tif"])
def test_what_somebody_puts_there_meanwhile(
    source, model, tmp_path, monkeypatch, blocks, name, overwrite
):
    """The output was free when the run began; what is there at its end is not ours to replace."""
    out = tmp_path / name
    precious = out / "notes.txt" if name == "x.zarr" else out
    drive = task.drive

    def putting(*arguments):
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("precious")
        return drive(*arguments)

    for module in (pack, task):
        monkeypatch.setattr(module, "drive", putting)
    with pytest.raises(OutputError):
        run(source, out, model, overwrite=overwrite, **blocks)
    assert precious.read_text() == "precious"
    monkeypatch.undo()
    out.rename(tmp_path / "elsewhere")
    assert run(source, out, model, **blocks).complete
    assert not run_folder(out).exists()
    assert mask_api.verify(out).ok


def test_an_old_mask_that_cannot_come_back_just_now(source, model, tmp_path, monkeypatch):
    out = tmp_path / "x.zarr"
    run(source, out, model, **ONE_BLOCK)
    replace = type(out).replace

    def failing(path, target):
        if Path(target) == out:
            raise OSError(errno.EIO, "Input/output error", str(target))
        return replace(path, target)

    monkeypatch.setattr(type(out), "replace", failing)
    with pytest.raises(ResourceError):
        run(source, out, model, overwrite=True, **(ONE_BLOCK | {"overlap": 32}))
    assert not out.exists()
    monkeypatch.undo()
    assert run(source, out, model, **ONE_BLOCK).blocks_resumed == 0
    assert mask_api.verify(out).ok


@pytest.mark.parametrize("name", ["x.zarr", "x.png"])
def test_a_source_of_one_block_that_changes(source, model, tmp_path, monkeypatch, name):
    window = pack.read_window

    def changing(*arguments):
        write_tif(source, picture(150, 200, seed=1), georeferenced=True)
        return window(*arguments)

    monkeypatch.setattr(pack, "read_window", changing)
    with pytest.raises(OutputError, match="changed while it was read") as caught:
        run(source, tmp_path / name, model, **ONE_BLOCK)
    assert caught.value.code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_crash_of_a_group(source, model, tmp_path, monkeypatch, at):
    """Small PNGs get their names together: whatever a crash leaves, the next run makes whole."""
    inputs, out, count = tmp_path / "in", tmp_path / "out", 0
    inputs.mkdir()
    for name in "ab":
        write_image(inputs / f"{name}.png", picture(60, 70, seed=ord(name)))
    replace = type(tmp_path).replace

    def crash_at(path, target):
        nonlocal count
        count += 1
        if count == at:
            raise Crash
        return replace(path, target)

    config = PredictConfig(model=str(model), **ONE_BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", crash_at)
        patch.setattr(type(tmp_path), "unlink", lambda *_a, **_k: None)
        with pytest.raises(Crash):
            predict([inputs], out, config)
    named = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    order = ["a.png.tilenet.json", "a.png", "b.png.tilenet.json", "b.png"]
    assert named == set(order[: at - 1])
    assert not predict([inputs], out, config).failed
    assert {p.name for p in out.iterdir()} == set(order)


def test_a_group_follows_no_link(source, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out" / ".a.png.tmp").symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputError, match=r"\.a\.png\.tmp; remove the link"):
        run(source, tmp_path / "out" / "a.png", model, **ONE_BLOCK)
    assert (tmp_path / "theirs").read_text() == "theirs"


LONG = "x" * 225  # with ".png.tilenet.json", 242 of the 255 bytes that a name may have


@contextmanager
def unwritable(folder):
    """Keep everybody from a folder; root too, who may write where the mode forbids it."""
    immutable = os.geteuid() == 0
    try:
        if immutable:
            subprocess.run(["chattr", "+i", folder], check=True, capture_output=True)
        else:
            folder.chmod(0o555)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no folder can be made immutable here")
    try:
        yield
    finally:
        if immutable:
            subprocess.run(["chattr", "-i", folder], check=True)
        else:
            folder.chmod(0o755)


@contextmanager
def small_disk(point, size):
    """A disk of so many bytes, in memory."""
    point.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point]
    if os.geteuid() != 0 or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", point], check=True)


def small_images(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, picture(60, 70, seed=seed))
    return folder


def masks(out):
    return {str(path.relative_to(out)) for path in out.rglob("*.png")}


class TestWhatCannotBeWrittenOfAGroup:
    def test_a_name_that_is_too_long(self, model, tmp_path):
        longest, longer = f"{LONG}{13 * 'x'}.png", f"{LONG}{13 * 'y'}ä.png"
        inputs = small_images(tmp_path / "in", "a.png", "b.png", longest, longer)
        config = PredictConfig(model=str(model), **ONE_BLOCK)
        for _ in range(2):
            [failure] = predict([inputs], tmp_path / "out", config).failed
            assert (Path(failure.input).name, failure.code) == (longer, 5)
            assert failure.error.startswith("File name too long")
            assert failure.error.endswith("rename the input, or choose another --out")
            assert masks(tmp_path / "out") == {"a.png", "b.png", longest}
        assert not list((tmp_path / "out").glob(".*"))

    @pytest.mark.parametrize("name", ["png", "cog", "zarr"])
    def test_a_name_that_is_too_long_to_be_skipped(self, model, tmp_path, name):
        inputs = small_images(tmp_path / "in", "a.png", f"{LONG}{26 * 'x'}.png", "b.png")
        config = PredictConfig(model=str(model), format=name, skip_finished=True, **ONE_BLOCK)
        found = predict([inputs], tmp_path / "out", config)
        assert (len(found.runs), len(found.failed)) == (2, 1)

    def test_a_folder_that_is_closed(self, model, tmp_path):
        inputs = small_images(tmp_path / "in", "a/1.png", "b/1.png", "b/2.png", "c/1.png")
        config, out = PredictConfig(model=str(model), **ONE_BLOCK), tmp_path / "out"
        (out / "b").mkdir(parents=True)
        with unwritable(out / "b"):
            failed = predict([inputs], out, config).failed
        assert [one.input for one in failed] == [str(inputs / "b" / f"{k}.png") for k in (1, 2)]
        assert {(one.code, "no permission" in one.error) for one in failed} == {(6, True)}
        assert masks(out) == {"a/1.png", "c/1.png"}
        again = predict([inputs], out, config)
        assert (len(again.runs), again.failed) == (4, ())

    @pytest.mark.parametrize("blocked", [{0}, {4}, {1, 3}, {0, 1, 2, 3, 4}])
    def test_what_lies_in_the_way(self, model, tmp_path, blocked):
        names = [f"{k}.png" for k in range(5)]
        inputs, out = small_images(tmp_path / "in", *names), tmp_path / "out"
        for k in blocked:
            (out / f".{k}.png.tmp").mkdir(parents=True)
        found = predict([inputs], out, PredictConfig(model=str(model), **ONE_BLOCK))
        assert {int(Path(one.input).stem) for one in found.failed} == blocked
        assert masks(out) == {name for k, name in enumerate(names) if k not in blocked}

    def test_a_disk_that_is_full_ends_the_run(self, model, tmp_path, cli):
        inputs, disk = small_images(tmp_path / "in", "a.png", "b.png"), tmp_path / "disk"
        line = ["predict", inputs, "--out", disk / "out", "--model", model, "--tile", 64]
        with small_disk(disk, 64 << 10):
            (disk / "filler").write_bytes(bytes(48 << 10))  # of 16 pages, 4 are left
            done = cli(*line)
            assert (done.code, masks(disk)) == (6, set())
            assert "the disk is full" in done.err
            (disk / "filler").unlink()
            assert cli(*line).code == 0
            assert masks(disk / "out") == {"a.png", "b.png"}


@pytest.mark.parametrize(("name", "blocks"), [
    ("x.tif", BLOCKS), ("x.tif", ONE_BLOCK), ("x.png", BLOCKS),
], ids=["tif-blocks", "tif-block", "png-blocks"])  # fmt: skip
def test_what_is_half_written_lies_in_the_run_folder(
    source, model, tmp_path, monkeypatch, name, blocks
):
    seen = set()
    replace = type(tmp_path).replace

    def look(path, target):
        seen.update(p.name for p in tmp_path.iterdir())
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", look)
    run(source, tmp_path / name, model, **blocks)
    assert run_folder(tmp_path / name).name in seen
    assert not [one for one in seen if one.endswith(".tmp")]


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK], ids=["blocks", "block"])
def test_a_crash_before_the_file_has_its_name(
    source, model, tmp_path, monkeypatch, name, probabilities, blocks
):
    out, options = tmp_path / name, blocks | {"probabilities": probabilities}

    def write(_read, _spec, _out, before, _scratch):
        before({"sha256": "", "size": 0})
        raise Crash

    with monkeypatch.context() as patch:
        # The process is gone: what it would still tidy up stays.
        patch.setattr(output, "write_geotiff", write)
        patch.setattr(output, "write_png", write)
        patch.setattr(durable, "write_all", crash)
        patch.setattr(type(out), "unlink", lambda *_a, **_k: None)
        with pytest.raises(Crash):
            run(source, out, model, **options)
    assert not out.exists()
    in_a_group = name == "x.png" and blocks is ONE_BLOCK and not probabilities
    assert (tmp_path / f"{name}.tilenet.json").exists() != in_a_group
    assert (tmp_path / "x.prob.tif").exists() == probabilities
    run(source, out, model, **options)
    expected = run(source, tmp_path / f"expected.{name}", model, **options)
    assert np.array_equal(mask_of(out), mask_of(expected.output))


@pytest.mark.parametrize("keys", ["", "a", "z", "az", "chaz"])
def test_a_sidecar_holds_one_document_whose_keys_are_sorted(keys):
    document = {key: {"é": [1, None], "b": 0.1} for key in keys}
    data = encode_sidecar(document)
    half = b"{" + data.partition(b'",\n')[2]
    assert half == encode_document(json.loads(half))
    assert json.loads(half).keys() == document.keys() | {"check"}
    assert decode_sidecar(data) == document


def test_files_that_are_not_all_on_disk_get_no_name(tmp_path, monkeypatch):
    files = [(tmp_path / f"{k:03}", bytes([k])) for k in range(100)]
    synced, sync = [], os.fsync

    def fail(fd):
        synced.append(fd)
        if len(synced) == 70:
            raise OSError(errno.EIO, "the disk reports an error")
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk"):
            durable.write_all(files)
    assert not list(tmp_path.iterdir())
    durable.write_all(files)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: data for path, data in files
    }


def test_a_copy_that_is_not_on_disk_gets_no_name(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def fail(_fd):
        raise OSError(errno.EIO, "the disk reports an error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk"):
            durable.copy(source, target)
    assert target.read_bytes() == b"old"
    durable.copy(source, target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "source": b"new", "copy": b"new",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x" * 254, "ä" * 127])
def test_a_temporary_name_is_no_longer_than_a_name_may_be(tmp_path, name):
    durable.write(tmp_path / name, b"1")
    assert (tmp_path / name).read_bytes() == b"1"
    durable.write_all([(tmp_path / name, b"2"), (tmp_path / f"{name}y", b"3")])
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {name: b"2", f"{name}y": b"3"}


def test_a_document_whose_mask_is_gone_is_in_nobodys_way(source, model, tmp_path):
    run(source, tmp_path / "x.tif", model)
    (tmp_path / "x.tif").unlink()
    assert run(source, tmp_path / "x.tif", model).blocks_resumed == 0


@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK], ids=["blocks", "block"])
def test_an_overwrite_that_fails_keeps_the_old_mask(source, model, tmp_path, monkeypatch, blocks):
    out = tmp_path / "x.tif"
    run(source, out, model, **blocks, probabilities=True)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("x.*")}
    assert len(before) == 4

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "write_geotiff", full)
    with pytest.raises(ResourceError, match="disk is full"):
        run(source, out, model, **blocks, blend="hann", overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("x.*")} == before


@pytest.mark.parametrize("name", ["x.tif", "x.zarr"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwritten"])
def test_a_failure_once_the_mask_has_its_name_keeps_it(
    source, model, tmp_path, monkeypatch, name, old
):
    out, options = tmp_path / name, {"probabilities": True, "blend": "hann"}
    if old:
        run(source, out, model)

    def fail(folder):
        if folder == tmp_path and out.exists():
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_directory", fail)
        with pytest.raises(ResourceError, match=r"disk reports an error|Input/output error"):
            run(source, out, model, **options, overwrite=old)
    again = run(source, out, model, **options)
    assert again.tiles_forwarded == 0
    fresh = run(source, tmp_path / f"fresh-{name}", model, **options)
    assert again.classes == fresh.classes


def test_overwriting_takes_the_old_probabilities_away(source, model, tmp_path):
    run(source, tmp_path / "x.tif", model, probabilities=True)
    run(source, tmp_path / "x.tif", model, overwrite=True)
    assert not (tmp_path / "x.prob.tif").exists()


# -- what is not ours


@pytest.mark.parametrize("name", ["x.tif.tilenet.json", "x.tif.aux.xml", "x.prob.tif"])
@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK], ids=["blocks", "block"])
def test_foreign_files_beside_the_mask(source, model, tmp_path, name, blocks):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match=name):
        run(source, tmp_path / "x.tif", model, **blocks, probabilities=True)
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK], ids=["blocks", "block"])
@pytest.mark.parametrize("name", ["x.tif", "x.ome.tif", "x.png"])
def test_overviews_and_masks_of_others(source, model, tmp_path, name, blocks):
    """GDAL would show them as the new mask's own: refused before any work, and left there."""
    endings = ["ovr", "msk", "OVR"]
    for ending in endings:
        beside = tmp_path / f"{name}.{ending}"
        beside.write_bytes(b"theirs")
        with pytest.raises(OutputError, match=rf"not tilenet's; .*{ending}; move it away"):
            run(source, tmp_path / name, model, **blocks)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", beside.name]
        assert beside.read_bytes() == b"theirs"
        beside.unlink()
    run(source, tmp_path / name, model, **blocks)


@pytest.mark.parametrize("name", ["x.tif.ovr", "x.prob.tif.msk"])
def test_overviews_that_were_made_of_the_old_mask(source, model, tmp_path, name):
    out, options = tmp_path / "x.tif", {"probabilities": True}
    first = run(source, out, model, **options)
    whole = out.read_bytes()
    (tmp_path / name).write_bytes(b"theirs")
    assert run(source, out, model, **options).plan_hash == first.plan_hash  # it is there: no work
    with pytest.raises(OutputError, match=name):
        run(source, out, model, **options, overwrite=True)
    (tmp_path / f"y{name[1:]}").write_bytes(b"theirs")
    with pytest.raises(OutputError, match=f"y{name[1:]}"):
        mask_api.export(out, tmp_path / "y.tif")
    out.write_bytes(whole[:-1])
    with pytest.raises(OutputError, match=name):
        mask_api.verify(out, repair=True)
    assert out.read_bytes() == whole[:-1]
    assert not list(tmp_path.glob(".x*"))
    (tmp_path / name).unlink()
    assert mask_api.verify(out, repair=True).ok
    assert out.read_bytes() == whole


@pytest.mark.parametrize("blocks", [BLOCKS, ONE_BLOCK], ids=["blocks", "block"])
def test_a_busy_output(source, model, tmp_path, blocks):
    out = tmp_path / "x.zarr"
    run_folder(out).mkdir()
    with locked(run_folder(out)), pytest.raises(OutputError, match="another run is writing"):
        run(source, out, model, **blocks)
    assert run_folder(out).exists()


def test_one_block_does_not_drop_another_plan(source, model, tmp_path, monkeypatch):
    out = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(large, "_finish", crash)
        with pytest.raises(Crash):
            run(source, out, model)
    with pytest.raises(OutputError, match="differs in blend"):
        run(source, out, model, block=256, blend="hann")
    assert run(source, out, model).blocks_resumed == 12


@pytest.mark.parametrize("name", ["a.png/x.zarr", "none/x/../../a.png/x.tif"])
def test_a_path_that_cannot_be(source, model, tmp_path, cli, name):
    write_image(tmp_path / "a.png", picture(20, 20))
    done = cli("predict", source, "--out", tmp_path / name, "--model", model)
    assert done.code == 5
    assert done.err.count("tilenet: error: ") == 1


# -- folders


@pytest.fixture
def folder(tmp_path):
    for k in range(3):
        write_image(tmp_path / "in" / f"{k}.png", picture(40, 50, seed=k))
    return tmp_path / "in"


def line(folder, out, model):
    return ["predict", folder, "--out", out, "--model", model, "--tile", "64", "--overlap", "16"]


@pytest.mark.parametrize(("out", "kind"), [("masks", "png"), ("masks", "cog"), (".", "cog")])
def test_masks_are_no_inputs(cli, folder, model, out, kind):
    arguments = [*line(folder, folder / out, model), "--format", kind, "--json", "--probabilities"]
    first, second = (json.loads(cli(*arguments).out) for _ in range(2))
    assert len(first["runs"]) == len(second["runs"]) == 3
    assert second["failed"] == []
    assert [r["blocks_resumed"] for r in second["runs"]] == [1, 1, 1]
    assert all(r["seconds"] > 0 for r in first["runs"])
    assert all(r["mpixels_per_second"] == 0 for r in second["runs"])
    assert first["forward_seconds"] <= first["seconds"]


def test_one_of_several_is_missing(cli, folder, model, tmp_path):
    several = [folder / "0.png", folder / "none.png"]
    done = cli("predict", *several, *line(folder, tmp_path / "out", model)[2:], "--json")
    assert done.code == 7
    found = json.loads(done.out)
    assert [r["code"] for r in found["failed"]] == [3]
    dry = cli("predict", *several, *line(folder, tmp_path / "o", model)[2:], "--json", "--dry-run")
    assert dry.code == 7
    good, bad = json.loads(dry.out)["estimate"]
    assert good["pixels"] == 2000
    assert bad["error"]["code"] == 3


def test_a_name_that_is_not_utf8(cli, folder, model, tmp_path):
    (folder / "1.png").rename(folder / os.fsdecode(b"b\xff.png"))
    done = cli(*line(folder, tmp_path / "out", model), "--json")
    assert done.code == 7
    found = json.loads(done.out)
    assert len(found["runs"]) == 2
    assert "UTF-8" in found["failed"][0]["error"]


# -- workers


def test_a_worker_s_error_is_one_line(command, source, model, tmp_path):
    source.write_bytes(source.read_bytes()[:-40_000])
    options = [f"--{k}={v}" for k, v in BLOCKS.items()]
    done = command(
        "predict", source, "--out", tmp_path / "x.zarr", "--model", model, *options,
        "--scheduler", "processes:2",
    )  # fmt: skip
    assert done.code == 3
    assert [row for row in done.err.splitlines() if "rror" in row] == [done.err.splitlines()[-1]]


@pytest.mark.long
def test_ctrl_c_for_the_whole_group(source, model, tmp_path, environment):
    big = write_tif(tmp_path / "big.tif", picture(1500, 1500))
    arguments = [
        sys.executable, "-m", "tilenet", "predict", str(big), "--out", str(tmp_path / "x.zarr"),
        "--model", str(model), *(f"--{k}={v}" for k, v in BLOCKS.items()),
        "--scheduler", "processes:2",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = run_folder(tmp_path / "x.zarr") / "journal.jsonl"
    for _ in range(6000):
        if journal.exists() and journal.stat().st_size:
            break
        signal.sigtimedwait([], 0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("tilenet: error: interrupted")
    assert run(big, tmp_path / "x.zarr", model).blocks_resumed > 0


def test_a_signal_where_python_drops_errors():
    program = (
        "import signal, sys, time\n"
        "from tilenet.errors import InterruptError\n"
        "from tilenet.stops import stopping_on_signals\n"
        "class Future:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        raise AssertionError('the handler did not raise')\n"
        "try:\n"
        "    with stopping_on_signals():\n"
        "        Future()\n"
        "        time.sleep(20)\n"
        "except InterruptError as error:\n"
        "    sys.exit(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (143, "")


def test_one_that_is_repeated_while_python_still_drops_errors(monkeypatch):
    sent = []

    def again(number):  # at once: the hook has not returned
        sent.append(number)
        if len(sent) == 1:
            signal.raise_signal(number)

    monkeypatch.setattr(stops, "_send_later", again)
    with stops.stopping_on_signals():
        stops._send_again(SimpleNamespace(exc_value=InterruptError("", "", "", code=143)))
    assert sent == [signal.SIGTERM] * 2


SLOW = """
import time
from tilenet.engine.block import BlockJob
add = BlockJob.add
def slowly(self, *arguments):
    time.sleep(0.5)
    add(self, *arguments)
BlockJob.add = slowly
"""


@pytest.mark.alone
@pytest.mark.parametrize("blocks", [9, 289])  # on threads, and on a cluster within the process
def test_a_stop_does_not_wait_for_whole_blocks(model, tmp_path, environment, blocks):
    side = {9: 1500, 289: 1088}[blocks]
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    big = write_tif(tmp_path / "big.tif", picture(side, side))
    block = {9: 512, 289: 64}[blocks]
    line = [
        sys.executable, "-m", "tilenet", "predict", str(big), "--out", str(tmp_path / "x.zarr"),
        "--model", str(model), "--tile=32", "--overlap=16", f"--block={block}", "--chunk=64",
    ]  # fmt: skip
    paths = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        line, env=environment | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    strips = run_folder(tmp_path / "x.zarr") / "strips"
    until = time.monotonic() + 60
    while not strips.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2)
    start = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("tilenet: error: interrupted")
    assert time.monotonic() - start < 8  # a block of 512 has 1,024 tiles of half a second


HALF_MADE = """
import asyncio, signal

class Half(asyncio.SelectorEventLoop):
    def _make_self_pipe(self):
        self.itself = self  # so that it is freed late
        signal.raise_signal(signal.SIGINT)

asyncio.new_event_loop = Half
"""


def test_a_signal_while_an_event_loop_is_made(source, model, tmp_path, environment):
    """zarr makes one: the half of it, and the coroutine that waits for it, must not complain."""
    (tmp_path / "sitecustomize.py").write_text(HALF_MADE)
    paths = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    arguments = [
        sys.executable, "-m", "tilenet", "predict", str(source), "--out", str(tmp_path / "x.zarr"),
        "--model", str(model), *(f"--{k}={v}" for k, v in BLOCKS.items()),
    ]  # fmt: skip
    done = subprocess.run(
        arguments, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith("tilenet: error: interrupted")


def test_a_signal_that_a_library_takes_for_its_own_error():
    def build():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ValueError("not built") from error

    with pytest.raises(InterruptError) as caught, stopping_on_signals():
        build()
    assert caught.value.code == 143


def test_scores_that_are_no_numbers_are_told_of_small_ones_too(tmp_path, caplog):
    """The broken network divides 0 by 0 where the first band is 0."""
    network = networks.broken(tmp_path / "broken.onnx")
    for name, zeros in (("a", 0), ("b", 5), ("c", 6)):
        values = picture(60, 70, seed=ord(name)) | 1
        values[0].flat[:zeros] = 0
        write_image(tmp_path / "in" / f"{name}.png", values)
    config = PredictConfig(model=str(network), **ONE_BLOCK)
    with caplog.at_level("WARNING", "tilenet"):
        found = predict([tmp_path / "in"], tmp_path / "out", config)
        assert "22 scores were not finite" in caplog.text  # of two classes each
        assert [one.nonfinite_scores for one in found.runs] == [0, 10, 12]
        caplog.clear()
        [one] = predict([tmp_path / "in" / "b.png"], tmp_path / "one.png", config).runs
        assert "10 scores were not finite" in caplog.text
        assert one.nonfinite_scores == 10


# -- the command


def test_info_of_one_file_masks(cli, source, model, tmp_path):
    for name in ("x.tif", "x.png"):
        result = run(source, tmp_path / name, model)
        found = json.loads(cli("info", tmp_path / name, "--json").out)
        assert (found["kind"], found["complete"]) == ("mask", True)
        assert {int(k): v for k, v in found["pixels"].items() if k != "255"} == pixels(result)
        assert found["classes"]["1"] == "class 1"


def test_a_png_too_large_for_memory(cli, model, tmp_path):
    path = tmp_path / "large.tif"
    profile = {"driver": "GTiff", "width": 9000, "height": 9000, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, tiled=True, sparse_ok=True):
        pass
    done = cli("predict", path, "--out", tmp_path / "x.png", "--model", model)
    assert done.code == 2
    assert "PNG" in done.err


def test_no_arguments_show_the_help(capsys):
    assert command_line([]) == 0
    assert "Usage" in capsys.readouterr().out
