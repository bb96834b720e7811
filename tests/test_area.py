"""Only where it matters: areas of interest, masks, tissue; inside, the same bytes as everywhere."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import stores
import zarr
from pyproj import Transformer
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from rasters import TRANSFORM, UTM, picture, write_image, write_tif

from tilenet import mask_api
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import PLAN, run_folder
from tilenet.errors import InputError, OutputError, UsageError
from tilenet.geometry import Window
from tilenet.sources import Area, View, area_of, cover, open_raster
from tilenet.sources.cover import MaskFile
from tilenet.sources.tissue import find_tissue
from tilenet.training.vectors import Grid, Polygons

geopandas = pytest.importorskip("geopandas", reason="polygons take the extra vector")
from shapely.geometry import Point, Polygon, box, mapping  # noqa: E402 - comes with geopandas

SIZE = (333, 421)
SMALL = {"tile": 64, "overlap": 32, "chunk": 64, "block": 64, "precision": "fp32"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def run(source, out, model, **options):
    config = PredictConfig(model=str(model), **SMALL | options)
    [result] = predict([Path(source)], Path(out), config).runs
    return result


def array(out, name="mask"):
    return np.asarray(zarr.open_group(out, mode="r", use_consolidated=False)[name][...])


def star(row, col, radius, points=9, seed=0):
    """Return the corners of a star in pixels (col, row), none of them whole."""
    rng = np.random.default_rng(seed)
    angles = np.arange(2 * points) * np.pi / points + 0.123
    reach = radius * np.where(np.arange(2 * points) % 2, 0.45, 1) * rng.uniform(0.8, 1, 2 * points)
    return np.stack([col + reach * np.cos(angles), row + reach * np.sin(angles)], axis=1)


def inside(corners, height, width):
    """Return which pixel centres lie in a polygon, by the rays that cross its edges."""
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    hit = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crosses = (y0 > row) != (y1 > row)
        hit ^= crosses & (col < (x1 - x0) * (row - y0) / (y1 - y0 + (y0 == y1)) + x0)
    return hit


def to_ground(corners, transform=TRANSFORM):
    return np.stack(transform @ corners.T, axis=1)


def save(path, shapes, crs=UTM):
    frame = geopandas.GeoDataFrame(geometry=list(shapes), crs=crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


def kept(info, aoi=None, within="none"):
    area = area_of(info, aoi, str(within))
    return area, area.kept(Window(0, 0, info.height, info.width))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    return write_tif(path, picture(*SIZE), georeferenced=True, levels=(2, 4))


@pytest.fixture(scope="module")
def aoi(tmp_path_factory):
    """Return a file with two stars over the scene in degrees, and their pixels."""
    corners = [star(110.3, 90.7, 80), star(260.1, 330.2, 60, seed=1)]
    path = tmp_path_factory.mktemp("aoi") / "aoi.geojson"
    shapes = [Polygon(to_ground(one)) for one in corners]
    frame = geopandas.GeoDataFrame(geometry=shapes, crs=UTM).to_crs(4326)
    frame.to_file(path, COORDINATE_PRECISION=12)
    return path, np.logical_or(*(inside(one, *SIZE) for one in corners))


# -- polygons


def test_an_area_in_degrees_to_the_pixel(scene, aoi):
    path, expected = aoi
    _, found = kept(open_raster(scene).info, path)
    assert np.array_equal(found, expected)
    assert 0.05 < expected.mean() < 0.5


@pytest.mark.parametrize("ending", [".gpkg", ".parquet", ".shp", ".fgb", ".json"])
def test_formats(scene, tmp_path, ending):
    corners = star(150, 200, 90)
    crs = "EPSG:4326" if ending == ".json" else "EPSG:3857"
    frame = geopandas.GeoDataFrame(geometry=[Polygon(to_ground(corners))], crs=UTM).to_crs(crs)
    path = save(tmp_path / f"a{'.geojson' if ending == '.json' else ending}", frame.geometry, crs)
    path = path.rename(path.with_suffix(ending)) if ending == ".json" else path
    _, found = kept(open_raster(scene).info, path)
    assert (found != inside(corners, *SIZE)).sum() <= (2 if ending == ".json" else 0)


def test_a_rotated_raster(tmp_path):
    place = TRANSFORM @ Affine.rotation(31) @ Affine.scale(0.7, 1.3)
    profile = {"driver": "GTiff", "height": 200, "width": 300, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "r.tif", "w", **profile, crs=UTM, transform=place) as dst:
        dst.write(picture(200, 300, bands=1))
    corners = star(90, 140, 85)
    path = save(tmp_path / "a.gpkg", [Polygon(to_ground(corners, place))])
    _, found = kept(open_raster(tmp_path / "r.tif").info, path)
    assert np.array_equal(found, inside(corners, 200, 300))


def test_the_same_pixels_whatever_the_window(scene, aoi):
    area, whole = kept(open_raster(scene).info, aoi[0])
    rng = np.random.default_rng(0)
    for _ in range(30):
        top, left = rng.integers(0, 300, 2)
        window = Window(int(top), int(left), *rng.integers(1, 200, 2).tolist())
        window = window.intersection(Window(0, 0, *SIZE))
        assert np.array_equal(area.kept(window), whole[window.slices()])


def test_a_thousand_polygons_with_holes(tmp_path):
    """Squares of 6 with holes of 2, 8 apart; and an outline of many vertices around the half."""
    info = open_raster(write_tif(tmp_path / "a.tif", picture(240, 360), georeferenced=True)).info
    ring = [to_ground(np.array([[c, r], [c + 6, r], [c + 6, r + 6], [c, r + 6]], float))
            for r in range(0, 240, 8) for c in range(0, 360, 8)]  # fmt: skip
    hole = [to_ground(np.array([[c, r], [c + 2, r], [c + 2, r + 2], [c, r + 2]], float))
            for r in range(2, 242, 8) for c in range(2, 362, 8)]  # fmt: skip
    shapes = [Polygon(a, [b]) for a, b in zip(ring, hole, strict=True)]
    area, found = kept(info, save(tmp_path / "a.gpkg", shapes))
    cell = np.zeros((8, 8), bool)
    cell[:6, :6] = True
    cell[2:4, 2:4] = False
    assert np.array_equal(found, np.tile(cell, (30, 45)))
    assert len(area.outline.packed) < 500_000
    circle = Point(*to_ground(np.array([[180.0, 120.0]]))[0]).buffer(1000, quad_segs=5000)
    _, found = kept(info, save(tmp_path / "b.gpkg", [circle]))
    row, col = np.mgrid[:240, :360] + 0.5
    distance = np.hypot(row - 120, col - 180)
    assert found[distance < 99.99].all()
    assert not found[distance > 100.01].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([box(0, 0, 1, 1)], "elsewhere"),
        ([Point(500100, 4999900)], "no polygons"),
        ("{", "do not read"),
        (None, "no such file"),
    ],
)
def test_areas_that_say_nothing_of_a_map(cli, scene, models, tmp_path, content, message):
    path = tmp_path / "a.geojson"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        save(path, content, 4326 if "elsewhere" in message else UTM)
    line = ["predict", scene, "--out", tmp_path / "x.tif", "--model", models / "constant.onnx"]
    done = cli(*line, "--aoi", path)
    assert done.code == 3
    assert message in done.err
    assert done.err.count("\n") <= 3
    assert not (tmp_path / "x.tif").exists()


def test_areas_that_say_nothing_of_a_plain_image(tmp_path):
    info = open_raster(write_tif(tmp_path / "a.tif", picture(99, 99))).info
    degrees = save(tmp_path / "d.geojson", [box(10, 10, 20, 20)], 4326)
    text = json.loads(degrees.read_text())
    text.pop("crs", None)
    degrees.write_text(json.dumps(text))
    with pytest.raises(InputError, match="degrees"):
        area_of(info, degrees, "none")
    with pytest.raises(InputError, match="no CRS"):
        area_of(info, save(tmp_path / "d.gpkg", [box(10, 10, 20, 20)]), "none")
    placed = open_raster(write_tif(tmp_path / "b.tif", picture(99, 99), georeferenced=True)).info
    with pytest.warns(UserWarning, match="crs"):
        bare = save(tmp_path / "bare.gpkg", [box(10, 10, 20, 20)], None)
    with pytest.raises(InputError, match="no polygons with a CRS"):
        area_of(placed, bare, "none")


@pytest.mark.parametrize("has", ["ground control points only", "rational polynomials"])
def test_a_raster_that_must_be_warped_first(cli, scene, models, tmp_path, has):
    path = write_tif(tmp_path / "a.tif", picture(99, 99))
    with rasterio.open(path, "r+") as dst:
        if "points" in has:
            corners = ((0, 0), (0, 99), (99, 0))
            dst.gcps = [GroundControlPoint(r, c, 15 + c, 45 - r) for r, c in corners], "EPSG:4326"
        else:
            line = ("1 " * 20).strip()
            scalars = {f"{k}_{w}": "1" for k in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")
                       for w in ("OFF", "SCALE")}  # fmt: skip
            series = {f"{k}_{w}_COEFF": line for k in ("LINE", "SAMP") for w in ("NUM", "DEN")}
            dst.update_tags(ns="RPC", ERR_BIAS="0", ERR_RAND="0", **scalars, **series)
    plain = save(tmp_path / "plain.geojson", [box(10, 10, 20, 20)], 4326)
    document = json.loads(plain.read_text())
    document.pop("crs", None)
    plain.write_text(json.dumps(document))
    inside = [box(10, 10, 20, 20)]
    line = ["predict", path, "--out", tmp_path / "x.tif", "--model", models / "constant.onnx"]
    for option in (
        ("--aoi", save(tmp_path / "utm.geojson", inside)),
        ("--aoi", save(tmp_path / "d.gpkg", inside, 4326)),
        ("--aoi", plain),
        ("--within", scene),
    ):
        done = cli(*line, *option)
        assert done.code == 3
        assert has in done.err
        assert "gdalwarp IN OUT" in done.err
    drawn = tmp_path / "drawn.geojson"  # in pixels it can be said
    drawn.write_text(json.dumps([feature([(10, 20), (30, 20), (30, 50), (10, 50)])]))
    _, found = kept(open_raster(path).info, drawn)
    assert found.sum() == 20 * 30


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("shapely", {"aoi": "a.gpkg"}, "vector"),
        ("geopandas", {"aoi": "a.gpkg"}, "vector"),
        ("skimage.morphology", {"within": "auto"}, "slides"),
    ],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, options, extra):
    placed = options.keys() == {"aoi"}
    source = write_tif(tmp_path / "a.tif", picture(99, 99), georeferenced=placed)
    save(tmp_path / "a.gpkg", [box(0, 0, 1, 1)])
    monkeypatch.setitem(sys.modules, module, None)
    aoi = tmp_path / options["aoi"] if placed else None
    with pytest.raises(UsageError, match=rf"pip install 'tilenet\[{extra}\]'"):
        area_of(open_raster(source).info, aoi, options.get("within", "none"))


def test_polygons_are_read_without_a_remark(command, scene, aoi, models, tmp_path):
    """A machine reads these lines; pyogrio's GDAL has remarks on the formats that it lacks."""
    done = command("predict", scene, "--out", tmp_path / "x.zarr", "--aoi", aoi[0],
                   "--model", models / "conv.onnx", "--progress", "json")  # fmt: skip
    assert done.code == 0, done.err
    assert all(json.loads(line)["event"] for line in done.err.splitlines())


