"""A mask written into an OME-Zarr image as its label: what readers find, what a crash leaves."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models import open_ome_zarr
from rasters import picture, write_tif

from tilenet import mask_api
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.description import describe_store
from tilenet.engine import large, output
from tilenet.engine.runfolder import run_folder
from tilenet.errors import InputError, OutputError, UsageError
from tilenet.sinks import enlist, is_listed, label

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

SIZE = 150, 201
NAME = "tilenet-tiny"


class Crash(BaseException):
    """Stands for the end of the process."""


def make_image(root, zarr_format, *, levels=3, consolidated=False, labels=None, axes="cyx"):
    """Write an image of several levels, with labels of somebody else's."""
    group = zarr.create_group(root, zarr_format=zarr_format)
    extra = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if zarr_format == 2 else {}
    datasets = []
    for level in range(levels):
        shape = (1,) * (len(axes) - 2) + tuple(-(-side // 2**level) for side in SIZE)
        names = {"dimension_names": list(axes)} if zarr_format == 3 else {}
        group.create_array(str(level), shape=shape, dtype="uint8", chunks=shape, **extra, **names)
        lead = [1.0] * (len(axes) - 2)
        scale = [*lead, 0.25 * 2**level, 0.5 * 2**level]
        datasets.append({
            "path": str(level),
            "coordinateTransformations": [{"type": "scale", "scale": scale}],
        })  # fmt: skip
    kinds = {"c": "channel", "z": "space", "y": "space", "x": "space", "t": "time"}
    described = [
        {"name": n, "type": kinds[n]} | ({"unit": "micrometer"} if n in "yx" else {}) for n in axes
    ]
    scale = [{"type": "scale", "scale": [1.0] * (len(axes) - 2) + [2.0, 2.0]}]
    multiscale = {
        "name": "theirs", "axes": described, "datasets": datasets,
        "coordinateTransformations": scale,
    }  # fmt: skip
    if zarr_format == 2:
        group.attrs.update({"multiscales": [multiscale | {"version": "0.4"}], "mine": 1})
    else:
        group.attrs.update({"ome": {"version": "0.5", "multiscales": [multiscale]}, "mine": 1})
    if labels is not None:
        listed = {"labels": labels}
        inner = group.create_group("labels")
        whole = {"version": "0.5", **listed, "theirs": 7}
        inner.attrs.update({**listed, "note": 5} if zarr_format == 2 else {"ome": whole, "note": 5})
        for name in labels:
            shutil.copytree(root, root / "labels" / name, ignore=lambda *_: ["labels"])
    if consolidated:
        zarr.consolidate_metadata(root, zarr_format=zarr_format)
    return root


@pytest.fixture
def source(tmp_path):
    return write_tif(tmp_path / "a.tif", picture(*SIZE))


def run(source, models, into, **options):
    defaults = {"tile": 64, "overlap": 16, "chunk": 64, "block": 64, "precision": "fp32"}
    config = PredictConfig(model=str(models / "conv.onnx"), into=into, **defaults | options)
    [result] = predict([source], None, config).runs
    return result


def listed(image, zarr_format):
    attributes = zarr.open_group(
        image / "labels", mode="r", zarr_format=zarr_format, use_consolidated=False
    ).attrs.asdict()
    return attributes if zarr_format == 2 else attributes["ome"]


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("axes", "zarr_format", "block"), [
    ("yx", 2, 64), ("tczyx", 2, 256), ("yx", 3, 256), ("tczyx", 3, 64),
])  # fmt: skip
def test_every_reader_finds_the_label(models, source, tmp_path, zarr_format, block, axes):
    image = make_image(tmp_path / "i.ome.zarr", zarr_format, axes=axes)
    before = files(image)
    result = run(source, models, image, block=block)
    out = image / "labels" / NAME
    assert result.output == str(out)
    assert {k: v for k, v in files(image).items() if k.parts[0] != "labels"} == before
    alone = PredictConfig(
        model=str(models / "conv.onnx"), tile=64, overlap=16, chunk=64, precision="fp32"
    )
    predict([source], tmp_path / "x.zarr", alone)
    mask = zarr.open_group(tmp_path / "x.zarr", mode="r", use_consolidated=False)
    label = zarr.open_group(out, mode="r", use_consolidated=False)
    for path in ("mask", "ovr_2x", "ovr_4x"):
        wanted = mask[path if path == "mask" else f"{path}/mask"]
        assert np.array_equal(label[path][...], wanted[...])

    model = open_ome_zarr(zarr.open_group(image, mode="r", use_consolidated=False))
    of_labels = model.labels.attributes if zarr_format == 2 else model.labels.attributes.ome
    assert of_labels.labels == [NAME]
    nodes = list(Reader(parse_url(image))())
    found = [node for node in nodes if "color" in node.metadata]
    assert [tuple(level.shape) for level in found[0].data] == [(150, 201), (75, 101), (38, 51)]
    assert found[0].metadata["color"][1]
    attributes = label.attrs.asdict() if zarr_format == 2 else label.attrs["ome"]
    assert attributes["image-label"]["source"] == {"image": "../../"}
    [multiscale] = attributes["multiscales"]
    assert [axis["unit"] for axis in multiscale["axes"]] == ["micrometer", "micrometer"]
    first, second, _ = (one["coordinateTransformations"] for one in multiscale["datasets"])
    assert first[0]["scale"] == [0.5, 1.0]
    assert second[1]["translation"] == [0.25, 0.5]
    assert mask_api.verify(out).ok
    assert not [p for p in image.rglob(".*") if not p.name.startswith(".z")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "i.ome.zarr", "x.zarr"]


@pytest.mark.parametrize("levels", [1, 11])
def test_a_label_has_the_levels_of_its_image(models, source, tmp_path, levels):
    image = make_image(tmp_path / "i.zarr", 3, levels=levels)
    run(source, models, image)
    ome = zarr.open_group(image / "labels" / NAME, mode="r").attrs["ome"]
    assert len(ome["multiscales"][0]["datasets"]) == levels
    assert mask_api.verify(image / "labels" / NAME).ok


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_labels_of_others_stay(models, source, tmp_path, zarr_format):
    image = make_image(tmp_path / "i.zarr", zarr_format, labels=["b", "a"])
    theirs = files(image / "labels" / "a")
    run(source, models, image)
    found = listed(image, zarr_format)
    assert found["labels"] == ["b", "a", NAME]
    group = zarr.open_group(image / "labels", mode="r", use_consolidated=False)
    assert group.attrs["note"] == 5
    assert zarr_format == 2 or found["theirs"] == 7
    assert files(image / "labels" / "a") == theirs
    before = files(image)
    assert run(source, models, image).blocks_resumed
    run(source, models, image, overwrite=True)
    assert files(image) == before


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize(("zarr_format", "labels"), [(2, None), (3, None), (3, ["a"])])
def test_consolidated_metadata_knows_the_label(models, source, tmp_path, zarr_format, labels):
    image = make_image(tmp_path / "i.zarr", zarr_format, labels=labels, consolidated=True)
    for _ in range(2):
        run(source, models, image, overwrite=True)
        group = zarr.open_consolidated(image, zarr_format=zarr_format)
        assert (
            group["labels"].attrs
            == zarr.open_group(image / "labels", mode="r", use_consolidated=False).attrs
        )
        found = dict(group[f"labels/{NAME}"].members(max_depth=None))
        plain = zarr.open_group(image / "labels" / NAME, mode="r", use_consolidated=False)
        assert found.keys() == dict(plain.members(max_depth=None)).keys()
        assert np.array_equal(found["mask"][...], plain["mask"][...])
    kept = files(image)
    zarr.consolidate_metadata(image, zarr_format=zarr_format)
    name = ".zmetadata" if zarr_format == 2 else "zarr.json"

    def entries(text):
        found = json.loads(text)
        found = found if zarr_format == 2 else found["consolidated_metadata"]
        return found["metadata"]

    def plain_entries(text):
        return {
            k: {a: b for a, b in v.items() if a != "consolidated_metadata"}
            for k, v in entries(text).items()
        }

    assert plain_entries(kept[next(k for k in kept if str(k) == name)]) == plain_entries(
        (image / name).read_bytes()
    )


@pytest.mark.parametrize("block", [64, 256])
def test_a_crash_before_the_label_is_listed(models, source, tmp_path, monkeypatch, block):
    image = make_image(tmp_path / "i.zarr", 3, labels=["a"])
    out = image / "labels" / NAME

    def crash(*_arguments):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(output, "enlist", crash)
        patch.setattr(large, "remove_run_folder", crash)
        with pytest.raises(Crash):
            run(source, models, image, block=block)
    assert out.exists()
    assert not is_listed(out)
    assert run(source, models, image, block=block).blocks_resumed
    assert listed(image, 3)["labels"] == ["a", NAME]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "i.zarr"]
    assert sorted(p.name for p in (image / "labels").iterdir()) == ["a", NAME, "zarr.json"]


