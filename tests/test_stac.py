"""STAC items as inputs: which of their files and bands are meant, and what the network sees."""

import json

import numpy as np
import pystac
import pytest
import rasterio
from buckets import connect_empty
from networks import identity
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet import api
from tilenet.config import PredictConfig
from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.sources import View, grid_of, open_raster
from tilenet.sources.stac import Told, parts_of

ALLOWED = View(allow_remote=True)
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
PIXELS = picture(200, 240, bands=4, dtype="uint16", high=9000, seed=3)
LOCAL = {"tile": 64, "overlap": 16, "chunk": 64, "backend": "openvino", "precision": "fp32"}


def asset(href, bands=(), *, kind=COG, roles=("data",), **keys):
    return {"href": href, "type": kind, "roles": list(roles), "eo:bands": list(bands), **keys}


def item(folder, assets, name="scene.json", **keys):
    """Write an item, as pystac sees it."""
    document = {
        "type": "Feature", "stac_version": "1.0.0", "id": "scene", "geometry": None,
        "properties": {"datetime": "2026-06-01T10:00:00Z"}, "links": [], "assets": assets, **keys,
    }  # fmt: skip
    pystac.Item.from_dict(document)
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def sentinel(folder, pixels=PIXELS, **told):
    """Write a scene as Sentinel-2's are offered: a file per band, a picture, and bands in JP2."""
    names = (("blue", "B02"), ("green", "B03"), ("red", "B04"), ("nir", "B08"))
    assets = {}
    for plane, (key, code) in zip(pixels, names, strict=True):
        write_tif(folder / f"{code}.tif", plane[None], georeferenced=True, nodata=0, levels=(2, 4))
        band = {"name": key, "common_name": key, "description": code}
        assets[key] = asset(f"./{code}.tif", [band], **told)
        assets[f"{key}-jp2"] = asset(f"s3://nowhere/{code}.jp2", [band], kind="image/jp2")
    rgb = write_tif(folder / "TCI.tif", picture(200, 240), georeferenced=True)
    bands = [{"name": key, "common_name": key} for key in ("red", "green", "blue")]
    assets["visual"] = asset(rgb.name, bands, roles=("visual",))
    assets["thumbnail"] = asset("thumb.jpg", kind="image/jpeg", roles=("thumbnail",))
    assets["product"] = asset("tileinfo.json", kind="application/json", roles=("metadata",))
    return item(folder, assets)


def whole(name, view=ALLOWED, fill=0.0):
    raster = open_raster(name, view)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.full(len(raster.info.bands), fill))


def asking(*bands, **keys):
    return View(bands=bands, allow_remote=True, **keys)