OTHER_GDAL = """
import os
from tilenet.strangers import ELSEWHERE, forget_drivers
forget_drivers()
before = dict(os.environ)
import tilenet.sources.polygons, tilenet.sources.tileindex
from tilenet.sources.ogr import ogr
assert dict(os.environ) == before
drivers = set(ogr().list_drivers())
assert "GPKG" in drivers and drivers.isdisjoint(ELSEWHERE), drivers
changed = {key for key, value in os.environ.items() if before.get(key) != value}
assert changed <= {"GDAL_CURL_CA_BUNDLE", "PROJ_CURL_CA_BUNDLE"}, changed  # pyogrio's own
"""


def test_the_other_gdal_reads_nothing_elsewhere_either(environment):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_GDAL], env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# -- QuPath


def feature(corners, kind="annotation"):
    keys = {"objectType": kind} if kind else {}
    return {"type": "Feature", "geometry": mapping(Polygon(corners)), "properties": keys}


@pytest.mark.parametrize("view", [View(), View(level=1), View(mpp=1.5, source_mpp=0.5)])
@pytest.mark.parametrize("plain", [False, True])
def test_what_qupath_writes(tmp_path, view, plain):
    source = write_tif(tmp_path / "a.tif", picture(300, 420), levels=(2, 4))
    corners = star(140, 200, 120)
    features = [feature(corners), feature([(0, 0), (9, 0), (9, 9)], "detection")]
    points = {"type": "Feature", "geometry": mapping(Point(3, 3)), "properties": {}}
    document = {"type": "FeatureCollection", "features": [*features, points]}
    if plain:
        document = [feature(corners, None)]
    (tmp_path / "q.geojson").write_text(json.dumps(document))
    info = open_raster(source, view).info
    _, found = kept(info, tmp_path / "q.geojson")
    factor = 420 / info.width
    assert factor == {None: 3 if view.mpp else 1, 1: 2}[view.level]
    assert np.array_equal(found, inside(corners / factor, info.height, info.width))


