"""What is known of a data set before training: statistics, parts, places; all read by windows."""

from dataclasses import replace

import labelled
import numpy as np
import pytest
import torch
from rasterio.crs import CRS

from tilenet.errors import UsageError
from tilenet.geometry import Georeference, Window
from tilenet.train_api import train
from tilenet.training.check import _pixel_size, check_data
from tilenet.training.config import TrainConfig
from tilenet.training.datasets import TrainWindows, ValWindows, WindowReader
from tilenet.training.images import ImageRef
from tilenet.training.intake import take_in
from tilenet.training.labels import MaskFile
from tilenet.training.metrics import Scores
from tilenet.training.palette import Palette
from tilenet.training.pieces import pieces
from tilenet.training.result import draft_card
from tilenet.training.samples import Sample
from tilenet.training.sampling import Places, validation_windows
from tilenet.training.schedule import Schedule
from tilenet.training.survey import PartSurvey, survey_part
from tilenet.training.vectors import Grid

SMALL = {
    "arch": "classic-unet", "options": {"widths": [4, 8]}, "tile": 32, "batch_size": 2,
    "epochs": 1, "steps": 2, "workers": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (700, 300), (3000, 9001), (10, 50_000)])
def test_pieces_cover_an_extent_once(size):
    extent = Window(5, 7, *size)
    found = list(pieces(extent))
    assert sum(p.pixels for p in found) == extent.pixels
    assert all(p.intersection(extent) == p and p.pixels <= 1 << 21 for p in found)
    assert found == sorted(found)


def test_survey_has_the_known_figures(tmp_path):
    data = labelled.pairs(tmp_path / "d")
    found = take_in(TrainConfig(data=data), tmp_path / "cache")
    names = [s.name for s in found.parts.train]
    greys, objects = zip(*(labelled.disc(int(name[1:])) for name in names), strict=True)
    pixels = np.stack([labelled.rgb(g) for g in greys]).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(found.train.mean, pixels.mean(axis=0))  # the training part only
    np.testing.assert_allclose(found.train.std, pixels.std(axis=0))
    inside = [int((o > 0).sum()) for o in objects]
    assert found.train.class_pixels.tolist() == [len(pixels) - sum(inside), sum(inside)]
    for cells, side, mask in zip(found.train.cells, found.train.cell_sides, objects, strict=True):
        assert side == 32
        blocks = (mask > 0).reshape(2, 32, 2, 32).sum(axis=(1, 3))
        np.testing.assert_array_equal(cells[:, :, 1], blocks)


def test_card_has_what_the_training_part_shows(tmp_path):
    config = TrainConfig(data=labelled.raster(tmp_path / "d"), tile=32, card={"license": "CC0"})
    found = take_in(config, tmp_path / "cache")
    card = draft_card(config, found.data, found.train, "sigmoid", {"divisor": 2}, "roofs")
    np.testing.assert_allclose(card.offset, found.train.mean, rtol=1e-6)
    np.testing.assert_allclose(card.scale, found.train.std, rtol=1e-6)
    assert card.ground_resolution == 10
    assert card.model_dump()["license"] == "CC0"
    with pytest.raises(ValueError, match="training itself decides mean"):
        TrainConfig(data=".", card={"mean": 0})


def test_a_map_in_feet_is_learnt_in_metres():
    """For predict takes the number so."""
    turn = {"transform": (10.0, 0.0, 0.0, 0.0, -10.0, 0.0)}
    for code, side in ((32633, 10.0), (2263, 3.04801), (4326, 10.0)):
        place = Georeference(crs_wkt=CRS.from_epsg(code).to_wkt(), **turn)
        assert _pixel_size(place) == ("ground_resolution", side)


def test_a_date_is_no_place_on_a_map(tmp_path):
    data = labelled.pairs(tmp_path / "d")
    for kind in ("images", "masks"):
        for k in range(6):
            (data / kind / f"i{k}.png").rename(data / kind / f"2018-05-{10 + k}.png")
    assert check_data(TrainConfig(data=data), tmp_path / "cache").resolution == {}


def rare(folder):
    """Return a sample of 512² pixels: class 1 in one quarter, class 2 in one 32² corner."""
    truth = np.zeros((512, 512), np.uint8)
    truth[:256, :256] = 1
    truth[-32:, -32:] = 2
    labelled.scene(folder / "image.tif", np.zeros((1, 512, 512), np.uint8))
    labelled.scene(folder / "truth.tif", truth[None])
    palette = Palette((), ((0, 0), (1, 1), (2, 2)))
    label = MaskFile(str(folder / "truth.tif"), 0, palette)
    return Sample("a", ImageRef(str(folder / "image.tif")), label, None, "", 512, 512), truth


def shares(places, truth, draws=400):
    """Return how many windows of 64 pixels show class 1, and how many class 2."""
    rng = np.random.default_rng(0)
    windows = [places.draw(64, rng)[1] for _ in range(draws)]
    seen = [np.unique(truth[w.slices()]) for w in windows]
    return [sum(k in s for s in seen) / draws for k in (1, 2)]


def test_windows_are_drawn_at_objects_and_at_every_class(tmp_path):
    sample, truth = rare(tmp_path)
    survey = survey_part([sample], 3)
    anywhere = shares(Places([sample], survey, 0.0), truth)
    objects = shares(Places([sample], survey, 1.0), truth)
    every = shares(Places([sample], survey, 1.0, balance=True), truth)
    assert 0.2 < anywhere[0] < 0.4
    assert anywhere[1] < 0.05
    assert objects[0] > 0.9
    assert objects[1] < 0.1
    assert every[1] == pytest.approx(1 / 3, abs=0.08)  # one class in three