class TestWhichBands:
    def test_files_by_name_in_the_order_asked_for(self, tmp_path):
        path = sentinel(tmp_path)
        info = open_raster(path, asking("nir", "red", "blue")).info
        assert info.names == ("nir", "red", "blue")
        assert (info.driver, info.dtype, info.height, info.width) == ("stac", "uint16", 200, 240)
        assert info.georeference.transform == tuple(TRANSFORM)[:6]
        assert {*info.files} == {str(tmp_path / n) for n in ("scene.json", "B08.tif", "B04.tif",
                                                             "B02.tif")}  # fmt: skip
        pixels, valid = whole(path, asking("nir", "red", "blue"))
        assert np.array_equal(pixels, PIXELS[[3, 2, 0]])
        assert valid is None

    def test_the_network_s_names(self, tmp_path):
        path = sentinel(tmp_path)
        view = View(trained_bands=("red", "nir"), allow_remote=True)
        assert np.array_equal(whole(path, view)[0], PIXELS[[2, 3]])

    def test_several_bands_of_one_file(self, tmp_path):
        write_tif(tmp_path / "naip.tif", PIXELS, georeferenced=True)
        bands = [{"name": n, "common_name": n} for n in ("red", "green", "blue", "nir")]
        path = item(tmp_path, {"image": asset("naip.tif", bands)})
        assert np.array_equal(whole(path, asking("nir", "green", "red"))[0], PIXELS[[3, 1, 0]])
        assert np.array_equal(whole(path)[0], PIXELS)
        assert np.array_equal(whole(path, asking(4, 1))[0], PIXELS[[3, 0]])

    def test_version_1_1(self, tmp_path):
        write_tif(tmp_path / "a.tif", PIXELS[:2], georeferenced=True)
        bands = [
            {"name": "one", "eo:common_name": "red"}, {"name": "two", "eo:common_name": "nir"}
        ]  # fmt: skip
        one = {"href": "a.tif", "type": COG, "roles": ["data"], "bands": bands}
        path = item(tmp_path, {"data": one}, stac_version="1.1.0")
        assert np.array_equal(whole(path, asking("nir", "one"))[0], PIXELS[[1, 0]])

    def test_one_file_by_its_name(self, tmp_path):
        path = sentinel(tmp_path)
        info = open_raster(path, View(variable="visual", allow_remote=True)).info
        assert info.bands == (1, 2, 3)
        with pytest.raises(InputError, match=r"no raster thumbnail.*--variable: blue"):
            open_raster(path, View(variable="thumbnail", allow_remote=True))

    def test_planes_are_not_chosen_in_vain(self, tmp_path):
        with pytest.raises(InputError, match="no planes to choose from"):
            open_raster(sentinel(tmp_path), asking("red", plane=(("t", 0),)))

    @pytest.mark.parametrize("view", [ALLOWED, asking(1, 2, 3)])
    def test_without_names_several_files_are_no_image(self, tmp_path, view):
        path = sentinel(tmp_path)
        with pytest.raises(InputError, match=r"9 rasters, and nothing says.*--bands.*--variable"):
            open_raster(path, view)

    def test_a_name_that_is_not_there_or_of_two(self, tmp_path):
        path = sentinel(tmp_path)
        with pytest.raises(InputError, match=r"of the name swir16; .*it has blue, blue-jp2"):
            open_raster(path, asking("red", "swir16"))
        write_tif(tmp_path / "a.tif", PIXELS[:1], georeferenced=True)
        twice = {key: asset("a.tif", [{"name": "vv"}]) for key in ("early", "late")}
        path = item(tmp_path, twice, "twice.json")
        with pytest.raises(InputError, match=r"no band, or several, of the name vv"):
            open_raster(path, asking("vv"))
        assert np.array_equal(whole(path, asking("late"))[0], PIXELS[:1])


