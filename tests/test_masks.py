"""Finished masks: verified, repaired, exported."""

import errno
import json
import random
import shutil

import numpy as np
import pytest
import rasterio
import zarr
from rasters import picture, write_tif

from tilenet import mask_api
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import output
from tilenet.engine.document import encode_sidecar, read_sidecar, sidecar
from tilenet.engine.runfolder import run_folder
from tilenet.errors import InputError, OutputError, UsageError, VerifyError

SMALL = {"tile": 64, "overlap": 16, "chunk": 64, "precision": "fp32"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def make(folder, models, name, *, georeferenced=True, **options):
    source = folder / "a.tif"
    if not source.exists():
        write_tif(source, picture(300, 280), georeferenced=georeferenced)
    config = PredictConfig(model=str(models / "conv.onnx"), **SMALL | options)
    predict([source], folder / name, config)
    return folder / name


@pytest.fixture(scope="module")
def masks(models, tmp_path_factory):
    """Return the folder of finished masks: blocks and a pack, stores of both formats and files."""
    folder = tmp_path_factory.mktemp("masks")
    make(folder, models, "blocks.zarr", block=128, probabilities=True)
    make(folder, models, "v2.zarr", block=128, zarr_format="2")
    make(folder, models, "pack.zarr", block=512)
    make(folder, models, "blocks.tif", block=128, probabilities=True)
    make(folder, models, "blocks.ome.tif", block=128, probabilities=True)
    make(folder, models, "pack.png", block=512)
    return folder


@pytest.fixture
def mask(masks, tmp_path, request):
    """Return a copy of one mask; its source and model stay where they are."""
    name = request.param
    for path in masks.glob(f"{name.partition('.')[0]}.*"):
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, tmp_path / path.name)
    return tmp_path / name


def contents(mask):
    files = [p for p in mask.parent.rglob("*") if p.is_file() and "foreign" not in str(p)]
    return {str(p.relative_to(mask.parent)): p.read_bytes() for p in files}


def parts(mask):
    """Return the files that hold the mask."""
    if mask.is_dir():
        return sorted(p for p in mask.rglob("*") if p.is_file())
    return [p for p in (mask, mask.with_name(f"{mask.stem}.prob.tif")) if p.exists()]


ALL = ["blocks.zarr", "v2.zarr", "pack.zarr", "blocks.tif", "blocks.ome.tif", "pack.png"]