# -- runs


@pytest.fixture(scope="module")
def originals(scene, models, tmp_path_factory):
    """Return the unrestricted masks at two resolutions, made once."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    for resolution in (None, 13.0):
        out = folder / f"{resolution}.zarr"
        run(scene, out, models / "positional.onnx", resolution=resolution, probabilities=True)
        made[resolution] = array(out), array(out, "prob")
    return made


def same_inside(out, original, expected):
    """Raise unless a mask is the unrestricted one inside, and 255 beside it."""
    mask, whole = array(out), original[0]
    assert np.array_equal(mask != 255, expected)
    assert np.array_equal(mask[expected], whole[expected])
    if "prob" in zarr.open_group(out, mode="r", use_consolidated=False):
        probabilities = array(out, "prob")
        assert np.array_equal(probabilities[:, expected], original[1][:, expected])
        assert not probabilities[:, ~expected].any()


@pytest.mark.parametrize("block", [64, 192, 448])
def test_restricted_is_unrestricted_inside(scene, aoi, models, originals, tmp_path, block):
    path, expected = aoi
    model = models / "positional.onnx"
    out = tmp_path / "x.zarr"
    result = run(scene, out, model, aoi=path, block=block, probabilities=True)
    same_inside(out, originals[None], expected)
    tiles = [(min(r, 272), min(c, 360)) for r in range(0, 303, 32) for c in range(0, 391, 32)]
    empty = sum(not expected[r : r + 64, c : c + 64].any() for r, c in tiles)
    assert (result.tiles, result.tiles_skipped) == (len(tiles), empty)
    assert empty > 30
    assert result.nodata_pixels == (~expected).sum()


def test_restricted_and_resampled(scene, aoi, models, originals, tmp_path):
    out = tmp_path / "x.zarr"
    run(scene, out, models / "positional.onnx", aoi=aoi[0], resolution=13.0)
    corners = [star(110.3, 90.7, 80) / 1.3, star(260.1, 330.2, 60, seed=1) / 1.3]
    shape = array(out).shape
    assert shape == (256, 324)
    same_inside(out, originals[13.0], np.logical_or(*(inside(one, *shape) for one in corners)))


def test_restricted_by_nodata_polygons_and_a_mask(scene, aoi, models, tmp_path):
    """A pixel is kept if everything keeps it."""
    pixels = picture(*SIZE)
    pixels[:, 100:200] = 7
    source = write_tif(tmp_path / "a.tif", pixels, georeferenced=True, nodata=7)
    half = np.zeros((1, *SIZE), np.uint8)
    half[..., ::2] = 3
    mask = write_tif(tmp_path / "m.tif", half, georeferenced=True)
    out, model = tmp_path / "x.zarr", models / "positional.onnx"
    run(source, out, model, aoi=aoi[0], within=str(mask))
    run(source, tmp_path / "whole.zarr", model)
    whole = array(tmp_path / "whole.zarr")
    same_inside(out, (whole,), aoi[1] & (half[0] != 0) & (whole != 255))


def test_two_processes(command, scene, aoi, models, originals, tmp_path):
    flags = [part for key, value in SMALL.items() for part in (f"--{key}", value)]
    out, model = tmp_path / "x.zarr", models / "positional.onnx"
    line = ["predict", scene, "--out", out, "--model", model, *flags]
    (tmp_path / "run.toml").write_text(f'aoi = "{aoi[0]}"\nwithin = "none"\n')
    more = ["--config", tmp_path / "run.toml", "--scheduler", "processes:2", "--json"]
    done = command(*line, *more, "--block", 192)
    assert done.code == 0, done.err
    same_inside(out, originals[None], aoi[1])
    assert f"area: {100 * aoi[1].mean():.2f} % of the pixels are kept" in done.err
    skipped, tiles = (json.loads(done.out)[key] for key in ("tiles_skipped", "tiles"))
    assert f"{skipped} of {tiles} tiles are skipped" in done.err


def test_resume_after_a_kill_without_the_areas_file(scene, aoi, models, environment, tmp_path):
    """The plan holds the polygons; the run that resumes is asked for the same ones again."""
    source = write_tif(tmp_path / "a.tif", picture(600, 600), georeferenced=True)
    corners = star(300, 300, 290)
    path = save(tmp_path / "a.gpkg", [Polygon(to_ground(corners))])
    model = models / "positional.onnx"
    out = tmp_path / "x.zarr"
    flags = [str(part) for key, value in SMALL.items() for part in (f"--{key}", value)]
    line = [sys.executable, "-m", "tilenet", "predict", str(source), "--out", str(out),
            "--model", str(model), "--aoi", str(path), *flags, "--block", "128"]  # fmt: skip
    with subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL) as process:
        journal, end = run_folder(out) / "journal.jsonl", time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > 4:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    plan = Plan.load((run_folder(out) / PLAN).read_bytes())
    assert isinstance(plan.area, Area)
    result = run(source, out, model, aoi=path)
    assert result.blocks_resumed > 4
    assert result.blocks_resumed < result.blocks
    run(source, tmp_path / "whole.zarr", model, block=640)
    same_inside(out, (array(tmp_path / "whole.zarr"),), inside(corners, 600, 600))


def test_another_area_is_another_run(scene, aoi, models, tmp_path):
    model, out = models / "constant.onnx", tmp_path / "x.zarr"
    path = Path(shutil.copy(aoi[0], tmp_path / "a.geojson"))
    run(scene, out, model, aoi=path)
    moved = Path(shutil.copy(path, tmp_path / "b.geojson"))
    assert run(scene, out, model, aoi=moved).tiles_forwarded == 0  # the same polygons: finished
    save(path, [Polygon(to_ground(star(111, 91, 80)))])
    for other in ({"aoi": path}, {}, {"aoi": moved, "within": str(scene)}):
        with pytest.raises(OutputError, match=r"differs in area\)"):
            run(scene, out, model, **other)


@pytest.mark.parametrize("ending", ["zarr", "tif"])
def test_repair_needs_no_area_file(scene, aoi, models, tmp_path, ending):
    path = Path(shutil.copy(aoi[0], tmp_path / "a.geojson"))
    out = tmp_path / f"x.{ending}"
    run(scene, out, models / "positional.onnx", aoi=path)
    path.unlink()
    good = {p: p.read_bytes() for p in ([out] if out.is_file() else (out / "mask").rglob("*"))
            if p.is_file() and p.name != "zarr.json"}  # fmt: skip
    for one, data in list(good.items())[:3]:
        one.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert mask_api.verify(out, repair=True).ok
    assert all(one.read_bytes() == data for one, data in good.items())


def test_blocks_outside_are_not_read(models, tmp_path):
    """Bytes that cannot be decoded, far outside, are no trouble even to a strict run."""
    source = write_tif(tmp_path / "a.tif", picture(512, 512), georeferenced=True, block=64)
    with rasterio.open(source) as src:
        offset = int(src.get_tag_item("BLOCK_OFFSET_7_7", "TIFF", bidx=1))
    with source.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(64))
    aoi = save(tmp_path / "a.gpkg", [Polygon(to_ground(star(100, 100, 90)))])
    model = models / "constant.onnx"
    with pytest.raises(InputError, match="cannot be read"):
        run(source, tmp_path / "x.zarr", model, strict=True)
    assert run(source, tmp_path / "y.zarr", model, strict=True, aoi=aoi).tiles_skipped > 0
    # Read, but not kept: no answer is missing there.
    near = save(
        tmp_path / "b.gpkg", [box(*to_ground(np.array([[400, 440.0], [440, 400]])).ravel())]
    )
    assert run(source, tmp_path / "z.zarr", model, aoi=near, block=512).invalid == ()


def test_the_estimate_is_what_happens(cli, scene, aoi, models, tmp_path):
    flags = [part for key, value in SMALL.items() for part in (f"--{key}", value)]
    line = ["predict", scene, "--out", tmp_path / "x.zarr", "--model", models / "constant.onnx"]
    done = cli(*line, *flags, "--aoi", aoi[0], "--dry-run", "--json")
    assert done.code == 0, done.err
    guess = json.loads(done.out)["estimate"]
    result = run(scene, tmp_path / "x.zarr", models / "constant.onnx", aoi=aoi[0])
    assert guess["kept_share"] == pytest.approx(aoi[1].mean(), abs=1e-6)
    assert guess["tiles_to_forward"] == result.tiles - result.tiles_skipped
    assert guess["blocks_to_read"] < guess["blocks"]


def test_many_inputs_and_one_area(cli, models, tmp_path):
    """Each has its part of the area; one has none, and fails alone."""
    corners = star(150, 150, 140)
    places = [(0, 0), (0, 150), (150, 150), (0, 900)]
    whole = picture(450, 1100)
    for row, col in places:
        name = tmp_path / "in" / f"{row}_{col}.tif"
        name.parent.mkdir(exist_ok=True)
        profile = {"driver": "GTiff", "height": 150, "width": 150, "count": 3, "dtype": "uint8"}
        place = TRANSFORM @ Affine.translation(col, row)
        with rasterio.open(name, "w", **profile, crs=UTM, transform=place) as dst:
            dst.write(whole[:, row : row + 150, col : col + 150])
    aoi = save(tmp_path / "a.gpkg", [Polygon(to_ground(corners))])
    line = ["predict", tmp_path / "in", "--out", tmp_path / "out", "--aoi", aoi]
    done = cli(*line, "--model", models / "identity.onnx", "--json")
    assert done.code == 7
    report = json.loads(done.out)
    assert [Path(one["input"]).name for one in report["failed"]] == ["0_900.tif"]
    assert report["failed"][0]["code"] == 3
    assert "elsewhere" in done.err
    expected = inside(corners, 450, 1100)
    for row, col in places[:3]:
        with rasterio.open(tmp_path / "out" / f"{row}_{col}.tif") as src:
            mask = src.read(1)
        here = expected[row : row + 150, col : col + 150]
        pixels = whole[:, row : row + 150, col : col + 150]
        assert np.array_equal(mask, np.where(here, pixels.argmax(axis=0), 255))


# -- masks


def test_a_mask_of_the_same_corners(tmp_path):
    info = open_raster(write_tif(tmp_path / "a.tif", picture(333, 421))).info
    rng = np.random.default_rng(0)
    for height, width in ((37, 50), (333, 421), (700, 900)):
        small = (rng.random((height, width)) < 0.5).astype(np.uint8) * 200
        path = write_image(tmp_path / f"{height}.png", small[None])
        area, found = kept(info, within=path)
        rows = ((np.arange(333) + 0.5) * height / 333).astype(int)
        cols = ((np.arange(421) + 0.5) * width / 421).astype(int)
        assert np.array_equal(found, small[rows][:, cols] > 0)
        window = Window(70, 33, 200, 111)
        assert np.array_equal(area.kept(window), found[window.slices()])


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_a_mask_on_the_ground(tmp_path, crs):
    """Each pixel's centre, brought to the mask's CRS, says which pixel of the mask counts."""
    info = open_raster(write_tif(tmp_path / "a.tif", picture(600, 700), georeferenced=True)).info
    row, col = np.mgrid[:600, :700] + 0.5
    x, y = TRANSFORM @ (col, row)
    x, y = Transformer.from_crs(UTM, crs, always_xy=True).transform(x, y)
    step = (x.max() - x.min()) / 90.317
    place = Affine(step, 0, x.min() + 20.2 * step, 0, -step, y.max() - 7.7 * step)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (40, 50)).astype(np.float32)
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 1, "dtype": "float32"}
    with rasterio.open(
        tmp_path / "m.tif", "w", **profile, crs=crs, transform=place, nodata=2
    ) as dst:
        dst.write(values[None])
    area, found = kept(info, within=tmp_path / "m.tif")
    mask_col, mask_row = (np.floor(one).astype(int) for one in ~place @ (x, y))
    on = (mask_row >= 0) & (mask_row < 40) & (mask_col >= 0) & (mask_col < 50)
    expected = np.zeros((600, 700), bool)
    expected[on] = values[mask_row[on], mask_col[on]] == 1
    assert (found != expected).sum() <= (3 if crs != UTM else 0)  # centres upon an edge
    assert 0.05 < found.mean() < 0.2
    window = Window(70, 33, 200, 311)
    assert np.array_equal(area.kept(window), found[window.slices()])


FIJI = ("EPSG:3460", Affine(30, 0, 2_124_000, 0, -30, 3_990_000))
BEYOND = ("EPSG:4326", Affine(1e-4, 0, 179.96, 0, -1e-4, -17))
BEFORE = ("EPSG:4326", Affine(1e-4, 0, -180.04, 0, -1e-4, -17))
DATE_LINE = {"projected": FIJI, "beyond 180": BEYOND, "before -180": BEFORE}


def at_the_date_line(path, name, height=150, width=900):
    """Return a raster there, and the longitude and latitude of its pixels' centres, (h, w) each."""
    crs, place = DATE_LINE[name]
    write_tif(path, picture(height, width, bands=1))
    with rasterio.open(path, "r+") as dst:
        dst.crs, dst.transform = crs, place
    row, col = np.mgrid[:height, :width] + 0.5
    ways = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lon, lat = ways.transform(*(place @ (col, row)))
    lon = (lon + 180) % 360 - 180
    assert (lon > 179).any()
    assert (lon < -179).any()
    return open_raster(path).info, lon, lat


