"""Masks against truth: one grid, and values that are classes."""

import json

import networks
import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet.analysis.alignment import distance
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.geometry import Georeference

# rasterio says so of every plain image that is opened; that is what some of these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

HEIGHT, WIDTH = 40, 50


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Return the folder of one mask of three classes, as a store and as a file, on a map."""
    folder = tmp_path_factory.mktemp("masks")
    model = networks.identity(folder / "strongest.onnx")
    source = write_tif(folder / "a.tif", picture(HEIGHT, WIDTH), georeferenced=True, block=16)
    config = PredictConfig(model=str(model), tile=64, overlap=0, precision="fp32")
    for name in ("m.zarr", "m.tif"):
        predict([source], folder / name, config)
    return folder


@pytest.fixture
def classes(masks):
    with rasterio.open(masks / "m.tif") as src:
        return src.read(1)


def write(path, values, crs=UTM, transform=TRANSFORM):
    bands = np.atleast_3d(values).transpose(2, 0, 1)
    profile = {"count": len(bands), "height": HEIGHT, "width": WIDTH, "dtype": "uint8"}
    place = {"crs": crs, "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", **profile, **place) as dst:
        dst.write(bands)
    return path


def shifted(pixels):
    return TRANSFORM @ Affine.translation(0, pixels)


PLACES = {
    "the same": (UTM, TRANSFORM, None),
    "rounded on its way": (UTM, shifted(0.0005), None),
    "another spelling": (
        rasterio.crs.CRS.from_epsg(32633).to_wkt(version="WKT1_ESRI"), TRANSFORM, None
    ),
    "no CRS": (None, shifted(9), None),
    "no affine": (UTM, None, None),
    "a hundredth": (UTM, shifted(0.01), "0.01 pixels"),
    "three rows down": (UTM, shifted(3), "3 pixels"),
    "larger pixels": (UTM, TRANSFORM @ Affine.scale(1.1), "pixels"),
    "origin 0, 0": (UTM, Affine(10, 0, 0, 0, -10, 0), "5.025e+05 pixels"),
    "the next zone": ("EPSG:32634", TRANSFORM, "pixels"),
    "degrees": ("EPSG:4326", Affine(1e-4, 0, 15, 0, -1e-4, 45), "pixels"),
    "no such degrees": ("EPSG:32633", Affine(1e300, 0, 0, 0, 1e-300, 0), "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("pred", ["m.zarr", "m.tif"])
@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_the_truth(cli, masks, classes, tmp_path, name, pred):
    crs, transform, told = PLACES[name]
    truth = write(tmp_path / "t.tif", classes, crs, transform)
    done = cli("evaluate", "--pred", masks / pred, "--truth", truth, "--json")
    if told is None:
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["accuracy"] == 1
    else:
        assert done.code == 3
        assert "places differ: mask and truth lie up to" in done.err
        assert told in done.err
        assert f"{truth}; compare masks on one grid" in done.err


def test_distances_are_of_the_corner_that_is_farthest():
    wkt = rasterio.crs.CRS.from_epsg(3857).to_wkt()
    square = Georeference(wkt, (2.0, 0.0, 0.0, 0.0, -2.0, 0.0))
    turned = Georeference(wkt, (2.0, 0.0, 6.0, 0.0, -2.0, 8.0))
    wider = Georeference(wkt, (4.0, 0.0, 0.0, 0.0, -2.0, 0.0))
    assert distance(square, square, 10, 20) == 0
    assert distance(square, turned, 10, 20) == 5
    assert distance(square, wider, 10, 20) == 10  # of its own pixels
    assert distance(wider, square, 10, 20) == 20
    flat = Georeference(wkt, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert distance(square, flat, 10, 20) == np.inf
    assert distance(square, Georeference("nonsense", square.transform), 10, 20) == np.inf
    for unknown in Georeference(wkt), Georeference(transform=square.transform):
        assert distance(square, unknown, 10, 20) is None


def evaluated(cli, pred, truth):
    done = cli("evaluate", "--pred", pred, "--truth", truth, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out), done.err.splitlines()


def test_values_beyond_the_classes_count_for_nothing(cli, masks, classes, tmp_path):
    classes[0, :5], classes[1, :7], classes[2, :3] = 7, 9, 255
    found, lines = evaluated(cli, masks / "m.zarr", write(tmp_path / "t.tif", classes))
    assert lines == [
        "tilenet: the truth has values that are no classes: 7 (5 pixels) counts for nothing, "
        "9 (7 pixels) counts for nothing"
    ]
    assert found["accuracy"] == 1
    assert [one["dice"] for one in found["classes"]] == [1, 1, 1]


def test_values_that_are_taken_for_classes(cli, masks, classes, tmp_path):
    counts = np.bincount(classes.ravel())
    truth = write(tmp_path / "t.tif", classes + 6)
    for pred in ("m.zarr", "m.tif"):
        found, lines = evaluated(cli, masks / pred, truth)
        assert lines == [
            "tilenet: the truth has values that are no classes: " + ", ".join(
                f"{k + 6} ({counts[k]} pixels) is taken for class {k}" for k in range(3)
            )
        ]  # fmt: skip
        assert found["accuracy"] == 1


def test_a_colour_too_many(cli, masks, classes, tmp_path):
    """Colours become classes in order, which needs no word; one that is none does."""
    classes[0, :5] = 3
    colours = np.array([(0, 0, 0), (0, 0, 200), (0, 200, 0), (200, 0, 0)], np.uint8)
    _, lines = evaluated(cli, masks / "m.zarr", write(tmp_path / "t.tif", colours[classes]))
    assert lines == [
        "tilenet: the truth has values that are no classes: #c80000 (5 pixels) counts for nothing"
    ]


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 1, 255), (0, 255, 255), (6, 9, 9)])
def test_values_that_need_no_word(cli, masks, classes, tmp_path, values):
    """Classes by their numbers, 255, and two values of any kind."""
    truth = write(tmp_path / "t.tif", np.array(values, np.uint8)[classes])
    _, lines = evaluated(cli, masks / "m.tif", truth)
    assert lines == []


@pytest.mark.parametrize("pred", ["m.zarr", "m.tif"])
def test_a_mask_agrees_with_itself_in_any_format(cli, masks, pred):
    """Its colours are in another order than its classes."""
    found, lines = evaluated(cli, masks / pred, masks / "m.tif")
    assert lines == []
    assert found["accuracy"] == 1
    assert [(one["name"], one["dice"]) for one in found["classes"]] == [
        ("class 0", 1), ("class 1", 1), ("class 2", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("pred", ["m.zarr", "m.tif"])
def test_truth_in_which_a_class_is_missing(cli, masks, classes, tmp_path, pred):
    truth = write(tmp_path / "t.tif", np.where(classes == 1, 255, classes))
    found, lines = evaluated(cli, masks / pred, truth)
    assert (lines, found["accuracy"]) == ([], 1)


def test_a_palette_for_the_truth(cli, masks, classes, tmp_path):
    truth = write(tmp_path / "t.tif", np.array([7, 9, 8], np.uint8)[classes])
    palette = tmp_path / "p.toml"
    for text in ('7 = "a"\n9 = "b"\n8 = "c"', '8 = "class 2"\n9 = "class 1"\n7 = "class 0"'):
        palette.write_text(text)
        line = ("--pred", masks / "m.tif", "--truth", truth, "--palette", palette, "--json")
        done = cli("evaluate", *line)
        assert (done.code, done.err) == (0, "")
        assert json.loads(done.out)["accuracy"] == 1


def test_folders_in_folders(cli, masks, classes, tmp_path):
    """Equal names in two folders are two masks; probabilities are none."""
    wrong = (classes + 1) % 3
    for folder, name, values in (
        ("pred/p1", "a.tif", classes), ("pred/p2", "a.tif", classes),
        ("truth/p1", "a_mask.tif", classes), ("truth/p2", "a_mask.tif", wrong),
        ("truth/p2", "a.tif", classes),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write(tmp_path / folder / name, values)
    write(tmp_path / "pred/p1/a.prob.tif", classes)
    found, _ = evaluated(cli, tmp_path / "pred", tmp_path / "truth")
    assert [(one["image"], one["accuracy"]) for one in found["per_image"]] == [
        ("p1/a", 1), ("p2/a", 0)
    ]  # fmt: skip
    found, _ = evaluated(cli, tmp_path / "pred/p1", tmp_path / "truth/p1")
    assert [one["image"] for one in found["per_image"]] == ["a"]
    (tmp_path / "truth/p1").rename(tmp_path / "truth/p3")
    done = cli("evaluate", "--pred", tmp_path / "pred", "--truth", tmp_path / "truth")
    assert (done.code, "several masks are called a" in done.err) == (3, True)