@pytest.mark.parametrize("mask", ALL, indirect=True)
def test_a_finished_mask_is_whole(cli, mask):
    done = cli("verify", mask, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["ok"]
    assert found["bad"] == []
    assert found["blocks"] == (1 if mask.stem == "pack" else 9)


@pytest.mark.parametrize("mask", ALL, indirect=True)
def test_every_bit_counts_and_comes_back(mask):
    good, rng = contents(mask), random.Random(mask.name)
    for part in rng.sample(parts(mask), min(8, len(parts(mask)))):
        data = bytearray(part.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        part.write_bytes(data)
        found = mask_api.verify(mask)
        assert not found.ok
        assert part.name in {bad.file.rpartition("/")[2] for bad in found.bad}
        mended = mask_api.verify(mask, repair=True)
        assert mended.ok
        assert mended.repaired == found.bad
        assert contents(mask) == good


@pytest.mark.parametrize("mask", ["blocks.zarr", "v2.zarr"], indirect=True)
def test_the_block_is_named(cli, mask):
    with zarr.open_group(mask, mode="r", use_consolidated=False).store:
        pass
    chunk = mask / ("mask/4/3" if mask.stem == "v2" else "mask/c/4/3")
    chunk.unlink()
    done = cli("verify", mask, "--json")
    assert done.code == 8
    assert done.err.count("tilenet: error: ") == 1
    [bad] = json.loads(done.out)["bad"]
    assert bad == {"file": chunk.relative_to(mask).as_posix(), "what": "missing", "block": 7}


@pytest.mark.parametrize("mask", ["blocks.zarr", "v2.zarr"], indirect=True)
def test_a_level_that_no_block_makes_alone_is_named(cli, mask):
    chunks = (path for path in (mask / "ovr_4x/mask").rglob("*") if path.name.isdigit())
    path = next(path for path in chunks if path.is_file())
    path.unlink()
    chunk = path.relative_to(mask).as_posix()
    done = cli("verify", mask, "--json")
    assert json.loads(done.out)["bad"] == [{"file": chunk, "what": "missing", "block": None}]
    assert f"{chunk} (level ovr_4x): missing" in done.err
    mended = cli("verify", mask, "--repair", "--json")
    assert mended.code == 0, mended.err
    assert json.loads(mended.out)["repaired"][0]["block"] is None


@pytest.mark.parametrize("mask", ["blocks.zarr"], indirect=True)
def test_swapped_doubled_and_foreign_files(mask):
    good = contents(mask)
    one, two = mask / "mask/c/0/0", mask / "mask/c/2/1"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    (mask / "mask/c/1/1").write_bytes(first)
    (mask / "mask/c/9").mkdir()
    (mask / "mask/c/9/9").write_bytes(first)
    (mask / "notes.txt").write_text("mine")
    (mask / "ovr_2x/link").symlink_to(mask / "mask")
    found = mask_api.verify(mask)
    assert {(bad.file, bad.what, bad.block) for bad in found.bad} == {
        ("mask/c/0/0", "damaged", 0), ("mask/c/2/1", "damaged", 3), ("mask/c/1/1", "damaged", 0),
        ("mask/c/9/9", "foreign", None), ("notes.txt", "foreign", None),
        ("ovr_2x/link", "foreign", None),
    }  # fmt: skip
    assert mask_api.verify(mask, repair=True).ok
    assert contents(mask) == good
    assert (mask.with_name("blocks.zarr.foreign") / "notes.txt").read_text() == "mine"
    (mask / "notes.txt").write_text("once more")
    assert mask_api.verify(mask, repair=True).ok
    assert (mask.with_name("blocks.zarr.foreign") / "notes.txt").read_text() == "mine"
    assert (mask.with_name("blocks.zarr.foreign-2") / "notes.txt").read_text() == "once more"


@pytest.mark.parametrize("change", [-5, 1])
@pytest.mark.parametrize("mask", ["blocks.tif", "blocks.ome.tif", "pack.png"], indirect=True)
def test_a_file_of_another_length_is_repaired(cli, mask, change):
    good = contents(mask)
    data = mask.read_bytes()
    mask.write_bytes(data[:change] if change < 0 else data + b"x")
    assert cli("verify", mask).code == 8
    assert cli("verify", mask, "--repair").code == 0
    assert contents(mask) == good
    assert not run_folder(mask).exists()


@pytest.mark.parametrize("mask", ["blocks.zarr", "blocks.tif"], indirect=True)
def test_many_losses_at_once(mask):
    good = contents(mask)
    if mask.is_dir():
        shutil.rmtree(mask / "mask")
        shutil.rmtree(mask / "ovr_2x")
        (mask / "tilenet/seal/c/0").unlink()
    else:
        mask.unlink()
    assert not mask_api.verify(mask).ok
    assert mask_api.verify(mask, repair=True).ok
    assert contents(mask) == good


@pytest.mark.parametrize("mask", ["blocks.tif"], indirect=True)
def test_the_class_names_beside_a_file(mask):
    good, table = contents(mask), mask.with_name("blocks.tif.aux.xml")
    table.write_bytes(table.read_bytes()[:-1])
    assert [bad.file for bad in mask_api.verify(mask).bad] == [table.name]
    assert mask_api.verify(mask, repair=True).ok
    assert contents(mask) == good


@pytest.mark.parametrize("mask", ["blocks.tif", "pack.png"], indirect=True)
@pytest.mark.parametrize("part", [slice(0, 1), slice(100, 400), slice(-500, None), slice(-1, None)])
def test_half_of_the_document_beside_a_file_is_enough(mask, part):
    good, document = contents(mask), mask.with_name(f"{mask.name}.tilenet.json")
    data = bytearray(document.read_bytes())
    data[part] = bytes(len(data[part]))
    document.write_bytes(data)
    assert [bad.file for bad in mask_api.verify(mask).bad] == [document.name]
    assert mask_api.verify(mask, repair=True).ok
    assert contents(mask) == good


@pytest.mark.parametrize("mask", ["blocks.tif"], indirect=True)
def test_without_its_document_a_file_cannot_be_compared(cli, mask):
    document = mask.with_name("blocks.tif.tilenet.json")
    data = document.read_bytes()
    document.write_bytes(data[:100] + bytes(len(data) - 200) + data[-100:])
    done = cli("verify", mask, "--repair", "--json")
    assert done.code == 8
    found = json.loads(done.out)
    assert not found["ok"]
    assert [bad["what"] for bad in found["bad"]] == ["damaged beyond repair"]
    assert "run predict" in found["error"]["do"]


@pytest.mark.parametrize("mask", ["blocks.zarr"], indirect=True)
def test_a_moved_source(mask, tmp_path, models):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    out = make(folder, models, "x.zarr", block=128)
    (folder / "a.tif").rename(tmp_path / "a.tif")
    (out / "mask/c/0/0").write_bytes(b"")
    with pytest.raises(InputError, match="--input"):
        mask_api.verify(out, repair=True)
    assert mask_api.verify(out, repair=True, source=tmp_path / "a.tif").ok


def test_a_changed_source_repairs_nothing(tmp_path, models):
    out = make(tmp_path, models, "x.zarr", block=128)
    write_tif(tmp_path / "a.tif", picture(300, 280, seed=9), georeferenced=True)
    (out / "mask/c/0/0").write_bytes(b"")
    with pytest.raises(InputError, match="differs in input"):
        mask_api.verify(out, repair=True)
    assert (out / "mask/c/0/0").read_bytes() == b""


def test_a_renamed_source_is_said_to_be(tmp_path, models):
    """A mask knows its raster by name and content: which of them differs, nobody can tell."""
    out = make(tmp_path, models, "x.zarr", block=128)
    (out / "mask/c/0/0").write_bytes(b"")
    renamed = (tmp_path / "a.tif").rename(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"changed or renamed since \(differs in input\).*name"):
        mask_api.verify(out, repair=True, source=renamed)
    (tmp_path / "moved").mkdir()
    moved = renamed.rename(tmp_path / "moved" / "a.tif")
    assert mask_api.verify(out, repair=True, source=moved).ok


def test_verify_refuses_what_is_no_mask(cli, tmp_path, masks):
    assert cli("verify", tmp_path / "missing.zarr").code == 3
    assert cli("verify", masks / "a.tif").code == 3
    assert cli("verify", tmp_path).code == 3


@pytest.mark.parametrize(("source", "out"), [
    ("blocks.zarr", "blocks.tif"), ("blocks.tif", "blocks.zarr"), ("pack.zarr", "pack.png"),
    ("blocks.tif", "blocks.ome.tif"), ("blocks.ome.tif", "blocks.zarr"),
])  # fmt: skip
def test_an_export_has_the_bytes_of_a_run(cli, masks, tmp_path, source, out):
    done = cli("export", masks / source, tmp_path / out)
    assert done.code == 0, done.err
    made, ran = contents(tmp_path / out), contents(masks / out)
    assert made
    assert made == {name: ran[name] for name in made}
    assert mask_api.verify(tmp_path / out).ok
    assert not list(tmp_path.glob(".*"))


def test_an_export_reads_back(masks, tmp_path):
    out = mask_api.export(masks / "v2.zarr", tmp_path / "x.tif")
    mask = zarr.open_group(masks / "v2.zarr", mode="r", use_consolidated=False)["mask"]
    with rasterio.open(out) as src:
        assert (src.read(1) == np.asarray(mask[...])).all()


def test_export_refuses(masks, tmp_path):
    (tmp_path / "theirs.tif").write_bytes(b"theirs")
    with pytest.raises(OutputError, match="not tilenet's"):
        mask_api.export(masks / "v2.zarr", tmp_path / "theirs.tif", overwrite=True)
    with pytest.raises(UsageError, match="end another"):
        mask_api.export(masks / "v2.zarr", tmp_path / "x.jpg")
    mask_api.export(masks / "v2.zarr", tmp_path / "x.tif")
    with pytest.raises(OutputError, match="exists"):
        mask_api.export(masks / "v2.zarr", tmp_path / "x.tif")
    assert mask_api.export(masks / "v2.zarr", tmp_path / "x.tif", overwrite=True)
    shutil.copytree(masks / "v2.zarr", tmp_path / "v2.zarr")
    (tmp_path / "v2.zarr/mask/0/0").write_bytes(b"")
    with pytest.raises(VerifyError, match="damaged"):
        mask_api.export(tmp_path / "v2.zarr", tmp_path / "y.tif")


def test_one_part_or_several(tmp_path):
    """What is wrong is told in the words of its number."""
    bad = mask_api.Bad("c/0/0", "damaged", 3), mask_api.Bad("c/0/1", "missing", 4)
    told = [mask_api.VerifyResult(False, "m", 9, 9, bad[:n]).failure().what for n in (1, 2)]
    assert told == [
        "1 part is not what was written: c/0/0 (block 3): damaged",
        "2 parts are not what was written, the first is c/0/0 (block 3): damaged",
    ]


@pytest.mark.parametrize("mask", ["blocks.tif"], indirect=True)
def test_a_file_that_would_get_other_pixels_is_left(cli, mask):
    """Blocks are compared with what the run left, as by another version or machine."""
    document = read_sidecar(mask)
    document["journal"][0]["sha256"] = "0" * 64
    sidecar(mask).write_bytes(encode_sidecar(document))
    mask.write_bytes(mask.read_bytes() + b"x")
    before = contents(mask)
    done = cli("verify", mask, "--repair")
    assert done.code == 8
    assert "what is made again differs from what the run wrote" in done.err
    assert contents(mask) == before
    assert not run_folder(mask).exists()


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("mask", ["blocks.tif", "blocks.ome.tif"], indirect=True)
def test_a_repair_that_fails_takes_nothing_away(cli, mask, monkeypatch, lost):
    good = contents(mask)
    data = mask.read_bytes()
    mask.unlink() if lost else mask.write_bytes(data[:-9])
    before = contents(mask) if not lost else None
    names = {path.name for path in mask.parent.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output, "_write", full)
        assert cli("verify", mask, "--repair").code == 6
    assert {path.name for path in mask.parent.iterdir()} == names
    assert lost or contents(mask) == before
    assert cli("verify", mask, "--repair").code == 0
    assert contents(mask) == good


def test_metadata_that_would_be_others_are_left(cli, masks, tmp_path, monkeypatch):
    """Another version writes another number: what it would write is not what the run wrote."""
    mask = shutil.copytree(masks / "blocks.zarr", tmp_path / "m.zarr")
    (mask / "zarr.json").write_text("rotten")
    before = contents(mask)
    with monkeypatch.context() as patch:
        patch.setattr("tilenet.sinks.metadata.__version__", "99")
        assert cli("verify", mask, "--repair").code == 8
    assert contents(mask) == before
    assert cli("verify", mask, "--repair").code == 0


def test_a_mask_by_any_name_is_read(cli, models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(50, 60))
    flags = ("--model", models / "identity.onnx", "--tile", "64", "--overlap", "0")
    done = cli("predict", source, "--out", tmp_path / "mask", "--format", "png", *flags)
    assert done.code == 0, done.err
    done = cli("export", tmp_path / "mask", tmp_path / "x.tif")
    assert done.code == 0, done.err
    for out, kind in (("x.tif", "zarr"), ("x.zarr", "cog"), ("x.png", "ome-tiff")):
        done = cli("predict", source, "--out", tmp_path / "new" / out, "--format", kind, *flags)
        assert (done.code, "the output's ending says" in done.err) == (2, True)
    assert not (tmp_path / "new").exists()