@pytest.mark.parametrize("west", [-180, 0, -179.99, 179.97])
@pytest.mark.parametrize("name", DATE_LINE)
def test_a_mask_in_degrees_at_the_date_line(tmp_path, name, west):
    info, lon, lat = at_the_date_line(tmp_path / "a.tif", name)
    step = 0.0057 if west == 179.97 else 0.01
    height, width = (200, 9) if west == 179.97 else (200, 36_000)
    place = Affine(step, 0, west, 0, -step, -16.2)
    values = (np.random.default_rng(0).random((height, width)) < 0.5).astype(np.uint8)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "m.tif", "w", **profile, crs="EPSG:4326", transform=place, compress="deflate"
    ) as dst:
        dst.write(values[None])
    area, found = kept(info, within=tmp_path / "m.tif")
    col, row = ~place @ ((lon - west) % 360 + west, lat)
    col, row = np.floor(col + 1e-7).astype(int), np.floor(row).astype(int)
    on = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    expected = np.zeros(lon.shape, bool)
    expected[on] = values[row[on], col[on]] == 1
    assert (found != expected).sum() <= 3 * (name == "projected")  # centres upon an edge
    assert 0.05 < found.mean() < 0.6
    window = Window(40, 333, 70, 311)
    assert np.array_equal(area.kept(window), found[window.slices()])