def test_a_crash_inside_a_run_resumes(models, source, tmp_path, monkeypatch):
    image = make_image(tmp_path / "i.zarr", 2)
    out, before = image / "labels" / NAME, files(image)

    def crash(*_arguments, **_options):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(large, "_finish", crash)
        with pytest.raises(Crash):
            run(source, models, image)
    assert files(image) == before
    assert run_folder(out) == tmp_path / f".i.zarr.{NAME}.tilenet"
    assert run_folder(out).exists()
    assert run(source, models, image).blocks_resumed
    assert not run_folder(out).exists()


def test_an_image_of_a_collection(models, source, tmp_path):
    whole = tmp_path / "whole.zarr"
    zarr.create_group(whole, zarr_format=2, attributes={"bioformats2raw.layout": 3})
    image = make_image(whole / "0", 2)
    with pytest.raises(InputError, match="IMAGE/0"):
        run(source, models, whole)
    run(source, models, image)
    assert run_folder(image / "labels" / NAME).parent == tmp_path
    assert sorted(p.name for p in whole.iterdir()) == [".zattrs", ".zgroup", "0"]


def test_who_opens_a_label(models, source, tmp_path):
    out = make_image(tmp_path / "i.zarr", 3) / "labels" / NAME
    run(source, models, tmp_path / "i.zarr")
    found = describe_store(out)
    assert "ome-zarr" in found["opens_in"]
    assert "xarray" in found["does_not_open_in"]
    with pytest.raises(ValueError, match="conflicting sizes"):
        xr.open_zarr(out, consolidated=False)


