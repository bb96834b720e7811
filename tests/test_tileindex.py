"""Tile indexes (GTI) as inputs: mosaics of the scenes that they name."""

import subprocess
import sys

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from networks import identity
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.sources import View, open_raster

ALLOWED = View(allow_remote=True)
PIXELS = picture(200, 300, seed=5)


def scene(path, pixels, row, col):
    write_tif(path, pixels, georeferenced=True)
    with rasterio.open(path, "r+") as dst:
        dst.transform = TRANSFORM @ TRANSFORM.translation(col, row)
        return shapely.box(*dst.bounds)


@pytest.fixture
def index(tmp_path):
    """Three scenes: two that abut, and one over both that lies on top by its date."""
    (tmp_path / "scenes").mkdir()
    boxes = [
        scene(tmp_path / "scenes/c.tif", 255 - PIXELS[:, 50:100, 80:200], 50, 80),
        scene(tmp_path / "scenes/a.tif", PIXELS[:, :, :150], 0, 0),
        scene(tmp_path / "scenes/b.tif", PIXELS[:, :, 150:], 0, 150),
    ]
    table = {"location": [f"scenes/{n}.tif" for n in "cab"], "date": [3, 1, 2]}
    return geopandas.GeoDataFrame(table, geometry=boxes, crs=UTM)


def written(index, path):
    index.to_file(path, layer="tiles") if path.suffix == ".gpkg" else index.to_file(path)
    return path


def xml(path, dataset, more=""):
    path.write_text(
        f"<GDALTileIndexDataset><IndexDataset>{dataset}</IndexDataset>{more}</GDALTileIndexDataset>"
    )
    return path


def whole(path):
    raster = open_raster(path, ALLOWED)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.zeros(3))


def by_gdal(path):
    """Return what GDAL's own driver makes of an index, in a process that has it."""
    code = "import rasterio, sys; sys.stdout.buffer.write(rasterio.open(sys.argv[1]).read())"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(3, 200, 300)


@pytest.mark.parametrize("ending", ["gpkg", "fgb", "geojson"])
def test_scenes_in_the_order_of_the_index(index, tmp_path, ending):
    path = written(index, tmp_path / f"x.gti.{ending}")
    if ending == "fgb":  # this format has an order of its own
        index = geopandas.read_file(path)
    expected = np.zeros_like(PIXELS)
    for name in index["location"]:
        with rasterio.open(tmp_path / name) as src:
            place = ~TRANSFORM @ src.transform
            window = Window(int(place.f), int(place.c), src.height, src.width)
            expected[(slice(None), *window.slices())] = src.read()
    pixels, valid = whole(path)
    assert np.array_equal(pixels, expected)
    assert valid is None


@pytest.mark.parametrize("down", [False, True])
def test_sorted_as_gdal_does(index, tmp_path, down):
    written(index, tmp_path / "x.gpkg")
    more = "<IndexLayer>tiles</IndexLayer><SortField>date</SortField>"
    path = xml(
        tmp_path / "x.gti", tmp_path / "x.gpkg", more + "<SortFieldAsc>false</SortFieldAsc>" * down
    )
    pixels, _ = whole(path)
    assert np.array_equal(pixels, by_gdal(path))
    on_top = 255 - PIXELS[:, 50:100, 80:200] if not down else PIXELS[:, 50:100, 80:200]
    assert np.array_equal(pixels[:, 50:100, 80:200], on_top)


@pytest.mark.parametrize("down", [False, True])
def test_sorted_as_its_metadata_say(index, tmp_path, down):
    path = tmp_path / "x.gti.gpkg"
    said = {"SORT_FIELD": "date"} | ({"SORT_FIELD_ASC": "NO"} if down else {})
    pyogrio.write_dataframe(index, path, layer="tiles", layer_metadata=said)
    pixels, _ = whole(path)
    assert np.array_equal(pixels, by_gdal(path))
    on_top = 255 - PIXELS[:, 50:100, 80:200] if not down else PIXELS[:, 50:100, 80:200]
    assert np.array_equal(pixels[:, 50:100, 80:200], on_top)


def test_metadata_that_are_not_followed_are_refused(index, tmp_path):
    path = tmp_path / "x.gti.gpkg"
    said = {"RESX": "5", "DESCRIPTION": "tiles", "BAND_1_NODATA": "0"}
    pyogrio.write_dataframe(index, path, layer="tiles", layer_metadata=said)
    with pytest.raises(InputError, match="sets BAND_1_NODATA, RESX, which is not followed"):
        open_raster(path, ALLOWED)


def test_a_sort_field_that_is_not_always_there(index, tmp_path):
    """What has none lies below, as it comes first in SQL."""
    index["date"] = ["2026-03-01", None, "2026-01-01"]
    written(index, tmp_path / "x.gpkg")
    more = "<IndexLayer>tiles</IndexLayer><SortField>date</SortField>"
    pixels, _ = whole(xml(tmp_path / "x.gti", tmp_path / "x.gpkg", more))
    assert np.array_equal(pixels[:, 50:100, 80:200], 255 - PIXELS[:, 50:100, 80:200])


def test_a_gap_has_no_answer_which_gdal_reads_as_zeros(index, tmp_path):
    path = written(index[index["location"] != "scenes/a.tif"], tmp_path / "x.gti.gpkg")
    _, valid = whole(path)
    expected = np.ones((200, 220), bool)
    expected[:50, :70] = expected[100:, :70] = False
    assert np.array_equal(valid, expected)


def test_its_scenes_are_part_of_what_is_read(index, tmp_path):
    path = written(index, tmp_path / "x.gti.gpkg")
    info = open_raster(path, ALLOWED).info
    assert info.path == str(path)
    assert {*info.files} == {str(path), *(str(tmp_path / n) for n in index["location"])}
    (tmp_path / "scenes/b.tif").touch()
    assert open_raster(path, ALLOWED).info.fingerprint != info.fingerprint


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("<ResX>5</ResX>", "sets ResX, which is not followed"),
        ("<LocationField>place</LocationField>", "has no field place"),
        ("<IndexLayer>gone</IndexLayer>", "not a tile index"),
        ("<", "no XML"),
    ],
)
def test_what_is_not_followed_is_refused(index, tmp_path, more, what):
    written(index, tmp_path / "x.gpkg")
    with pytest.raises(InputError, match=what):
        open_raster(xml(tmp_path / "x.gti", "x.gpkg", more), ALLOWED)


def test_an_index_of_nothing(index, tmp_path):
    with pytest.raises(InputError, match="names no raster"):
        open_raster(written(index[:0], tmp_path / "x.gti.gpkg"), ALLOWED)
    (tmp_path / "y.gti.gpkg").write_text("no database")
    with pytest.raises(InputError, match="not a tile index"):
        open_raster(tmp_path / "y.gti.gpkg", ALLOWED)


def test_by_the_command_and_not_without_leave(index, tmp_path, cli):
    path = written(index, tmp_path / "x.gti.gpkg")
    model = identity(tmp_path / "m.onnx")
    line = ["predict", path, "--out", tmp_path / "x.tif", "-m", model, "--backend", "openvino"]
    done = cli(*line)
    assert (done.code, done.err.count("a tile index points to other files")) == (3, 1)
    assert cli(*line, "--allow-remote").code == 0
    with rasterio.open(tmp_path / "x.tif") as src:
        assert (src.shape, src.crs) == ((200, 300), UTM)
        assert src.transform == TRANSFORM
        assert np.array_equal(src.read(1), whole(path)[0].argmax(axis=0))