SIDES = {  # of the same area
    "cut as RFC 7946 has it": [(179.963, 180), (-180, -179.9812)],
    "beyond 180": [(179.963, 180.0188)],
    "before -180": [(-180.037, -179.9812)],
    "one part the other way": [(179.963, 180), (180, 180.0188)],
}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", DATE_LINE)
def test_an_area_at_the_date_line(tmp_path, name, sides):
    info, lon, lat = at_the_date_line(tmp_path / "a.tif", name)
    low, high = np.quantile(lat, (0.2, 0.7))
    aoi = save(tmp_path / "a.gpkg", [box(w, low, e, high) for w, e in SIDES[sides]], "EPSG:4326")
    _, found = kept(info, aoi)
    expected = ((lon > 179.963) | (lon < -179.9812)) & (lat > low) & (lat < high)
    # Between its corners a polygon is straight in the raster's CRS, and no parallel.
    assert (found != expected).mean() <= (0.001 if name == "projected" else 0)
    assert 0.1 < found.mean() < 0.6


def test_an_area_in_metres_over_the_date_line_on_a_raster_in_degrees(tmp_path):
    info, lon, lat = at_the_date_line(tmp_path / "a.tif", "beyond 180")
    ways = Transformer.from_crs("EPSG:4326", "EPSG:3460", always_xy=True)
    x, y = ways.transform(lon, lat)
    (west, east), (south, north) = (np.quantile(one, (0.2, 0.8)) for one in (x, y))
    _, found = kept(info, save(tmp_path / "a.gpkg", [box(west, south, east, north)], "EPSG:3460"))
    expected = (x > west) & (x < east) & (y > south) & (y < north)
    assert (found != expected).mean() < 0.01  # its sides are straight in degrees
    assert found.mean() > 0.2
    assert found[:, :300].any()
    assert found[:, 500:].any()


