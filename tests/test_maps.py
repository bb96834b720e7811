"""Maps: scale and offset, bands by name, odd georeferences, other grids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
from networks import identity
from rasters import picture, write_tif

from tilenet import api
from tilenet.config import PredictConfig
from tilenet.errors import InputError, ModelError
from tilenet.geometry import Window
from tilenet.sources import View, open_raster
from tilenet.sources.bands import bands_in_use

LOCAL = {"tile": 64, "overlap": 16, "chunk": 64, "backend": "openvino", "precision": "fp32"}


def run(source, out, model, **options):
    sources = source if isinstance(source, list) else [source]
    config = PredictConfig(**{**LOCAL, "model": str(model), **options})
    return api.predict(sources, out, config)


def probabilities(out):
    with rasterio.open(out.with_suffix(".prob.tif")) as src:
        return src.read()


def edited(path, **properties):
    """Set scales, offsets, descriptions or colorinterp of a file."""
    with rasterio.open(path, "r+") as dataset:
        for name, value in properties.items():
            setattr(dataset, name, value)
    return path


@pytest.fixture
def scaled(tmp_path):
    """Sentinel-2 as its newer baselines store it: 1,000 more than the reflectance means."""
    pixels = picture(90, 100, dtype="uint16", high=9000)
    pixels[:, :20, :30] = 0
    path = write_tif(tmp_path / "scaled.tif", pixels, georeferenced=True, nodata=0)
    return edited(path, scales=(1.0,) * 3, offsets=(-1000.0,) * 3), pixels


class TestScaling:
    def test_without_a_choice_it_is_refused(self, scaled, models, tmp_path, cli):
        path, _ = scaled
        with pytest.raises(InputError, match=r"1 times its stored numbers, plus -1000.*--scaling"):
            open_raster(path)
        out = tmp_path / "x.tif"
        done = cli("predict", path, "--out", out, "-m", models / "identity.onnx")
        assert done.code == 3
        assert done.err.count("tilenet: error:") == 1
        assert not out.exists()

    def test_apply(self, scaled):
        path, pixels = scaled
        raster = open_raster(path, View(scaling="apply"))
        found, valid = raster.read(Window(0, 0, 90, 100), np.full(3, 7.0))
        nodata = (pixels == 0).all(axis=0)
        assert found.dtype == np.float32
        assert np.array_equal(~valid, nodata)
        assert np.array_equal(found[:, valid], pixels[:, valid].astype(np.float32) - 1000)
        assert (found[:, nodata] == 7).all()

    def test_stored(self, scaled):
        path, pixels = scaled
        found, valid = open_raster(path, View(scaling="stored")).read(
            Window(0, 0, 90, 100), np.zeros(3)
        )
        assert found.dtype == np.uint16
        assert np.array_equal(found[:, valid], pixels[:, valid])

    def test_the_choice_is_in_the_identity_and_the_network_sees_it(self, scaled, tmp_path):
        path, pixels = scaled
        model = identity(tmp_path / "m.onnx", value_range=[0, 8000])
        out, stored = tmp_path / "x.tif", tmp_path / "y.tif"
        hashes = {
            run(path, out, model, scaling="apply", probabilities=True).runs[0].plan_hash,
            run(path, stored, model, scaling="stored", probabilities=True).runs[0].plan_hash,
        }
        assert len(hashes) == 2
        kept = (pixels != 0).any(axis=0)
        for name, minus in ((out, 1000), (stored, 0)):
            seen = np.clip(np.rint((pixels.astype(float) - minus) / 8000 * 255), 0, 255)
            assert np.abs(probabilities(name).astype(float) - seen)[:, kept].max() <= 1

    def test_only_the_bands_in_use_count(self, tmp_path):
        path = write_tif(tmp_path / "a.tif", picture(40, 50), georeferenced=True)
        edited(path, scales=(1.0, 2.0, 1.0))
        assert open_raster(path, View(bands=(3, 1))).info.dtype == "uint8"
        with pytest.raises(InputError, match="band 2 means 2 times"):
            open_raster(path)

    def test_verify_makes_a_scaled_block_again(self, scaled, models, tmp_path, cli):
        path, _ = scaled
        out = tmp_path / "x.zarr"
        run(path, out, models / "identity.onnx", scaling="apply")
        chunk = max((out / "mask" / "c").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[:-3])
        assert cli("verify", out, "--repair").code == 0
        assert chunk.read_bytes() == whole


NAMES = {
    "by name": (("nir", "blue", "green", "red"), ("red", "green", "blue"), (4, 3, 2)),
    "any case": (("NIR", "Blue", "Green", "Red"), ("R", "G", "B"), (4, 3, 2)),
    "Sentinel-2": (("B02", "B03", "B04", "B8A", "B08"), ("B4", "B3", "B8"), (3, 2, 5)),
    "Landsat": (("SR_B2", "SR_B3", "SR_B4"), ("B04", "B03", "B02"), (3, 2, 1)),
    "a name and more": (
        ("B8, central wavelength 842 nm", "B4, central wavelength 665 nm"), ("B04", "B08"), (2, 1)
    ),
    "other names": (("x", "y", "z"), ("red", "green", "blue"), (1, 2, 3)),
    "no names": (("", "", ""), ("red", "green", "blue"), (1, 2, 3)),
    "numbers are no names": (("Band 3", "Band 2"), ("Band 2", "Band 3"), (1, 2)),
    "twice": (("red", "red", "green"), ("red", "green"), (1, 2, 3)),
    "one is missing": (("red", "green", "nir"), ("red", "green", "blue"), (1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_bands_by_the_model_s_names(case):
    names, trained, bands = NAMES[case]
    every = tuple(range(1, len(names) + 1))
    assert bands_in_use(None, trained, every, names, "f") == bands


def test_bands_by_their_colours():
    colours = ("blue", "green", "red", "alpha")
    assert bands_in_use(None, ("red", "green"), (1, 2, 3), ("",) * 4, "f", colours) == (3, 2)
    assert bands_in_use(("red", 4), (), (1, 2, 3), ("",) * 4, "f", colours) == (3, 4)
    with pytest.raises(InputError, match=r"the name nir.*names: blue, green, red"):
        bands_in_use(("nir",), (), (1, 2, 3), ("",) * 4, "f", colours)


class TestNamedBands:
    @pytest.fixture
    def model(self, tmp_path):
        return identity(tmp_path / "m" / "named.onnx", bands=["red", "green", "blue"], count=3)

    @pytest.fixture
    def scene(self, tmp_path):
        pixels = picture(90, 100, bands=4)
        path = write_tif(tmp_path / "scene.tif", pixels, georeferenced=True)
        return edited(path, descriptions=("nir", "blue", "green", "red")), pixels

    def test_the_model_s_are_found_and_it_is_said(self, scene, model, tmp_path, cli):
        path, pixels = scene
        out = tmp_path / "x.tif"
        done = cli("predict", path, "--out", out, "-m", model, "--probabilities")
        assert done.code == 0
        assert "by name: 4 (red), 3 (green), 2 (blue)" in done.err
        assert np.array_equal(probabilities(out), pixels[[3, 2, 1]])

    def test_asked_for_by_name(self, scene, model, tmp_path, cli):
        path, pixels = scene
        out = tmp_path / "x.tif"
        flags = ("--bands", "nir,2,red", "--probabilities")
        assert cli("predict", path, "--out", out, "-m", model, *flags).code == 0
        assert np.array_equal(probabilities(out), pixels[[0, 1, 3]])

    def test_another_number_without_the_names(self, model, tmp_path, cli):
        path = write_tif(tmp_path / "a.tif", picture(40, 50, bands=5), georeferenced=True)
        edited(path, descriptions=("a", "b", "c", "d", "e"))
        done = cli("predict", path, "--out", tmp_path / "x.tif", "-m", model)
        assert done.code == 4
        assert "5: a, b, c, d, e" in done.err
        assert "(red, green, blue)" in done.err
        with pytest.raises(ModelError):
            run(path, tmp_path / "x.tif", model)

    def test_as_many_of_other_names_are_taken_and_it_is_said(self, model, tmp_path, cli):
        path = write_tif(tmp_path / "a.tif", picture(40, 50), georeferenced=True)
        edited(path, descriptions=("a", "b", "c"))
        out = tmp_path / "x.tif"
        done = cli("predict", path, "--out", out, "-m", model, "--probabilities")
        assert done.code == 0
        assert "called a, b, c, the model's red, green, blue" in done.err
        assert np.array_equal(probabilities(out), picture(40, 50))

    def test_a_config_file_takes_names(self, scene, model, tmp_path, cli):
        path, pixels = scene
        (tmp_path / "c.toml").write_text('bands = ["nir", 4, 2]\nprobabilities = true\n')
        out = tmp_path / "x.tif"
        flags = ("-m", model, "--config", tmp_path / "c.toml")
        assert cli("predict", path, "--out", out, *flags).code == 0
        assert np.array_equal(probabilities(out), pixels[[0, 3, 1]])
        document = json.loads((tmp_path / "x.tif.tilenet.json").read_text())
        assert document["identity"]["bands"] == [1, 4, 2]
        assert document["recipe"]["view"]["bands"] == ["nir", 4, 2]