def test_a_damaged_label_is_repaired(models, source, tmp_path):
    image = make_image(tmp_path / "i.zarr", 3)
    run(source, models, image)
    out = image / "labels" / NAME
    before = files(image)
    (out / "mask/c/0/1").write_bytes(b"rot")
    (out / "zarr.json").write_bytes(b"{}")
    (out / "notes.txt").write_text("mine")
    assert {bad.file for bad in mask_api.verify(out).bad} == {
        "mask/c/0/1", "zarr.json", "notes.txt",
    }  # fmt: skip
    assert mask_api.verify(out, repair=True).ok
    assert files(image) == before
    assert (tmp_path / f"i.zarr.{NAME}.foreign/notes.txt").read_text() == "mine"


def test_a_label_is_exported_as_a_mask_of_its_own(models, source, tmp_path):
    image = make_image(tmp_path / "i.zarr", 3, levels=2)
    run(source, models, image)
    out = mask_api.export(image / "labels" / NAME, tmp_path / "x.zarr")
    assert mask_api.verify(out).ok
    ome = zarr.open_group(out, mode="r").attrs["ome"]
    assert "source" not in ome["image-label"]
    assert len(ome["multiscales"][0]["datasets"]) == 3


def test_what_is_refused(cli, models, source, tmp_path):
    image = make_image(tmp_path / "i.zarr", 3)
    with pytest.raises(InputError, match="150 × 201 pixels, the mask would have 60 × 70"):
        run(write_tif(tmp_path / "b.tif", picture(60, 70)), models, image)
    with pytest.raises(InputError, match="no OME-Zarr image"):
        run(source, models, tmp_path / "missing.zarr")
    with pytest.raises(UsageError, match="Zarr format 3"):
        run(source, models, image, zarr_format="2")
    assert not (image / "labels").exists()
    model = ["--model", models / "conv.onnx"]
    done = cli("predict", source, "--into", image, "--out", tmp_path / "x.zarr", *model)
    assert done.code == 2
    assert "--out, --into" in done.err
    assert cli("predict", source, *model).code == 2
    assert cli("predict", source, "--into", image, "--format", "cog", *model).code == 2
    assert cli("predict", source, source, "--into", image, *model).code == 2
    dry = cli("predict", source, "--into", image, "--dry-run", "--json", *model)
    assert json.loads(dry.out)["estimate"]["levels"] == 3
    (image / "labels" / NAME).mkdir(parents=True)
    with pytest.raises(OutputError, match="not tilenet's"):
        run(source, models, image, overwrite=True)