def test_labels_at_the_date_line_keep_their_order(tmp_path):
    info, lon, _ = at_the_date_line(tmp_path / "a.tif", "beyond 180")
    shapes = [
        box(-180, -18, -179.98, -16),
        box(-179.99, -18, -179.97, -16),
        box(179, -18, 180, -16),
    ]
    frame = geopandas.GeoDataFrame({"kind": list("aba")}, geometry=shapes, crs=4326)
    frame.to_file(tmp_path / "a.gpkg")
    grid = Grid.of(info.georeference, info.height, info.width)
    whole = Window(0, 0, info.height, info.width)
    polygons = Polygons(str(tmp_path / "a.gpkg"), None, grid, ("a", "b"), "kind")
    classes, _ = polygons.read(whole)
    first = (lon < -179.99) | (lon > 0)
    assert np.array_equal(classes, np.where(first, 1, np.where(lon < -179.97, 2, 0)))


def test_a_mask_in_degrees_around_a_pole(tmp_path):
    path = write_tif(tmp_path / "a.tif", picture(512, 512, bands=1))
    place = Affine(1e4, 0, -256e4, 0, -1e4, 256e4)
    with rasterio.open(path, "r+") as dst:
        dst.crs, dst.transform = "EPSG:3995", place
    values = np.zeros((1, 40, 360), np.uint8)
    values[:, :, :90] = values[:, :, 270:] = 1  # on the other half of the earth
    profile = {"driver": "GTiff", "height": 40, "width": 360, "count": 1, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "m.tif", "w", **profile, crs="EPSG:4326", transform=Affine(1, 0, -180, 0, -1, 90)
    ) as dst:
        dst.write(values)
    _, found = kept(open_raster(path).info, within=tmp_path / "m.tif")
    row, col = np.mgrid[:512, :512] + 0.5
    lon, _ = Transformer.from_crs("EPSG:3995", "EPSG:4326", always_xy=True).transform(
        *(place @ (col, row))
    )
    far = np.hypot(row - 256, col - 256) > 64
    edge = np.abs(np.abs(lon) - 90) < 2
    assert np.array_equal(found[far & ~edge], (np.abs(lon) > 90)[far & ~edge])


