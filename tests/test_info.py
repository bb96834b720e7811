"""`tilenet info`: what a header says, compared with what was written into it."""

import json
import math

import networks
import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasters import picture, write_image, write_tif

from tilenet.geometry import Georeference
from tilenet.info import describe
from tilenet.place import describe_place

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)
EUROPA = """PROJCS["Equirectangular EUROPA",GEOGCS["GCS_EUROPA",DATUM["D_EUROPA",
SPHEROID["EUROPA_localRadius",1560800,0]],PRIMEM["Reference_Meridian",0],
UNIT["degree",0.0174532925199433]],PROJECTION["Equirectangular"],PARAMETER["standard_parallel_1",0],
PARAMETER["central_meridian",180],PARAMETER["false_easting",0],PARAMETER["false_northing",0],
UNIT["metre",1]]"""


def place_of(crs, transform, side=1000):
    return describe_place(Georeference(crs_wkt=crs.to_wkt(), transform=transform), side, side)


class TestPlace:
    def test_utm(self):
        found = place_of(CRS.from_epsg(32633), (10, 0, 5e5, 0, -10, 5e6))
        assert found["crs"]["name"] == "WGS 84 / UTM zone 33N"
        assert found["crs"]["code"] == "EPSG:32633"
        assert found["bounds"] == [5e5, 4.99e6, 5.1e5, 5e6]
        # On the central meridian, 15° E.
        west, south, east, north = found["bounds_lonlat"]
        assert west == pytest.approx(15, abs=1e-9)
        assert south == pytest.approx(45.0628, abs=1e-3)
        assert (west < east, south < north) == (True, True)
        assert found["ground_resolution"] == {"y": 10, "x": 10, "metres": (10, 10)}

    def test_feet(self):
        found = place_of(CRS.from_epsg(2263), (1, 0, 980000, 0, -2, 200000))
        assert found["ground_resolution"]["metres"] == pytest.approx((2400 / 3937, 1200 / 3937))
        assert "foot" in found["crs"]["unit"]

    def test_degrees_and_web_mercator_are_measured(self):
        found = place_of(CRS.from_epsg(4326), (0.001, 0, 12, 0, -0.001, 0.5))
        # At the equator a degree is a π / 180 in longitude, 110,574 m in latitude.
        expected = (110.574, 6378137 * math.pi / 180e3)
        assert found["ground_resolution"]["metres"] == pytest.approx(expected, rel=1e-4)
        assert (found["crs"]["code"], found["crs"]["unit"]) == ("EPSG:4326", "degree")
        found = place_of(CRS.from_epsg(3857), (10, 0, 0, 0, -10, 8399737.9), side=10)
        assert found["ground_resolution"]["metres"] == pytest.approx((5, 5), rel=0.01)
        assert found["ground_resolution"]["x"] == 10

    def test_a_moon_has_no_longitude_here(self, capfd):
        found = place_of(CRS.from_wkt(EUROPA), (282, 0, -1.3e6, 0, -282, 6e5))
        assert found["crs"]["name"] == "Equirectangular EUROPA"
        assert found["crs"]["code"] is found["bounds_lonlat"] is None
        assert found["ground_resolution"]["metres"] == (282, 282)
        assert capfd.readouterr().err == ""

    def test_rotated_and_none(self):
        found = place_of(CRS.from_epsg(32633), (8, 6, 5e5, 6, -8, 5e6), side=10)
        assert found["ground_resolution"]["x"] == found["ground_resolution"]["y"] == 10
        assert found["bounds"] == [5e5, 5e6 - 80, 5e5 + 140, 5e6 + 60]
        none = describe_place(Georeference(), 5, 5)
        assert none.pop("gcps") == 0
        assert set(none.values()) == {None}