class TestPixels:
    def test_coarser_bands_come_to_the_finest_grid(self, tmp_path):
        path = sentinel(tmp_path)
        coarse = PIXELS[:1, ::2, ::2]
        with rasterio.open(
            tmp_path / "B05.tif", "w", driver="GTiff", height=100, width=120, count=1, crs=UTM,
            dtype="uint16", transform=TRANSFORM @ TRANSFORM.scale(2, 2),
        ) as dst:  # fmt: skip
            dst.write(coarse)
        document = json.loads(path.read_text())
        document["assets"]["rededge1"] = asset("B05.tif", [{"name": "rededge1"}])
        path.write_text(json.dumps(document))
        pixels, _ = whole(path, asking("rededge1", "red"))
        brought, _ = whole(tmp_path / "B05.tif", View(like=grid_of(tmp_path / "B04.tif")))
        assert np.array_equal(pixels[0], brought[0])
        assert np.array_equal(pixels[1], PIXELS[2])

    def test_its_levels_are_those_of_its_files(self, tmp_path):
        path = sentinel(tmp_path)
        assert open_raster(path, asking("red", "nir")).info.levels == (
            (200, 240), (100, 120), (50, 60)
        )  # fmt: skip
        pixels, _ = whole(path, asking("red", "nir", level=1))
        own, _ = whole(tmp_path / "B04.tif", View(level=1))
        assert np.array_equal(pixels[0], own[0])

    def test_scale_and_offset_that_only_the_item_tells(self, tmp_path):
        told = {"raster:bands": [{"nodata": 0, "scale": 0.0001, "offset": -0.1}]}
        path = sentinel(tmp_path, **told)
        with pytest.raises(InputError, match=r"0\.0001 times its stored numbers, plus -0\.1"):
            open_raster(path, asking("red"))
        assert np.array_equal(whole(path, asking("red", scaling="stored"))[0], PIXELS[2:3])
        pixels, _ = whole(path, asking("red", scaling="apply"))
        meant = PIXELS[2:3].astype(np.float64) * 0.0001 - 0.1
        assert np.array_equal(pixels, meant.astype(np.float32))

    def test_a_file_that_contradicts_its_item(self, tmp_path):
        path = sentinel(tmp_path, **{"raster:bands": [{"scale": 0.0001, "offset": -0.1}]})
        with rasterio.open(tmp_path / "B04.tif", "r+") as dst:
            dst.scales, dst.offsets = (0.0001,), (0.0,)
        with pytest.raises(InputError, match="not those that the item tells"):
            open_raster(path, asking("red", scaling="apply"))

    def test_nodata_is_filled_band_by_band_and_invalid_where_all_are(self, tmp_path):
        pixels = PIXELS.copy()
        pixels[2, :30] = 0
        pixels[3, 10:40] = 0
        path = sentinel(tmp_path, pixels)
        found, valid = whole(path, asking("red", "nir"), fill=7)
        assert np.array_equal(~valid, (pixels[2] == 0) & (pixels[3] == 0))
        assert (~valid).any()
        assert np.array_equal(found, np.where(pixels[2:] == 0, 7, pixels[2:]))

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_bytes_of_several_files_are_colours_as_of_one(self, tmp_path, scale):
        pixels = picture(60, 80, bands=3)
        pixels[0, :30] = pixels[1, 10:40] = pixels[2, 20:50] = 0
        red, green, blue = ("red", "green", "blue")
        for name, plane in zip((red, green, blue), pixels, strict=True):
            write_tif(tmp_path / f"{name}.tif", plane[None], georeferenced=True, nodata=0)
        told = {"raster:bands": [{"scale": scale, "offset": 3 * (scale - 1)}]}
        bands = {n: asset(f"{n}.tif", [{"name": n}], **told) for n in (red, green, blue)}
        path = item(tmp_path, bands)
        found, valid = whole(path, asking(red, green, blue, scaling="apply"), fill=7.0)
        assert np.array_equal(~valid, (pixels == 0).all(axis=0))
        assert (~valid).any()
        assert np.array_equal(found, np.where(valid, pixels * scale + 3 * (scale - 1), 7))

    def test_nodata_that_only_the_item_tells(self, tmp_path):
        pixels = PIXELS[:1].copy()
        pixels[0, :50] = 9
        write_tif(tmp_path / "a.tif", pixels, georeferenced=True)
        for told in ({"raster:bands": [{"nodata": 9}]}, {"nodata": 9}):
            path = item(tmp_path, {"a": asset("a.tif", **told)})
            _, valid = whole(path)
            assert np.array_equal(~valid, pixels[0] == 9)