def test_some_images_are_drawn_more_often(tmp_path):
    sample, _ = rare(tmp_path)
    samples = [replace(sample, name=name) for name in ("he_1", "he_2", "grey")]
    survey = survey_part(samples, 3)
    rng = np.random.default_rng(0)
    places = Places(samples, survey, 0.5, often={"he_2": 1, "he_*": 6})
    drawn = np.bincount([places.draw(64, rng)[0] for _ in range(800)]) / 800
    assert drawn == pytest.approx([6 / 8, 1 / 8, 1 / 8], abs=0.05)
    with pytest.raises(UsageError, match=r"'x\*' matches no image"):
        Places(samples, survey, 0.5, often={"x*": 2})


def test_windows_beyond_a_block_are_reflected_from_inside_it(tmp_path):
    sample, _ = rare(tmp_path)
    block = Sample("b", sample.image, sample.label, Window(0, 0, 256, 256), "", 512, 512)
    config = TrainConfig(data=tmp_path, tile=64)
    found = survey_part([block], 3)
    assert found.class_pixels.tolist() == [0, 256 * 256, 0]

    class Card:
        offset, scale = np.zeros(1), np.ones(1)

    reader = WindowReader([block], Card)
    _, labels = reader.read(0, Window(224, 224, 64, 64))
    assert (labels[0] == 1).all()  # pixel 256 and beyond is held out
    windows = validation_windows([block], found, 100, 99)
    items = [ValWindows(reader, [block], windows)[k] for k in range(len(windows))]
    counted = sum(int((item["target"] != 255).sum()) for item in items)
    assert counted == 256 * 256  # every pixel once, none twice
    item = TrainWindows(reader, Places([block], found, 0.5), config, 3)[1]
    again = TrainWindows(reader, Places([block], found, 0.5), config, 9)[1]
    assert torch.equal(item["image"], again["image"])  # a function of seed and index alone


def test_validation_looks_where_something_is_labelled(tmp_path):
    sample, _ = rare(tmp_path)
    nothing = PartSurvey(1, 1, np.zeros(2), 0, np.zeros(1), np.ones(1), (), ())
    cells = np.zeros((8, 8, 2), np.int32)
    cells[5, 2, 1] = 7
    survey = replace(nothing, cells=(cells,), cell_sides=(64,))
    found = validation_windows([sample], survey, 64, 256)
    assert found == [(0, Window(320, 128, 64, 64))]
    assert len(validation_windows([sample], survey, 80, 256)) == 2  # the cell reaches into two
    assert np.isnan(Scores(np.zeros((2, 3), np.int64)).object_dice)
    assert Scores(np.array([[4, 0, 0], [0, 0, 0]])).object_dice == 1.0


def test_schedules():
    config = TrainConfig(data=".", steps=10, epochs=10, warmup=0.1, lr=1.0)
    cosine = Schedule(config)
    assert [cosine.rate(step, 1) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert cosine.rate(10, 1) == 1.0
    assert cosine.rate(55, 1) == pytest.approx(0.5)
    assert cosine.rate(99, 1) == pytest.approx(0.01)
    plateau = Schedule(config.model_copy(update={"schedule": "plateau"}))
    assert plateau.rate(55, 0.25) == 0.25
    assert [plateau.lowered(1.0, stale) for stale in (0, 4, 5, 6)] == [1.0, 1.0, 0.5, 1.0]


def test_a_grid_finds_its_pixels():
    place = Georeference("EPSG:32631", (3.0, 1.0, 100.0, -1.0, -2.0, 900.0))
    grid = Grid.of(place, 20, 30)
    corners = np.array([[100.0, 900.0], [100 + 3 * 30, 900 - 30.0]])
    np.testing.assert_allclose(grid.to_pixels(corners), [[0, 0], [30, 0]], atol=1e-9)
    assert grid.bounds() == (100, 900 - 30 - 40, 100 + 90 + 20, 900)
    assert Grid.of(Georeference(), 1, 1) is None


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_only_near_polygons_are_reprojected(crs, tmp_path):
    import geopandas
    from shapely.geometry import box

    from tilenet.training import vectors

    near = box(500100, 5599000, 500200, 5599100)
    far = [box(x, 5.0e6, x + 10, 5.0e6 + 10) for x in range(400_000, 401_000, 10)]
    frame = geopandas.GeoDataFrame(geometry=[*far, near], crs="EPSG:32631").to_crs(crs)
    frame.to_file(tmp_path / "p.gpkg")
    grid = Grid("EPSG:32631", (10.0, 0.0, 500000.0, 0.0, -10.0, 5600000.0), 256, 256)
    shapes, _, _ = vectors._in_pixels(str(tmp_path / "p.gpkg"), None, grid)
    assert len(shapes) == 1
    np.testing.assert_allclose(shapes[0].bounds, (10, 90, 20, 100), atol=1e-3)


def test_bands_are_chosen_and_16_bits_are_kept(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 9000, (5, 96, 96)).astype(np.uint16)
    labelled.scene(tmp_path / "d" / "images" / "a.tif", pixels)
    labelled.scene(tmp_path / "d" / "masks" / "a.tif", (pixels[:1] > 4500).astype(np.uint8))
    config = TrainConfig(data=tmp_path / "d", bands=(5, 2), **SMALL)
    result = train(config, tmp_path / "model")
    assert len(result.metrics["data"]["mean"]) == 2
    assert "spatial block" in result.metrics["data"]["split"]
    assert result.metrics["data"]["mean"][1] == pytest.approx(pixels[1].mean(), rel=0.02)