def test_a_raster(tmp_path, cli):
    path = tmp_path / "scene.tif"
    profile = {
        "driver": "GTiff", "count": 3, "height": 200, "width": 301, "dtype": "uint16",
        "nodata": 0, "crs": "EPSG:32633", "transform": Affine(10, 0, 5e5, 0, -10, 5e6),
        "tiled": True, "blockxsize": 64, "blockysize": 128, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(picture(200, 301, dtype="uint16", high=9000))
        dst.descriptions = ("B04", "B03", "B8A")
        dst.scales, dst.offsets = (1e-4, 1e-4, 1e-4), (-0.1, -0.1, -0.1)
        dst.set_band_unit(1, "reflectance")
        dst.build_overviews([2, 4], Resampling.average)
    done = cli("info", path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["levels"][1] == {"level": 1, "width": 151, "height": 100, "downsample": 2.0}
    assert [level["downsample"] for level in found["levels"]] == [1, 2, 4]
    assert [one["name"] for one in found["band_details"]] == ["B04", "B03", "B8A"]
    first = found["band_details"][0]
    assert (first["scale"], first["offset"], first["nodata"]) == (1e-4, -0.1, 0)
    assert (first["color"], first["unit"], first["dtype"]) == ("gray", "reflectance", "uint16")
    assert found["native_block"] == [128, 64]
    assert found["compression"] == "DEFLATE"
    assert found["models_that_fit"] == ["nuclei"]
    page = cli("info", path).out.splitlines()
    assert page[0] == str(path)
    assert page[1].split(None, 1) == ["is", "GTiff DEFLATE, 301 × 200 pixels, 3 bands of uint16"]
    text = "\n".join(page)
    for words in (
        "2: 76 × 50, downsample 4", "10 metre per pixel", "WGS 84 / UTM zone 33N (EPSG:32633)",
        "x 500000 to 503010, y 4998000 to 5000000", "longitude 15.000000 to ",
        "1: gray, B04, uint16, nodata 0, value = pixel × 0.0001 + -0.1, reflectance",
        "nuclei: fits", "those of the nodata value",
    ):  # fmt: skip
        assert words in text, words


def test_plain_pictures_and_what_does_not_fit(tmp_path, cli):
    path = write_image(tmp_path / "grey.png", picture(40, 50, bands=1))
    found = json.loads(cli("info", path, "--json").out)
    assert (found["driver"], found["crs"], found["mpp"]) == ("PNG", None, None)
    assert found["models"] == [
        {"name": "nuclei", "fits": False, "why": "it takes 3 bands, here are 1"}
    ]
    page = cli("info", path).out
    assert "not known" in page
    assert "does not fit, it takes 3 bands" in page


def test_alpha_and_nodata(tmp_path, cli):
    opaque = np.full((20, 20), 255, np.uint8)
    path = write_tif(tmp_path / "a.tif", picture(20, 20), alpha=opaque, nodata=0)
    assert json.loads(cli("info", path, "--json").out)["validity"] == "alpha+nodata"
    assert "where the alpha band is 0, and those of the nodata value" in cli("info", path).out


def test_nodata_that_json_does_not_know(tmp_path, cli):
    path = write_tif(tmp_path / "nan.tif", np.ones((1, 20, 20), np.float32), nodata=math.nan)
    done = cli("info", path, "--json")
    found = json.loads(done.out, parse_constant=lambda _: pytest.fail("no JSON"))
    assert found["nodata"] == ["nan"] == [found["band_details"][0]["nodata"]]
    assert "nodata nan" in cli("info", path).out
    with rasterio.open(path, "r+") as dst:
        dst.scales, dst.offsets = [math.nan], [math.inf]
    found = json.loads(cli("info", path, "--json").out, parse_constant=lambda _: pytest.fail("no"))
    assert [found["band_details"][0][key] for key in ("scale", "offset")] == ["nan", "inf"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pointwise.onnx"
    networks.pointwise(path)
    return path


@pytest.mark.parametrize("name", ["m.zarr", "m.tif", "m.png"])
def test_a_mask(tmp_path, cli, model, name):
    """The same classes, areas and place as predict told, and who opens it."""
    source = write_tif(tmp_path / "s.tif", picture(90, 110), georeferenced=name != "m.png")
    out = tmp_path / name
    done = cli("predict", source, "--out", out, "--model", model, "--json")
    assert done.code == 0, done.err
    found = describe(out)
    json.dumps(found)
    assert found["complete"] is True
    assert found["class_table"] == json.loads(done.out)["classes"]
    page = cli("info", out).out
    if name == "m.png":
        assert found["opens_in"] == ["rioxarray", "rasterio", "GDAL 3.6", "QGIS 3.22", "Pillow"]
        assert "napari" in found["does_not_open_in"]
        return
    assert "area_ha" in found["class_table"][0]
    assert found["crs"]["code"] == "EPSG:32633"
    assert found["bounds"] == [5e5, 5e6 - 900, 5e5 + 1100, 5e6]
    assert "rasterio" in found["opens_in"]
    assert ("napari" in found["opens_in_part"]) == (name == "m.zarr")
    assert ("QGIS 3.22" in found["opens_in"]) == (name == "m.tif")
    assert "does not open in" in page
    assert " ha" in page


@pytest.mark.parametrize("name", ["m.zarr", "m.tif"])
def test_a_mask_of_a_slide(tmp_path, cli, model, name):
    source = write_tif(tmp_path / "s.tif", picture(64, 64))
    with rasterio.open(source, "r+") as dst:
        dst.update_tags(TIFFTAG_IMAGEDESCRIPTION="Aperio Image Library|AppMag = 20|MPP = 0.499")
    out = tmp_path / name
    done = cli("predict", source, "--out", out, "--model", model, "--json")
    found = describe(out)
    assert found["mpp"] == (0.499, 0.499)
    assert found["class_table"] == json.loads(done.out)["classes"]
    assert ("napari" in found["opens_in"]) == (name == "m.zarr")
    assert found["opens_in_part"].get("OpenSlide") == (["class ids"] if name == "m.tif" else None)
    assert "0.499 µm per pixel" in cli("info", out).out