def test_repair_reads_the_mask_again_and_knows_another(models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(*SIZE))
    small = np.zeros((1, 30, 40), np.uint8)
    small[:, 5:20, 5:30] = 1
    within = write_image(tmp_path / "m.png", small)
    out = tmp_path / "x.zarr"
    assert run(source, out, models / "constant.onnx", within=str(within)).tiles_skipped > 0
    before = array(out)
    chunk = next(p for p in (out / "mask").rglob("*") if p.is_file() and p.name.isdigit())
    chunk.write_bytes(b"rot")
    assert mask_api.verify(out, repair=True).ok
    assert np.array_equal(array(out), before)
    chunk.write_bytes(b"rot")
    write_image(within, 1 - small)
    with pytest.raises(InputError, match=r"mask of --within was changed"):
        mask_api.verify(out, repair=True)
    within.unlink()
    with pytest.raises(InputError, match=r"not where it was"):
        mask_api.verify(out, repair=True)


def test_a_mask_with_a_place_for_an_image_without(scene, tmp_path):
    info = open_raster(write_tif(tmp_path / "a.tif", picture(99, 99))).info
    with pytest.raises(InputError, match="the other way round"):
        area_of(info, None, str(scene))


# -- tissue


def slide(height, width, tissue, seed=0):
    """Return a picture of glass, (3, h, w), with stained tissue where `tissue` is."""
    rng = np.random.default_rng(seed)
    glass = np.array([243, 242, 244])[:, None, None] + rng.normal(0, 1.5, (3, height, width))
    stain = np.array([205, 150, 190])[:, None, None] + 120 * (picture(height, width) / 255 - 0.5)
    return np.clip(np.where(tissue, stain, glass), 0, 255).astype(np.uint8)


def ellipse(height, width, row, col, tall, wide):
    r, c = np.mgrid[:height, :width] + 0.5
    return ((r - row) / tall) ** 2 + ((c - col) / wide) ** 2 < 1


def test_a_slide_of_80_percent_glass(cli, models, tmp_path):
    tissue = ellipse(1000, 1500, 450, 550, 240, 400)
    assert 0.19 < tissue.mean() < 0.21
    source = write_tif(tmp_path / "s.tif", slide(1000, 1500, tissue), levels=(4, 16))
    out, model = tmp_path / "x.zarr", models / "positional.onnx"
    result = run(source, out, model, within="auto", block=512, source_mpp=2.0)
    mask = array(out)
    assert (mask[tissue] != 255).all()
    assert 0.7 < result.tiles_skipped / result.tiles < 0.8
    run(source, tmp_path / "whole.zarr", model, block=512, source_mpp=2.0)
    same_inside(out, (array(tmp_path / "whole.zarr"),), mask != 255)
    info = open_raster(source, View(source_mpp=2.0)).info
    area, found = kept(info, within="auto")
    assert area == kept(info, within="auto")[0]
    assert np.array_equal(found, mask != 255)


def test_tissue_of_a_variable_among_others(tmp_path):
    tissue = ellipse(400, 500, 200, 220, 100, 120)
    found = stores.dataset(slide(400, 500, tissue), clouds=(("y", "x"), np.zeros((400, 500), "u1")))
    path = stores.write(tmp_path / "a.zarr", found)
    _, seen = kept(open_raster(path, View(variable="image")).info, within="auto")
    assert seen[tissue].all()
    assert seen.mean() < 0.6


