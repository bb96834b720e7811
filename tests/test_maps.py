"""Maps: scale and offset, bands by name, odd georeferences, other grids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  registers `.rio`
import xarray as xr
from networks import identity
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.merge import merge
from rasterio.transform import Affine
from rasterio.warp import Resampling, calculate_default_transform, reproject, transform_bounds
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet import api
from tilenet.config import PredictConfig, load_config
from tilenet.engine.recipe import _portable
from tilenet.errors import InputError, ModelError, OutputError, UsageError
from tilenet.geometry import Window
from tilenet.sources import Grid, View, grid_of, open_raster
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


def write_map(path, pixels, **profile):
    """Write (C, H, W) with any georeference."""
    count, height, width = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"driver": "GTiff", "count": count, "height": height, "width": width}
    with rasterio.open(path, "w", **shape, dtype=pixels.dtype, **profile) as dataset:
        dataset.write(pixels)
    return path


MARS = (
    'GEOGCRS["Mars",DATUM["Mars",ELLIPSOID["Mars",3396190,169.894447,LENGTHUNIT["metre",1]]],'
    'CS[ellipsoidal,2],AXIS["latitude",north],AXIS["longitude",east],'
    'ANGLEUNIT["degree",0.0174532925199433]]'
)
EUROPA = "+proj=eqc +lat_ts=0 +lon_0=180 +R=1560800 +units=m +no_defs"
POINTS = [
    GroundControlPoint(r + 0.015625, c / 3, 12 + c / 9999.7, 48 - r / 9999.7, c / 7)
    for r in (0, 300, 700) for c in (0, 350, 900)
]  # fmt: skip
ODD = {
    "rotated": {"crs": UTM, "transform": Affine(8, 6, 5e5, 6, -8, 5e6)},
    "south-up": {"crs": "EPSG:4326", "transform": Affine(0.5, 0, -180, 0, 0.5, -90)},
    "over the date line": {"crs": "EPSG:4326", "transform": Affine(0.01, 0, 176, 0, -0.01, -12)},
    "UTM over the date line": {"crs": "EPSG:32660", "transform": Affine(10, 0, 8e5, 0, -10, 5e6)},
    "Mars": {"crs": MARS, "transform": Affine(0.01, 0, 30, 0, -0.01, 12)},
    "Europa": {"crs": EUROPA, "transform": Affine(282, 0, -1379262, 0, -282, 630270)},
    "no CRS": {"transform": Affine(100, 0, 3, 0, 100, 4)},
    "oblong pixels": {"crs": UTM, "transform": Affine(121.5, 0, 688258.2, 0, -164.76, 4555766)},
    "points": {"gcps": POINTS, "crs": "EPSG:4326"},
    "RPCs": {
        "rpcs": rasterio.rpc.RPC(
            height_off=100, height_scale=500, lat_off=48, lat_scale=0.1, long_off=12,
            long_scale=0.1, line_off=50, line_scale=50, samp_off=60, samp_scale=60,
            line_num_coeff=[1.0] * 20, line_den_coeff=[0.5] * 20,
            samp_num_coeff=[0.25] * 20, samp_den_coeff=[1.0] * 20,
        )
    },
}  # fmt: skip


UTM_WKT = CRS.from_string(UTM).to_wkt()


def place_of(dataset):
    points = [(p.row, p.col, p.x, p.y, p.z) for p in dataset.gcps[0]]
    found = dataset.rpcs.to_dict() if dataset.rpcs else {}
    rpcs = {key: value for key, value in found.items() if not key.startswith("err")}
    return dataset.crs, tuple(dataset.transform), dataset.shape, points, dataset.gcps[1], rpcs


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("size", [(90, 100), (700, 900)])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_place_is_kept_in_a_cog(models, tmp_path, name, size):
    source = write_map(tmp_path / "a.tif", picture(*size), **ODD[name])
    run(source, tmp_path / "x.tif", models / "constant.onnx", tile=256, overlap=0, chunk=256)
    with rasterio.open(source) as src, rasterio.open(tmp_path / "x.tif") as dst:
        assert place_of(dst) == place_of(src)


# rioxarray 0.22 multiplies affine transforms in a way that affine deprecates.
@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", [name for name in ODD if "transform" in ODD[name]])
def test_an_odd_place_is_kept_in_a_store(models, tmp_path, name):
    source = write_map(tmp_path / "a.tif", picture(90, 100), **ODD[name])
    run(source, tmp_path / "x.zarr", models / "constant.onnx")
    with rasterio.open(source) as src, xr.open_zarr(tmp_path / "x.zarr", decode_coords="all") as d:
        assert d["mask"].rio.crs == src.crs
        assert d["mask"].rio.transform() == src.transform
        if name != "rotated":
            with rasterio.open(f'ZARR:"{tmp_path}/x.zarr":/mask') as dst:
                assert dst.crs == src.crs
                assert dst.transform.almost_equals(src.transform, 1e-9)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", ["points", "RPCs"])
def test_what_has_no_affine_takes_no_resolution_and_no_grid(tmp_path, name):
    source = write_map(tmp_path / "a.tif", picture(90, 100), **ODD[name])
    with pytest.raises(InputError, match=r"no ground resolution.*--resolution out"):
        open_raster(source, View(resolution=10.0))
    grid = Grid(UTM_WKT, tuple(TRANSFORM)[:6], 90, 100)
    with pytest.raises(InputError, match=r"no place in the grid.*gdalwarp"):
        open_raster(source, View(like=grid))


def whole(path, grid=None, **view):
    raster = open_raster(path, View(like=grid, **view))
    height, width = raster.info.height, raster.info.width
    pixels, valid = raster.read(Window(0, 0, height, width), np.zeros(len(raster.info.bands)))
    return pixels, np.ones((height, width), bool) if valid is None else valid


def grid_in(crs, source, factor=1.0):
    """Return a grid in another CRS that covers a raster."""
    with rasterio.open(source) as src:
        transform, width, height = calculate_default_transform(
            src.crs, crs, src.width, src.height, *src.bounds
        )
    transform = transform @ Affine.scale(factor)
    return Grid(CRS.from_user_input(crs).to_wkt(), tuple(transform)[:6],
                int(height / factor), int(width / factor))  # fmt: skip


def by_gdal(source, grid, resampling):
    with rasterio.open(source) as src:
        pixels, place = src.read(), {"src_crs": src.crs, "src_transform": src.transform}
    found = np.zeros((len(pixels), grid.height, grid.width), pixels.dtype)
    inside = np.zeros((grid.height, grid.width), np.uint8)
    place |= {"dst_crs": grid.crs_wkt, "dst_transform": Affine(*grid.transform), "tolerance": 0}
    reproject(pixels, found, resampling=resampling, **place)
    ones = np.ones(pixels.shape[1:], np.uint8)
    reproject(ones, inside, resampling=Resampling.nearest, **place)
    return found, inside == 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("like") / "scene.tif"
    return write_tif(path, picture(300, 400), georeferenced=True)


class TestLike:
    def test_its_own_grid_changes_nothing(self, scene):
        pixels, valid = whole(scene, grid_of(scene))
        assert np.array_equal(pixels, whole(scene)[0])
        assert valid.all()

    def test_whole_pixels_aside(self, scene):
        a, _, c, _, e, f = tuple(TRANSFORM)[:6]
        grid = Grid(UTM_WKT, (a, 0, c - 3 * a, 0, e, f + 5 * e), 320, 380)
        pixels, valid = whole(scene, grid)
        own, inside = whole(scene)[0], np.zeros((320, 380), bool)
        inside[:295, 3:] = True
        assert np.array_equal(valid, inside)
        assert np.array_equal(pixels[:, :295, 3:], own[:, 5:, :377])
        assert not pixels[:, ~inside].any()

    def test_a_turned_and_mirrored_grid(self, scene):
        a, _, c, _, e, f = tuple(TRANSFORM)[:6]
        turned = Grid(UTM_WKT, (0, a, c, e, 0, f), 400, 300)
        assert np.array_equal(whole(scene, turned)[0], whole(scene)[0].transpose(0, 2, 1))
        mirrored = Grid(UTM_WKT, (a, 0, c, 0, -e, f + 300 * e), 300, 400)
        assert np.array_equal(whole(scene, mirrored)[0], whole(scene)[0][:, ::-1])

    @pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:32632", "EPSG:3035"])
    def test_another_crs_is_as_gdal_s_bilinear(self, scene, crs):
        grid = grid_in(crs, scene)
        pixels, valid = whole(scene, grid)
        expected, inside = by_gdal(scene, grid, Resampling.bilinear)
        both = valid & inside
        assert (valid != inside).sum() <= 3
        difference = np.abs(pixels.astype(int) - expected)[:, both]
        assert difference.max() <= 1
        assert difference.mean() < 0.02

    def test_a_coarser_grid_averages(self, scene):
        grid = grid_in("EPSG:3857", scene, factor=5.0)
        pixels, valid = whole(scene, grid)
        expected, inside = by_gdal(scene, grid, Resampling.average)
        inner = valid & inside
        inner[[0, -1]] = inner[:, [0, -1]] = False
        difference = np.abs(pixels.astype(int) - expected)[:, inner]
        nearest, _ = by_gdal(scene, grid, Resampling.nearest)
        assert difference.mean() < 4
        assert difference.mean() < 0.4 * np.abs(nearest.astype(int) - expected)[:, inner].mean()

    @pytest.mark.parametrize("factor", [0.6, 1.0, 3.3])
    def test_windows_do_not_matter(self, scene, factor):
        grid = grid_in("EPSG:3035", scene, factor)
        raster = open_raster(scene, View(like=grid))
        pixels, valid = whole(scene, grid)
        for row, col, side in [(0, 0, 50), (17, 33, 41), (31, 5, 64), (40, 20, 23)]:
            window = Window(row, col, side, side).intersection(
                Window(0, 0, grid.height, grid.width)
            )
            found, kept = raster.read(window, np.zeros(3))
            assert np.array_equal(found, pixels[(slice(None), *window.slices())])
            kept = np.ones(found.shape[1:], bool) if kept is None else kept
            assert np.array_equal(kept, valid[window.slices()])

    def test_nodata_weighs_nothing(self, tmp_path):
        values = np.full((1, 100, 120), 200, np.uint8)
        values[:, :, 60:] = 0
        source = write_tif(tmp_path / "a.tif", values, georeferenced=True, nodata=0)
        pixels, valid = whole(source, grid_in("EPSG:32632", source, 0.7))
        assert set(np.unique(pixels[0][valid])) == {200}
        assert 0.3 < valid.mean() < 0.5

    def test_over_the_date_line(self, tmp_path):
        """A source from 179° to 181° East in a grid of Web Mercator's, on either side of it."""
        values = np.empty((1, 100, 200), np.uint8)
        values[:, :, :100], values[:, :, 100:] = 50, 150
        place = {"crs": "EPSG:4326", "transform": Affine(0.01, 0, 179, 0, -0.01, 10.5)}
        source = write_map(tmp_path / "a.tif", values, **place)
        edge = 20037508.342789244
        web = CRS.from_epsg(3857).to_wkt()
        for corner, value in ((edge - 100_000, 50), (-edge, 150)):
            grid = Grid(web, (1000.0, 0, corner, 0, -1000.0, 1_160_000.0), 80, 100)
            pixels, valid = whole(source, grid)
            assert valid.all()
            # Half a pixel from the middle the two values mix.
            assert np.abs(pixels[0, :, 1:-1].astype(int) - value).max() == 0

    def test_places_far_away_are_no_pixels(self, tmp_path):
        """A grid of the whole world: PROJ has no answer for most of it, and wraps some."""
        place = {"crs": UTM, "transform": Affine(3000, 0, 2e5, 0, -3000, 56e5)}
        source = write_map(tmp_path / "a.tif", picture(200, 200), **place)
        world = Grid(CRS.from_epsg(4326).to_wkt(), (0.05, 0, -180, 0, -0.05, 90), 3600, 7200)
        _, valid = whole(source, world)
        with rasterio.open(source) as src:
            west, south, east, north = transform_bounds(src.crs, "EPSG:4326", *src.bounds)
        rows, cols = np.nonzero(valid)
        x, y = -180 + 0.05 * (cols + 0.5), 90 - 0.05 * (rows + 0.5)
        assert abs(x.min() - west) < 0.1
        assert abs(x.max() - east) < 0.1
        assert abs(y.min() - south) < 0.1
        assert abs(y.max() - north) < 0.1

    def test_the_mask_has_the_grid_whatever_the_blocks(self, scene, models, tmp_path, cli):
        own = grid_in("EPSG:3857", scene)
        like = write_map(
            tmp_path / "like.tif", np.zeros((1, own.height, own.width), np.uint8),
            crs=own.crs_wkt, transform=Affine(*own.transform),
        )  # fmt: skip
        for name, block in (("a", 64), ("b", 192)):
            options = {"like": like, "block": block, "probabilities": True}
            run(scene, tmp_path / f"{name}.tif", models / "pointwise.onnx", **options)
        assert np.array_equal(probabilities(tmp_path / "a.tif"), probabilities(tmp_path / "b.tif"))
        _, valid = whole(scene, own)
        with rasterio.open(tmp_path / "a.tif") as mask, rasterio.open(like) as src:
            assert (mask.crs, mask.transform, mask.shape) == (src.crs, src.transform, src.shape)
            assert np.array_equal(mask.read(1) != 255, valid)

    def test_verify_makes_a_block_again(self, scene, models, tmp_path, cli):
        out = tmp_path / "x.zarr"
        like = write_tif(tmp_path / "like.tif", picture(200, 250), georeferenced=True)
        run(scene, out, models / "pointwise.onnx", like=like, block=64)
        like.unlink()
        chunk = max((out / "mask" / "c").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        data = chunk.read_bytes()
        chunk.write_bytes(data[:-3])
        assert cli("verify", out, "--repair").code == 0
        assert chunk.read_bytes() == data

    def test_a_damaged_native_block_loses_no_more_than_what_it_makes(self, scene, tmp_path):
        path = tmp_path / "bad.tif"
        data = bytearray(scene.read_bytes())
        with rasterio.open(scene) as src:
            offset = int(src.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
        data[offset : offset + 64] = bytes(64)
        path.write_bytes(data)
        grid, damaged = grid_in("EPSG:3857", scene), []
        raster = open_raster(path, View(like=grid))
        _, valid = raster.read(Window(0, 0, grid.height, grid.width), np.zeros(3), damaged)
        lost = whole(scene, grid)[1] & ~valid
        assert 0.5 * 128**2 < lost.sum() < 4 * 128**2
        covered = np.zeros_like(lost)
        for one in damaged:
            covered[one.slices()] = True
        assert not (lost & ~covered).any()

    def test_refusals(self, scene, models, tmp_path, cli):
        model = models / "constant.onnx"
        plain = write_tif(tmp_path / "plain.tif", picture(40, 50))
        with pytest.raises(InputError, match="no CRS and affine"):
            run(scene, tmp_path / "x.tif", model, like=plain)
        with pytest.raises(InputError, match="no georeference, so it has no place"):
            run(plain, tmp_path / "x.tif", model, like=scene)
        far = Grid(UTM_WKT, (10.0, 0, 900000.0, 0, -10.0, 900000.0), 100, 100)
        with pytest.raises(InputError, match="outside the grid"):
            open_raster(scene, View(like=far))
        fine = Grid(UTM_WKT, (0.1, 0, 500100.0, 0, -0.1, 4999900.0), 100, 100)
        with pytest.raises(InputError, match="enlarged 100 times"):
            open_raster(scene, View(like=fine))
        mars = Grid(CRS.from_wkt(MARS).to_wkt(), (0.01, 0, 14, 0, -0.01, 46), 100, 100)
        with pytest.raises(InputError, match="same body"):
            open_raster(scene, View(like=mars))
        flags = ("--like", scene, "--level", "0", "-m", model, "--out", tmp_path / "x.tif")
        done = cli("predict", scene, *flags)
        assert done.code == 2
        assert "--like" in done.err
        with pytest.raises(UsageError):
            load_config(None, {"like": scene, "mpp": 0.5})


class TestMosaic:
    @pytest.fixture
    def folder(self, tmp_path):
        """Four scenes that abut or overlap by 30 pixels, a gap, and nodata in the overlaps."""
        pixels = picture(200, 260)
        pixels[pixels == 0] = 1
        places = {"a": (0, 0, 110, 140), "b": (0, 110, 110, 150), "c": (110, 0, 90, 100),
                  "d": (80, 130, 120, 100)}  # fmt: skip
        for seed, (name, (row, col, height, width)) in enumerate(places.items()):
            own = pixels[:, row : row + height, col : col + width].copy()
            own = np.clip(own.astype(int) + seed, 1, 255).astype(np.uint8)  # tells them apart
            own[:, 95:105, 112:135] = 0
            own[1, 5, 5] = 0
            write_map(tmp_path / "in" / f"{name}.tif", own, crs=UTM, nodata=0,
                      transform=TRANSFORM @ Affine.translation(col, row), tiled=True,
                      blockxsize=64, blockysize=64)  # fmt: skip
        return tmp_path / "in"

    def test_as_the_merged_raster(self, folder, models, tmp_path, cli):
        merged = tmp_path / "merged.tif"
        merge(sorted(folder.glob("*.tif")), dst_path=merged, method="first")
        for name, source, flags in (
            ("one", merged, ()), ("many", folder, ("--mosaic", "--block", "128"))
        ):  # fmt: skip
            out = tmp_path / f"{name}.tif"
            options = ("-m", models / "conv.onnx", "--probabilities", "--chunk", "64",
                       "--precision", "fp32", "--tile", "64")  # fmt: skip
            done = cli("predict", source, "--out", out, *options, *flags, "--json")
            assert done.code == 0, done.err
        assert json.loads(done.out)["blocks"] > 1
        with rasterio.open(tmp_path / "one.tif") as one, rasterio.open(tmp_path / "many.tif") as m:
            assert (m.crs, m.shape) == (one.crs, one.shape)
            assert m.transform.almost_equals(one.transform)
            assert np.array_equal(one.read(), m.read())
            assert (m.read() == 255).any()
        assert np.array_equal(probabilities(tmp_path / "one.tif"),
                              probabilities(tmp_path / "many.tif"))  # fmt: skip

    def test_few_files_are_open_at_a_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tilenet.sources.mosaic._OPEN", 3)
        values = picture(8, 80, bands=1)
        for col in range(0, 80, 8):
            write_map(tmp_path / "in" / f"{col:02}.tif", values[:, :, col : col + 8], crs=UTM,
                      transform=TRANSFORM @ Affine.translation(col, 0))  # fmt: skip
        scenes = tuple(str(path) for path in sorted((tmp_path / "in").iterdir()))
        raster = open_raster(scenes[0], View(mosaic=scenes))
        found, valid = raster.read(Window(0, 0, 8, 80), np.zeros(1))
        assert np.array_equal(found, values)
        assert valid is None
        assert len(raster._idle[0]._rasters) == 3

    def test_verify_makes_a_block_again(self, folder, models, tmp_path, cli):
        out = tmp_path / "x.zarr"
        run([folder], out, models / "pointwise.onnx", mosaic=True, block=64)
        chunk = max((out / "mask" / "c").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        data = chunk.read_bytes()
        chunk.write_bytes(data[:-3])
        assert cli("verify", out, "--repair").code == 0
        assert chunk.read_bytes() == data
        (folder / "d.tif").write_bytes((folder / "c.tif").read_bytes())
        chunk.write_bytes(data[:-3])
        assert cli("verify", out, "--repair").code == 3

    def test_one_that_has_grown_is_not_skipped(self, folder, models, tmp_path):
        scenes, out = sorted(folder.glob("*.tif")), tmp_path / "x.tif"
        run(scenes[:2], out, models / "pointwise.onnx", mosaic=True)
        for inputs, mosaic, skipped in (
            (scenes[:2], True, 1), (scenes, True, 0), (scenes[:1], False, 0), (scenes[:1], True, 0)
        ):  # fmt: skip
            keys = {"mosaic": mosaic, "skip_finished": True}
            if skipped:
                assert run(inputs, out, models / "pointwise.onnx", **keys).skipped
            else:
                with pytest.raises(OutputError, match="made by another run"):
                    run(inputs, out, models / "pointwise.onnx", **keys)

    def test_its_mask_names_no_secrets(self):
        view = View(mosaic=("https://host/a.tif?sig=secret", "b.tif"))
        assert _portable(view)["mosaic"] == ["https://host/a.tif", "b.tif"]

    def test_with_a_grid_of_another_crs(self, folder, tmp_path):
        merged = tmp_path / "merged.tif"
        scenes = tuple(str(path) for path in sorted(folder.glob("*.tif")))
        merge(scenes, dst_path=merged, method="first")
        grid = grid_in("EPSG:3857", merged)
        found, valid = whole(scenes[0], grid, mosaic=scenes)
        expected, inside = whole(merged, grid)
        assert np.array_equal(valid, inside)
        assert np.array_equal(found, expected)

    def test_other_grids_are_refused(self, folder, models, tmp_path):
        cases = {
            "CRS": {"crs": "EPSG:32634", "transform": TRANSFORM},
            "size": {"crs": UTM, "transform": TRANSFORM @ Affine.scale(1.001)},
            "between": {"crs": UTM, "transform": TRANSFORM @ Affine.translation(0.5, 7)},
        }
        for word, place in cases.items():
            write_map(folder / "e.tif", picture(40, 50), **place)
            with pytest.raises(InputError, match=rf"{word}.*e\.tif.*--like"):
                run([folder], tmp_path / "x.tif", models / "conv.onnx", mosaic=True)
        write_map(folder / "e.tif", picture(40, 50, bands=2), crs=UTM, transform=TRANSFORM)
        with pytest.raises(InputError, match=r"2 bands.*e\.tif"):
            run([folder], tmp_path / "x.tif", models / "conv.onnx", mosaic=True)


def test_control_points_without_a_crs_stay(tmp_path):
    points = [GroundControlPoint(0, 0, 5e5, 5e6, 0.0), GroundControlPoint(9, 0, 5e5, 5e6 - 90, 0.0)]
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, gcps=points, crs=CRS()) as file:
        file.write(picture(40, 50))
    model = identity(tmp_path / "m.onnx")
    api.predict([tmp_path / "a.tif"], tmp_path / "mask.tif", PredictConfig(model=str(model)))
    with rasterio.open(tmp_path / "mask.tif") as mask:
        found, crs = mask.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert not crs
