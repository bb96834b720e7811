"""STAC items beside masks: what pystac reads in them, and what they refuse."""

import hashlib
import json
import shutil

import numpy as np
import pystac
import pytest
import rasterio
import zarr
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet import mask_api
from tilenet.classes import default_classes
from tilenet.engine import item
from tilenet.geometry import Georeference
from tilenet.sinks import MaskSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

OPTIONS = ["--tile", 64, "--overlap", 16, "--chunk", 64]


def source(path, *, taken="2024:05:06 07:08:09", **options):
    write_tif(path, picture(150, 201), **options)
    if taken is not None:
        with rasterio.open(path, "r+") as dst:
            dst.update_tags(TIFFTAG_DATETIME=taken)
    return path


@pytest.fixture
def run(cli, models):
    def call(*arguments):
        return cli("predict", *arguments, "--model", models / "conv.onnx", *OPTIONS)

    return call


def read(path):
    """Return the item as pystac reads it, after a look at what its schema demands."""
    document = json.loads(path.read_text())
    assert document["stac_version"] == "1.1.0"
    assert (document["geometry"] is None) == ("bbox" not in document)
    dates = document["properties"]
    assert dates["datetime"] is not None or {"start_datetime", "end_datetime"} <= dates.keys()
    found = pystac.Item.from_file(path)
    assert found.to_dict(include_self_link=False, transform_hrefs=False) == document
    return found


def test_the_item_of_a_cog(run, tmp_path):
    image = source(tmp_path / "a.tif", georeferenced=True)
    done = run(image, "--out", tmp_path / "my mask.tif", "--stac", "--probabilities", "--json")
    assert done.code == 0, done.err
    found = read(tmp_path / "my mask.tif.stac.json")
    assert found.id == "my mask.tif"
    assert found.datetime.isoformat() == "2024-05-06T07:08:09+00:00"
    wanted = transform_bounds(UTM, "EPSG:4326", *rasterio.open(image).bounds, densify_pts=99)
    assert found.bbox == pytest.approx(wanted, abs=1e-6)
    assert found.geometry["type"] == "Polygon"
    [ring] = found.geometry["coordinates"]
    assert ring[0] == ring[-1]
    assert len(ring) == 65
    projection = ProjectionExtension.ext(found)
    assert projection.code == UTM
    assert projection.shape == [150, 201]
    assert projection.transform == list(TRANSFORM)[:6]
    assert "tilenet" in found.properties["processing:software"]

    mask = found.assets["mask"]
    assert mask.href == "./my%20mask.tif"
    assert mask.media_type == pystac.MediaType.COG
    assert mask.roles == ["data"]
    assert mask.extra_fields["nodata"] == 255
    data = (tmp_path / "my mask.tif").read_bytes()
    checksum = FileExtension.ext(mask)
    assert checksum.checksum == "1220" + hashlib.sha256(data).hexdigest()
    assert checksum.size == len(data)
    classes = ClassificationExtension.ext(mask).classes
    assert [c.value for c in classes] == [0, 1, 2, 255]
    assert [c.name for c in classes] == ["class_0", "class_1", "class_2", "no_answer"]
    counts = {c["id"]: c["pixels"] for c in json.loads(done.out)["classes"]}
    assert {c.value: c.to_dict()["count"] for c in classes} == counts | {255: 0}
    assert [c.color_hint for c in classes] == ["000000", "E69F00", "56B4E9", None]

    beside = found.assets["probabilities"]
    assert beside.href == "./my%20mask.prob.tif"
    data = (tmp_path / "my mask.prob.tif").read_bytes()
    assert FileExtension.ext(beside).checksum == "1220" + hashlib.sha256(data).hexdigest()
    assert len(beside.extra_fields["bands"]) == 3


@pytest.mark.parametrize(("name", "media"), [
    ("x.zarr", "application/vnd.zarr; version=2"), ("x.png", "image/png"),
    ("x.ome.tif", "image/tiff"),
])  # fmt: skip
def test_without_a_place_or_a_date(run, tmp_path, name, media):
    done = run(source(tmp_path / "a.tif", taken=None), "--out", tmp_path / name, "--stac")
    assert done.code == 0
    assert done.err.count(f"{name}.stac.json has no geometry") == 1
    assert done.err.count(f"{name}.stac.json has no date") == 1
    found = read(tmp_path / f"{name}.stac.json")
    assert found.geometry is None
    assert found.datetime is None
    assert found.common_metadata.start_datetime.year == 1
    assert found.common_metadata.end_datetime.year == 9999
    assert found.assets["mask"].media_type == media
    assert ("file:checksum" in found.assets["mask"].extra_fields) == (name != "x.zarr")
    assert not ProjectionExtension.has_extension(found)