class TestRuns:
    def test_a_mask_as_of_the_bands_in_one_file(self, tmp_path):
        path = sentinel(tmp_path)
        stacked = write_tif(
            tmp_path / "stacked.tif", PIXELS[[2, 1, 0]], georeferenced=True, nodata=0
        )
        model = identity(tmp_path / "m.onnx", ["red", "green", "blue"], 3, value_range=[0, 9000])
        masks = {}
        for name, source, options in (
            ("item", path, {"allow_remote": True}),
            ("file", stacked, {"bands": (1, 2, 3)}),
        ):
            config = PredictConfig(model=str(model), probabilities=True, **LOCAL, **options)
            api.predict([source], tmp_path / f"{name}.tif", config)
            with rasterio.open(tmp_path / f"{name}.prob.tif") as src:
                masks[name] = src.read()
        assert np.array_equal(masks["item"], masks["file"])
        assert len(np.unique(masks["item"])) > 100

    def test_by_the_command_and_not_without_leave(self, tmp_path, cli):
        path = sentinel(tmp_path)
        model = identity(tmp_path / "m.onnx", value_range=[0, 9000])
        line = ["predict", path, "--out", tmp_path / "x.tif", "-m", model, "--bands",
                "B04,green,blue"]  # fmt: skip
        done = cli(*line)
        assert (done.code, done.err.count("points to other files")) == (3, 1)
        done = cli(*line, "--allow-remote")  # B04 is no name here, only a file's
        assert (done.code, done.err.count("of the name B04")) == (3, 1)
        line[-1] = "red,green,blue"
        assert cli(*line, "--allow-remote").code == 0
        assert cli(*line, "--allow-remote").code == 0  # done already

    def test_a_file_or_an_item_that_changes_makes_another_input(self, tmp_path):
        path = sentinel(tmp_path)
        before = open_raster(path, asking("red", "nir")).info.fingerprint
        assert open_raster(path, asking("red", "nir")).info.fingerprint == before
        write_tif(tmp_path / "B08.tif", PIXELS[:1], georeferenced=True)
        after = open_raster(path, asking("red", "nir")).info.fingerprint
        path.write_text(path.read_text() + " ")
        assert len({before, after, open_raster(path, asking("red", "nir")).info.fingerprint}) == 3

    def test_items_in_a_mosaic(self, tmp_path):
        for name, cols in (("west", slice(0, 120)), ("east", slice(120, 240))):
            (tmp_path / name).mkdir()
            path = sentinel(tmp_path / name, PIXELS[:, :, cols])
            for code in ("B04", "B08"):
                with rasterio.open(path.with_name(f"{code}.tif"), "r+") as dst:
                    dst.transform = TRANSFORM @ TRANSFORM.translation(cols.start, 0)
        scenes = tuple(str(tmp_path / name / "scene.json") for name in ("west", "east"))
        pixels, valid = whole("", asking("red", "nir", mosaic=scenes))
        assert np.array_equal(pixels, PIXELS[2:])
        assert valid is None

    def test_what_info_says(self, tmp_path, cli):
        path = sentinel(tmp_path)
        found = json.loads(cli("info", path, "--json").out)
        assert (found["kind"], found["id"]) == ("STAC item", "scene")
        assert found["rasters"]["visual"] == ["red", "green", "blue"]
        assert "thumbnail" not in found["rasters"]
        assert "nir-jp2" in cli("info", path).out


class TestElsewhere:
    @pytest.mark.parametrize("name", ["scene.json", "items/scene"])
    def test_an_item_on_a_web_server(self, served, name):
        folder, address, _ = served
        (folder / "items").mkdir()
        here = folder / name
        path = sentinel(here.parent)
        if here != path:
            path.rename(here)
        pixels, _ = whole(f"{address}/{name}", asking("red", "nir"))
        assert np.array_equal(pixels, PIXELS[2:])

    def test_one_that_is_not_there(self, served):
        with pytest.raises(InputError, match="404"):
            open_raster(f"{served[1]}/gone.json", ALLOWED)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"type": "Feature", "stac_version": "1.0.0"}', "[" * 10_000]
    )
    def test_what_is_no_item(self, served, text):
        folder, address, _ = served
        (folder / "scene.json").write_text(text)
        with pytest.raises(InputError, match=r"not a STAC item|no JSON"):
            open_raster(f"{address}/scene.json", ALLOWED)

    def test_an_item_in_a_bucket(self, s3_server, monkeypatch, tmp_path):
        import obstore

        store = connect_empty(s3_server, monkeypatch)
        sentinel(tmp_path)
        for path in tmp_path.iterdir():
            obstore.put(store, f"scenes/{path.name}", path.read_bytes())
        pixels, _ = whole("s3://bucket/scenes/scene.json", asking("red", "nir"))
        assert np.array_equal(pixels, PIXELS[2:])


def test_what_an_item_says_of_a_band():
    odd = {"nodata": "none", "scale": "x", "offset": None}
    found = {"assets": {"a": asset("a.tif", **{"raster:bands": [odd, {"nodata": "nan"}]})}}
    [part] = parts_of(found, "/x/scene.json", View())
    assert part.told[0] == Told()
    assert np.isnan(part.told[1].nodata)
    assert part.href == "/x/a.tif"
