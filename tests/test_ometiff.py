"""OME-TIFF masks: what tifffile, OpenSlide and GDAL find in them, and what happens without it."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
import zarr
from rasters import picture, write_tif

from tilenet import mask_api
from tilenet.analysis.evaluate import find_pairs
from tilenet.api import predict
from tilenet.classes import ClassInfo
from tilenet.config import PredictConfig
from tilenet.engine.plan import format_of
from tilenet.errors import OutputError, UsageError
from tilenet.geometry import Georeference
from tilenet.pyramid import halve
from tilenet.sinks import MaskSpec, write_ome_tiff
from tilenet.sinks import ometiff as sink

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

CLASSES = (ClassInfo(0, "back ground", (0, 0, 0)), ClassInfo(1, "Zellkern µ <1>", (0, 160, 9)))
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"


def make_spec(height, width, mpp=(0.5, 0.25)):
    place = Georeference(mpp=mpp)
    return MaskSpec(height, width, CLASSES, place, 768, zarr_format=2, title="nuclei & co")


def make_mask(height, width):
    rng = np.random.default_rng(7)
    mask = rng.integers(0, 2, (height, width), np.uint8)
    mask[rng.random((height, width)) < 0.2] = 255
    mask[: height // 3] = 1
    return mask


def write(path, mask, **changes):
    read = []

    def window(where):
        read.append(where)
        return mask[where.slices()]

    write_ome_tiff(window, make_spec(*mask.shape, **changes), path)
    assert sum(where.pixels for where in read) == mask.size
    return path


def pyramid(mask, levels):
    made = [mask]
    while len(made) < levels:
        made.append(halve(made[-1]))
    return made


@pytest.mark.parametrize("shape", [(2311, 3075), (1, 1), (512, 1025), (769, 3)])
def test_every_level_is_the_masks_own(tmp_path, shape):
    mask = make_mask(*shape)
    with tifffile.TiffFile(write(tmp_path / "x.ome.tif", mask)) as file:
        assert file.is_ome
        assert not file.is_bigtiff
        [series] = file.series
        levels = make_spec(*shape).levels
        assert [level.shape for level in series.levels] == [(h, w) for _, _, h, w in levels]
        for level, wanted in zip(series.levels, pyramid(mask, len(levels)), strict=True):
            assert level.keyframe.tile == (512, 512)
            assert level.keyframe.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert np.array_equal(level.asarray(), wanted)
        assert len(file.pages) == 1  # the others are SubIFDs


def test_what_the_xml_says(tmp_path):
    with tifffile.TiffFile(write(tmp_path / "x.ome.tif", make_mask(30, 40))) as file:
        text = file.ome_metadata
    assert text.isascii()
    root = ElementTree.fromstring(text)
    assert "UUID" not in root.attrib
    [pixels] = root.iter(f"{OME}Pixels")
    assert pixels.attrib == {
        "ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": "uint8", "SizeX": "40", "SizeY": "30",
        "SizeZ": "1", "SizeC": "1", "SizeT": "1", "PhysicalSizeX": "0.25", "PhysicalSizeY": "0.5",
        "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm",
    }  # fmt: skip
    found = {
        one.get("Namespace"): {m.get("K"): m.text for m in one.iter(f"{OME}M")}
        for one in root.iter(f"{OME}MapAnnotation")
    }
    assert found == {
        "tilenet/classes": {"0": "back ground", "1": "Zellkern µ <1>", "255": "no answer"},
        "tilenet/colors": {"0": "#000000", "1": "#00a009"},
    }


def test_openslide_opens_it(tmp_path):
    mask = make_mask(900, 700)
    with openslide.OpenSlide(write(tmp_path / "x.ome.tif", mask)) as slide:
        assert slide.dimensions == (700, 900)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        grey = np.asarray(slide.read_region((100, 500), 0, (300, 200)))
        assert np.array_equal(grey[..., 1], mask[500:700, 100:400])


def test_without_a_resolution_none_is_claimed(tmp_path):
    with tifffile.TiffFile(write(tmp_path / "x.ome.tif", make_mask(9, 9), mpp=None)) as file:
        assert "PhysicalSize" not in file.ome_metadata
        assert file.pages[0].tags["ResolutionUnit"].value == 1


def test_the_same_mask_is_the_same_file(tmp_path):
    mask = make_mask(700, 800)
    one, two = (write(tmp_path / name, mask) for name in ("a.ome.tif", "b.ome.tif"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ome.tif", "b.ome.tif"]


def test_large_files_are_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_CLASSIC_BYTES", 900 * 700)
    mask = make_mask(900, 700)
    with tifffile.TiffFile(write(tmp_path / "x.ome.tif", mask)) as file:
        assert file.is_bigtiff
        assert np.array_equal(file.series[0].levels[1].asarray(), halve(mask))


@pytest.mark.parametrize("part", range(3))
def test_a_file_that_rots_before_it_is_compared(tmp_path, monkeypatch, part):
    written = sink._write

    def rotten(made, tiles, spec):
        written(made, tiles, spec)
        data = bytearray(made.read_bytes())
        with tifffile.TiffFile(made) as file:
            page = file.series[0].levels[part].keyframe
            data[page.dataoffsets[-1] + page.databytecounts[-1] // 2] ^= 4
        made.write_bytes(data)

    monkeypatch.setattr(sink, "_write", rotten)
    with pytest.raises(OutputError, match="does not read back"):
        write(tmp_path / "x.ome.tif", make_mask(1800, 1600))
    assert not list(tmp_path.iterdir())


def test_predict_writes_the_pixels_of_the_store(cli, models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(900, 1000))
    options = ["--model", models / "conv.onnx", "--tile", 512, "--overlap", 128]
    done = cli("predict", source, "--out", tmp_path / "x.ome.tif", *options, "--json")
    assert done.code == 0, done.err
    assert cli("predict", source, "--out", tmp_path / "x.zarr", *options).code == 0
    store = zarr.open_group(tmp_path / "x.zarr", mode="r", use_consolidated=False)
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as file:
        one, two = file.series[0].levels
        assert np.array_equal(one.asarray(), store["mask"][...])
        assert np.array_equal(two.asarray(), store["ovr_2x/mask"][...])
    assert (tmp_path / "x.ome.tif.tilenet.json").exists()
    before = (tmp_path / "x.ome.tif").stat()
    again = cli("predict", source, "--out", tmp_path / "x.ome.tif", *options, "--json")
    assert json.loads(again.out)["blocks_resumed"] == 1
    assert (tmp_path / "x.ome.tif").stat().st_mtime_ns == before.st_mtime_ns
    assert mask_api.verify(tmp_path / "x.ome.tif").ok


def test_a_folder_of_them(models, tmp_path):
    for name in "ab":
        write_tif(tmp_path / f"in/{name}.tif", picture(70, 60))
    config = PredictConfig(model=str(models / "conv.onnx"), format="ome-tiff", tile=64, overlap=16)
    done = predict([tmp_path / "in"], tmp_path / "out", config)
    assert [run.output for run in done.runs] == [str(tmp_path / f"out/{k}.ome.tif") for k in "ab"]


def test_the_resolution_of_the_slide_is_kept(models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(60, 70))
    with rasterio.open(source, "r+") as dst:
        dst.update_tags(TIFFTAG_IMAGEDESCRIPTION="Aperio Image Library v1|AppMag = 20|MPP = 0.4990")
    config = PredictConfig(model=str(models / "conv.onnx"))
    predict([source], tmp_path / "x.ome.tif", config)
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as file:
        assert 'PhysicalSizeX="0.499"' in file.ome_metadata


def test_without_the_extra(cli, models, tmp_path, monkeypatch):
    source = write_tif(tmp_path / "a.tif", picture(60, 70))
    options = ["--model", models / "conv.onnx"]
    assert cli("predict", source, "--out", tmp_path / "x.tif", *options).code == 0
    monkeypatch.setitem(sys.modules, "tifffile", None)
    done = cli("predict", source, "--out", tmp_path / "x.ome.tif", *options)
    assert done.code == 2
    assert "pip install 'tilenet[slides]'" in done.err
    with pytest.raises(UsageError, match="slides"):
        mask_api.export(tmp_path / "x.tif", tmp_path / "x.ome.tif")
    assert not list(tmp_path.glob("*.ome.*"))


@pytest.mark.parametrize(("name", "format_"), [
    ("a.ome.tif", "ome-tiff"), ("a.OME.TIFF", "ome-tiff"), ("a.tif", "cog"), ("ome.tif", "cog"),
    ("a.ome.zarr", "zarr"), ("a.png", "png"), ("a.jpg", None), ("tif", None),
])  # fmt: skip
def test_the_longest_ending_counts(tmp_path, name, format_):
    assert format_of(tmp_path / name) == format_


def test_evaluate_pairs_it_with_the_truth(tmp_path):
    for path in (tmp_path / "pred/a.ome.tif", tmp_path / "truth/a.png"):
        path.parent.mkdir()
        path.touch()
    pair = ("a", tmp_path / "pred/a.ome.tif", tmp_path / "truth/a.png")
    assert find_pairs(tmp_path / "pred", tmp_path / "truth") == [pair]


def test_a_place_on_a_map_is_missed(cli, models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(100, 90), georeferenced=True)
    options = ["--model", models / "conv.onnx", "--tile", 64, "--block", 64, "--chunk", 64]
    done = cli("predict", source, "--out", tmp_path / "x.ome.tif", *options)
    assert done.code == 0
    assert done.err.count("no place on a map") == 1