def test_a_rerun_and_an_export_give_the_same_item(run, cli, tmp_path):
    image = source(tmp_path / "a.tif", georeferenced=True)
    run(image, "--out", tmp_path / "x.tif", "--stac")
    path = tmp_path / "x.tif.stac.json"
    before = path.read_bytes()
    path.unlink()
    assert run(image, "--out", tmp_path / "x.tif").code == 0
    assert not path.exists()
    assert run(image, "--out", tmp_path / "x.tif", "--stac").code == 0
    assert path.read_bytes() == before
    run(image, "--out", tmp_path / "x.zarr")
    (tmp_path / "again").mkdir()
    done = cli("export", tmp_path / "x.zarr", tmp_path / "again/x.tif", "--stac")
    assert done.code == 0, done.err
    assert (tmp_path / "again/x.tif.stac.json").read_bytes() == before


def test_an_item_that_is_there_is_kept_true(run, tmp_path):
    image = source(tmp_path / "a.tif", georeferenced=True)
    run(image, "--out", tmp_path / "x.tif", "--stac")
    before = read(tmp_path / "x.tif.stac.json").assets["mask"].extra_fields["file:checksum"]
    done = run(image, "--out", tmp_path / "x.tif", "--overwrite", "--bands", "3,2,1")
    assert done.code == 0, done.err
    after = read(tmp_path / "x.tif.stac.json").assets["mask"].extra_fields["file:checksum"]
    assert after != before
    assert after[4:] == hashlib.sha256((tmp_path / "x.tif").read_bytes()).hexdigest()


@pytest.mark.parametrize("theirs", ["{}", "theirs", '{"properties": []}'])
def test_an_item_of_somebody_elses_stays(run, tmp_path, theirs):
    image = source(tmp_path / "a.tif", georeferenced=True)
    path = tmp_path / "x.tif.stac.json"
    path.write_text(theirs)
    assert run(image, "--out", tmp_path / "x.tif").code == 0
    done = run(image, "--out", tmp_path / "x.tif", "--stac")
    assert done.code == 5
    assert "not tilenet's" in done.err
    assert path.read_text() == theirs