@pytest.mark.parametrize(("text", "match"), [
    ('{"zarr_format": 3, "node_type": "group", "attributes": {}}', "no OME-Zarr image"),
    ('{"attributes": {"ome": {"version": "0.6", "multiscales": [{}]}}}', "0.6 is not known"),
    ('{"attributes": {"ome": {"version": "0.5", "multiscales": [{"axes": []}]}}}', "correct it"),
    ('{"attributes": {"ome": []}}', "no OME-Zarr image"),
    ("[]", "no OME-Zarr image"),
    ("[" * 100_000, "no OME-Zarr image"),
])  # fmt: skip
def test_metadata_that_cannot_be_right(models, source, tmp_path, text, match):
    (tmp_path / "i.zarr").mkdir()
    (tmp_path / "i.zarr/zarr.json").write_text(text)
    with pytest.raises(InputError, match=match):
        run(source, models, tmp_path / "i.zarr")


def test_a_list_that_does_not_read_is_left_alone(models, source, tmp_path):
    image = make_image(tmp_path / "i.zarr", 3, labels=["a"])
    (image / "labels/zarr.json").write_text('{"attributes": {"ome": {"labels": 5}}}')
    with pytest.raises(InputError, match="cannot be right"):
        run(source, models, image)
    assert (image / "labels/zarr.json").read_text() == '{"attributes": {"ome": {"labels": 5}}}'
    (image / "labels" / NAME).mkdir()
    (image / "labels" / NAME / "zarr.json").write_text("{}")
    with pytest.raises(OutputError, match="does not read"):
        enlist(image / "labels" / NAME, tmp_path)


def test_a_crash_before_the_outer_groups_know_the_label(models, source, tmp_path, monkeypatch):
    """Readers that believe the image's consolidated metadata see it after the next run."""
    image = make_image(tmp_path / "i.zarr", 2, consolidated=True)
    consolidate = label._consolidate

    def some(group, *arguments):
        if group == image:
            raise Crash
        consolidate(group, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(label, "_consolidate", some)
        patch.setattr(large, "remove_run_folder", lambda _: None)
        with pytest.raises(Crash):
            run(source, models, image)
    assert is_listed(image / "labels" / NAME)
    run(source, models, image)
    group = zarr.open_consolidated(image, zarr_format=2)
    assert f"labels/{NAME}/mask" in dict(group.members(max_depth=None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "i.zarr"]