def test_tissue_of_a_slide_that_points_elsewhere(tmp_path):
    tissue = ellipse(400, 500, 200, 220, 100, 120)
    source = write_tif(tmp_path / "a.tif", slide(400, 500, tissue))
    rasterio.shutil.copy(str(source), str(tmp_path / "a.vrt"), driver="VRT")
    _, seen = kept(open_raster(tmp_path / "a.vrt", View(allow_remote=True)).info, within="auto")
    assert np.array_equal(seen, kept(open_raster(source).info, within="auto")[1])


@pytest.mark.parametrize("ending", ["zarr", "tif"])
def test_a_mask_of_ours_says_where(cli, models, tmp_path, ending):
    """Of many blocks, by a cluster's check at the end, and for a repair."""
    source = write_tif(tmp_path / "a.tif", picture(300, 400))
    within, out = tmp_path / f"tissue.{ending}", tmp_path / "x.zarr"
    run(source, within, models / "identity.onnx", block=128)
    kept = array(within) if ending == "zarr" else rasterio.open(within).read(1)
    run(source, out, models / "positional.onnx", block=128, within=str(within))
    assert np.array_equal(array(out) != 255, (kept != 0) & (kept != 255))
    next(path for path in (out / "mask").rglob("0*") if path.is_file()).unlink()
    assert cli("verify", out, "--repair").code == 0
    run(source, tmp_path / f"new.{ending}", models / "constant.onnx", block=128)
    shutil.rmtree(within) if within.is_dir() else within.unlink()
    (tmp_path / f"new.{ending}").rename(within)
    next(path for path in (out / "mask").rglob("0*") if path.is_file()).unlink()
    done = cli("verify", out, "--repair")
    assert (done.code, "mask of --within was changed" in done.err) == (3, True)


@pytest.mark.parametrize("placed", [False, True])
def test_a_mask_that_is_much_finer_is_read_in_parts(tmp_path, monkeypatch, placed):
    """The same pixels count, whatever is read at a time."""
    info = open_raster(write_tif(tmp_path / "a.tif", picture(70, 90), georeferenced=placed)).info
    fine = np.random.default_rng(0).integers(0, 2, (1, 700, 900)).astype("u1")
    mask = write_tif(tmp_path / "m.tif", fine, georeferenced=placed)
    if placed:
        with rasterio.open(mask, "r+") as dst:
            dst.transform = TRANSFORM @ Affine.scale(0.1)
    _, expected = kept(info, within=mask)
    largest, read = [], MaskFile.read
    monkeypatch.setattr(cover, "_MOST_READ", 5000)
    monkeypatch.setattr(MaskFile, "read", lambda s, w: largest.append(w.pixels) or read(s, w))
    assert np.array_equal(kept(info, within=mask)[1], expected)
    assert max(largest) <= 9000
    assert len(largest) > 50


PLAIN = {
    "all tissue": slide(120, 160, np.ones((120, 160), bool)),
    "all glass": slide(120, 160, np.zeros((120, 160), bool)),
    "black": np.zeros((3, 120, 160), np.uint8),
    "white": np.full((3, 120, 160), 255, np.uint8),
    "dark, as fluorescence": picture(120, 160, high=60),
    "grey": np.repeat(picture(120, 160, bands=1), 3, axis=0),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_of_one_kind_is_not_split(name):
    rgb = np.moveaxis(PLAIN[name], 0, -1)
    assert find_tissue(rgb, np.ones(rgb.shape[:2], bool), name) is None


def test_pen_and_black_borders_hide_no_tissue():
    """Pale tissue is found beside saturated ink; what the scanner left black is none."""
    tissue = ellipse(240, 320, 120, 160, 60, 60)
    rgb = np.moveaxis(slide(240, 320, tissue), 0, -1).copy()
    rgb[tissue] = (225, 200, 215)
    rgb[20:60, 20:300] = (10, 40, 230)
    rgb[:, :12] = (6, 0, 3)
    found = find_tissue(rgb, np.ones((240, 320), bool), "")
    assert found[tissue].all()
    assert found[22:58, 25:295].all()
    assert not found[:, :8].any()
    assert found.mean() < 0.5


def test_data_of_a_map(models, tmp_path):
    pixels = picture(1200, 1200)
    data = ellipse(1200, 1200, 400, 400, 300, 300)
    pixels[:, ~data] = 0
    pixels[:, data] |= 1
    source = write_tif(tmp_path / "a.tif", pixels, georeferenced=True, nodata=0, levels=(4,))
    _, found = kept(open_raster(source).info, within="auto")
    assert found[data].all()
    assert found.mean() < 0.3
    bare = write_tif(tmp_path / "b.tif", pixels, georeferenced=True, nodata=0)
    assert area_of(open_raster(bare).info, None, "auto") is None
    out, model = tmp_path / "x.zarr", models / "constant.onnx"
    run(source, out, model, within="auto", block=512)
    assert np.array_equal(array(out) != 255, data)