def test_one_of_many_items_is_refused(run, tmp_path):
    for name in "abc":
        source(tmp_path / f"in/{name}.tif", georeferenced=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.tif.stac.json").write_text("theirs")
    done = run(tmp_path / "in", "--out", tmp_path / "out", "--stac", "--json")
    assert done.code == 7
    found = json.loads(done.out)
    assert [one["input"][-5:] for one in found["failed"]] == ["b.tif"]
    assert len(found["runs"]) == 2
    for name in "ac":
        assert read(tmp_path / f"out/{name}.tif.stac.json").id == f"{name}.tif"


def test_a_label_has_its_item_beside_the_image(run, tmp_path):
    image = tmp_path / "i.zarr"
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    scale = [{"type": "scale", "scale": [1.0, 1.0]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    multiscales = [{"axes": axes, "datasets": datasets}]
    group = zarr.create_group(
        image, attributes={"ome": {"version": "0.5", "multiscales": multiscales}}
    )
    group.create_array("0", shape=(150, 201), dtype="uint8", dimension_names=["y", "x"])
    (tmp_path / "link.zarr").symlink_to(image)
    done = run(source(tmp_path / "a.tif"), "--into", tmp_path / "link.zarr", "--stac")
    assert done.code == 0, done.err
    found = read(tmp_path / "i.zarr.tilenet-tiny.stac.json")
    assert found.assets["mask"].href == "./i.zarr/labels/tilenet-tiny"
    assert found.assets["mask"].media_type == "application/vnd.zarr; version=3"


def test_the_source_may_be_gone_or_no_tiff(run, cli, tmp_path):
    image = source(tmp_path / "a.tif", georeferenced=True)
    run(image, "--out", tmp_path / "x.tif")
    image.unlink()
    mask_api.export(tmp_path / "x.tif", tmp_path / "x.zarr", stac=True)
    assert read(tmp_path / "x.zarr.stac.json").datetime is None
    assert item._taken(str(tmp_path), allow_remote=True) is None
    for text in ("2024:13:01 00:00:00", "yesterday", "0001:01:01 00:00:00"):
        assert item._taken(str(source(tmp_path / "b.tif", taken=text)), allow_remote=False) is None


def footprint(crs, transform, height=100, width=200):
    place = Georeference(crs_wkt=CRS.from_string(crs).to_wkt(), transform=transform)
    return item._footprint(MaskSpec(height, width, default_classes(2), place, 64))


def test_nobody_afar_is_asked(monkeypatch):
    """Whatever a mask says that it was made of."""
    asked = []
    monkeypatch.setattr(item.rasterio, "open", lambda *names, **_: asked.append(names))
    for allow_remote in (False, True):
        for name in ("https://host/a.tif", "/vsicurl/https://host/a.tif"):
            assert item._taken(name, allow_remote=allow_remote) is None
        assert len(asked) == 2 * allow_remote


def test_a_footprint_at_the_antimeridian():
    place = (1000.0, 0, 100_000.0, 0, -1000.0, 7_000_000.0)
    found = footprint("EPSG:32601", place, width=600)
    assert found.geometry["type"] == "MultiPolygon"
    west, south, east, north = found.bbox
    assert 165 < west < 180
    assert -180 < east < -165
    assert 60 < south < north < 64


def spans(found):
    """Return west and east of each part."""
    many = found.geometry["type"] == "MultiPolygon"
    parts = found.geometry["coordinates"] if many else [found.geometry["coordinates"]]
    return [(min(x for x, _ in ring), max(x for x, _ in ring)) for [ring] in parts]


@pytest.mark.parametrize(("west", "width", "parts", "bbox"), [
    (179.5, 100, [(179.5, 180), (-180, -179.5)], [179.5, -179.5]),
    (-180.25, 100, [(179.75, 180), (-180, -179.25)], [179.75, -179.25]),
    (181.0, 100, [(-179, -178)], [-179, -178]),
    (179.0, 100, [(179, 180)], [179, 180]),
    (0.0, 36_000, [(-180, 180)], [-180, 180]),
    (-180.5, 36_100, [(-180, 180)], [-180, 180]),
    (-180 - 1e-9, 36_000, [(-180, 180)], [-180, 180]),
])  # fmt: skip
def test_a_footprint_in_degrees_beyond_180(west, width, parts, bbox):
    found = footprint("EPSG:4326", (0.01, 0, west, 0, -0.01, -17.0), width=width)
    assert np.allclose(spans(found), parts, rtol=0, atol=1e-8)
    assert np.allclose(found.bbox, [bbox[0], -18, bbox[1], -17], rtol=0, atol=1e-8)
    shapely = pytest.importorskip("shapely", reason="shapes take the extra vector")
    shape = shapely.from_geojson(json.dumps(found.geometry))
    assert shape.is_valid
    assert shape.area == pytest.approx(min(width / 100, 360))


def test_a_turned_footprint_in_degrees_beyond_180():
    found = footprint("EPSG:4326", (0.01, 0.005, 179.0, 0.005, -0.01, -17.0))
    shapely = pytest.importorskip("shapely", reason="shapes take the extra vector")
    west, east = shapely.get_parts(shapely.from_geojson(json.dumps(found.geometry)))
    whole = shapely.union(west, shapely.transform(east, lambda points: np.add(points, (360, 0))))
    corners = [(179, -17), (179.5, -18), (181.5, -17), (181, -16)]
    assert whole.symmetric_difference(shapely.Polygon(corners)).area < 1e-9


def test_a_footprint_around_a_pole():
    found = footprint("EPSG:3995", (1e4, 0, -1e6, 0, -1e4, 5e5))
    assert found.bbox[0] == -180
    assert found.bbox[2:] == [180, 90]
    assert 79 < found.bbox[1] < 81


def test_a_footprint_follows_the_curves_of_its_projection():
    found = footprint("EPSG:3035", (10_000.0, 0, 3_321_000.0, 0, -10_000.0, 3_710_000.0))
    upper = [y for x, y in found.geometry["coordinates"][0] if y > 54]
    assert max(upper) - min(upper) > 1  # a straight line of four corners has no such bend
    assert np.ptp([x for x, _ in found.geometry["coordinates"][0]]) < 40


@pytest.mark.parametrize(("crs", "transform"), [
    ("EPSG:32633", (1e9, 0.0, 0.0, 0.0, -1e9, 0.0)),
    ("+proj=ortho +lat_0=0 +lon_0=0", (1e6, 0.0, 9e6, 0.0, -1e6, 9e6)),
])  # fmt: skip
def test_a_place_without_longitude_has_no_footprint(crs, transform):
    assert footprint(crs, transform) is None


def test_a_crs_without_a_code_and_an_affine_without_a_crs():
    crs = CRS.from_string("+proj=laea +lat_0=10 +lon_0=20")
    place = Georeference(crs_wkt=crs.to_wkt(), transform=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    spec = MaskSpec(10, 20, default_classes(2), place, 64)
    keys = item._grid(place, spec)
    assert CRS.from_wkt(keys["proj:wkt2"]) == crs
    assert "proj:code" not in keys
    bare = Georeference(transform=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    assert item._grid(bare, spec)["proj:code"] is None


def test_has_item_takes_anything(tmp_path):
    assert not item.has_item(tmp_path / "x.tif")
    (tmp_path / "x.tif.stac.json").mkdir()
    assert not item.has_item(tmp_path / "x.tif")
    shutil.rmtree(tmp_path / "x.tif.stac.json")
    (tmp_path / "x.tif.stac.json").write_bytes(b"\xff" * 9)
    assert not item.has_item(tmp_path / "x.tif")


def test_an_item_of_somebody_elses_is_seen_before_the_work(run, tmp_path):
    image = source(tmp_path / "a.tif", georeferenced=True)
    beside = tmp_path / "x.tif.stac.json"
    beside.write_text("{}")
    done = run(image, "--out", tmp_path / "x.tif", "--stac")
    assert (done.code, str(beside) in done.err) == (5, True)
    assert not (tmp_path / "x.tif").exists()
