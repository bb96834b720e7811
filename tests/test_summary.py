"""Pixels and area per class: the grid's own, in the JSON, the table and the CSV."""

import csv
import json
import math
from pathlib import Path

import networks
import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasters import picture, write_tif

from tilenet.errors import OutputError
from tilenet.geometry import Georeference
from tilenet.ground import pixel_area
from tilenet.results import ClassPixels, Failure, PredictResult, RunResult
from tilenet.summary import check_csv, lines, write_csv

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

# True area of the cell between two meridians 1° apart and the parallels 0° and 1° on WGS 84, in
# km², from the closed formula of the zone: b² π / 180 · (ln((1 + e s)/(1 − e s))/(2e) + s/(1 − e²
# s²)), s = sin 1°, to be found in any table of the graticule.
ZONE_KM2 = 12308.778361469452


def map_of(epsg, transform):
    return Georeference(crs_wkt=CRS.from_epsg(epsg).to_wkt(), transform=transform)


class TestPixelArea:
    @pytest.mark.parametrize(
        ("place", "unit", "area"),
        [
            (map_of(32633, (10, 0, 5e5, 0, -10, 5e6)), "ha", 0.01),
            (map_of(32633, (8, 6, 5e5, 6, -8, 5e6)), "ha", 0.01),
            (map_of(32633, (10, 0, 5e5, 0, 10, 4e6)), "ha", 0.01),
            # New York's feet: the US survey foot is 1200/3937 m.
            (map_of(2263, (1, 0, 980000, 0, -1, 200000)), "ha", (1200 / 3937) ** 2 / 1e4),
            (Georeference(mpp=(0.5, 0.25)), "mm2", 0.125e-6),
            # Web Mercator at 60° N: cos² 60°, times both radii of curvature there over the axis².
            (
                map_of(3857, (10, 0, 0, 0, -10, 8399737.9)),
                "ha",
                0.01 / 4 * 6383453.857 * 6394209.174 / 6378137**2,
            ),
        ],
    )
    def test_known(self, place, unit, area):
        found = pixel_area(place, 100, 100)
        assert found.unit == unit
        assert found.value == pytest.approx(area, rel=1e-3 if "3857" in str(place) else 1e-12)

    def test_degrees_are_measured_on_the_ellipsoid(self):
        found = pixel_area(map_of(4326, (0.001, 0, 12, 0, -0.001, 1)), 1000, 1000)
        assert found.value * 1e6 * 0.01 == pytest.approx(ZONE_KM2, rel=1e-4)
        across = pixel_area(map_of(4326, (0.001, 0, 179.5, 0, -0.001, 1)), 1000, 1000)
        assert across.value == pytest.approx(found.value)

    @pytest.mark.parametrize(
        "place",
        [
            Georeference(),
            Georeference(transform=(10, 0, 5e5, 0, -10, 5e6)),  # of what?
            Georeference(crs_wkt=CRS.from_epsg(32633).to_wkt()),
            map_of(4326, (0.1, 0, -180, 0, -0.1, 90)),  # a pixel at the pole is none here
        ],
    )
    def test_unknown(self, place):
        assert pixel_area(place, 1800, 3600) is None


def run_of(number, *, area=0.5, unit="ha", nodata=0):
    classes = tuple(
        ClassPixels(k, f"class {k}", 100 * k + number, area, unit if area else None)
        for k in range(2)
    )
    figures = dict.fromkeys(RunResult.__dataclass_fields__, 0)
    figures |= {"classes": classes, "input": f"{number}.tif", "output": f"{number}.zarr"}
    return RunResult(**figures | {"nodata_pixels": nodata, "complete": True})


class TestLines:
    def test_one_mask_has_a_table(self):
        assert lines(PredictResult((run_of(4, nodata=7),))) == [
            "class        pixels    share    area",
            "class 0           4   3.70 %  0.5 ha",
            "class 1         104  96.30 %  0.5 ha",
            "(no answer)       7",
        ]

    def test_few_masks_have_a_line_each(self):
        text = lines(PredictResult((run_of(0), run_of(1))))
        assert text[0] == "0.zarr: class 1 100 px (100.0 %, 0.5 ha)"
        assert text[2:] == [
            "2 masks:", "class    pixels    share  area", "class 0       1   0.50 %  1 ha",
            "class 1     201  99.50 %  1 ha",
        ]  # fmt: skip

    def test_thousands_have_a_sum_only(self):
        text = lines(PredictResult(tuple(map(run_of, range(3000)))))
        assert text[0] == "3000 masks:"
        assert len(text) == 4

    def test_areas_that_cannot_be_added(self):
        for other in (run_of(1, area=None), run_of(1, unit="mm2")):
            assert lines(PredictResult((run_of(1), other)))[-1] == "class 1     202  99.02 %"

    def test_names_from_strangers_and_many_classes(self):
        run = run_of(0)
        many = tuple(ClassPixels(k, f"c\x1b[31m{k}\n", k) for k in range(255))
        one = RunResult(**{k: getattr(run, k) for k in RunResult.__dataclass_fields__}
                        | {"classes": many})  # fmt: skip
        text = lines(PredictResult((one,)))
        assert len(text) == 22
        assert text[1].startswith("c\\x1b[31m235 ")
        assert text[-1] == "(234 smaller classes)"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestCsv:
    def test_failures_have_their_row(self, tmp_path):
        bad = (Failure("1.tif", 7, "half, of it"), Failure("x.tif", 3, "broken; x.tif; look"))
        write_csv(PredictResult((run_of(0), run_of(1)), bad), tmp_path / "new" / "t.csv")
        rows = rows_of(tmp_path / "new" / "t.csv")
        assert [(r["input"], r["class_id"], r["pixels"], r["error"]) for r in rows] == [
            ("0.tif", "0", "0", ""), ("0.tif", "1", "100", ""),
            ("1.tif", "0", "1", "half, of it"), ("1.tif", "1", "101", "half, of it"),
            ("x.tif", "", "", "broken; x.tif; look"),
        ]  # fmt: skip
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.csv"]

    def test_a_table_of_ours_is_replaced_another_is_not(self, tmp_path):
        path = tmp_path / "t.csv"
        write_csv(PredictResult((run_of(0),)), path)
        write_csv(PredictResult((run_of(0), run_of(1))), path)
        assert len(rows_of(path)) == 4
        path.write_text("input,mine\n")
        for what in (lambda: check_csv(path), lambda: write_csv(PredictResult((run_of(0),)), path)):
            with pytest.raises(OutputError, match="not tilenet's"):
                what()
        assert path.read_text() == "input,mine\n"
        with pytest.raises(OutputError):
            check_csv(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pointwise.onnx"
    networks.pointwise(path)
    return path


def test_of_a_run(cli, model, tmp_path):
    """A map and a plain image: counted again with rasterio, and the broken one is listed."""
    source = tmp_path / "in"
    write_tif(source / "map.tif", picture(90, 110), georeferenced=True)
    write_tif(source / "plain.tif", picture(60, 70, seed=1))
    (source / "broken.tif").write_bytes(b"II*\0 nothing")
    table, out = tmp_path / "out" / "table.csv", tmp_path / "out"
    done = cli("predict", source, "--out", out, "--model", model, "--format", "cog", "--csv",
               table, "--json")  # fmt: skip
    assert done.code == 7, done.err
    runs = {Path(run["output"]).stem: run for run in json.loads(done.out)["runs"]}
    rows = rows_of(table)
    for name, run in runs.items():
        with rasterio.open(run["output"]) as src:
            counts = np.bincount(src.read(1).ravel(), minlength=len(run["classes"]))
        mine = [row for row in rows if Path(row["input"]).stem == name]
        for one, row in zip(run["classes"], mine, strict=True):
            assert one["pixels"] == int(row["pixels"]) == counts[one["id"]]
            assert float(row["share"]) == pytest.approx(one["pixels"] / run["pixels"], abs=1e-6)
            if name == "map":
                assert one["area_ha"] == float(row["area"]) == pytest.approx(one["pixels"] / 100)
                assert row["area_unit"] == "ha"
            else:
                assert set(one) == {"id", "name", "pixels"}
                assert row["area"] == row["area_unit"] == ""
    [broken] = [row for row in rows if row["error"]]
    assert Path(broken["input"]).name == "broken.tif"
    assert len(rows) == 1 + sum(len(run["classes"]) for run in runs.values())


def test_a_slide_has_square_millimetres(cli, model, tmp_path):
    path = write_tif(tmp_path / "slide.tif", picture(64, 64))
    with rasterio.open(path, "r+") as dst:
        dst.update_tags(TIFFTAG_IMAGEDESCRIPTION="Aperio Image Library|AppMag = 20|MPP = 0.499")
    done = cli("predict", path, "--out", tmp_path / "m.zarr", "--model", model, "--json")
    for one in json.loads(done.out)["classes"]:
        assert math.isclose(one["area_mm2"], one["pixels"] * 0.499**2 / 1e6, rel_tol=1e-9)
    table = tmp_path / "t.csv"
    again = cli("predict", path, "--out", tmp_path / "m.zarr", "--model", model, "--csv", table)
    assert again.code == 0
    assert again.out == f"{tmp_path / 'm.zarr'}\n"
    assert "share" in again.err
    assert "mm²" in again.err
    assert all(line.startswith("tilenet: ") for line in again.err.splitlines())
    assert rows_of(table)[0]["area_unit"] == "mm2"


def test_a_table_that_is_somebody_elses_stops_the_run_first(cli, model, tmp_path):
    path, table = write_tif(tmp_path / "a.tif", picture(64, 64)), tmp_path / "t.csv"
    table.write_text("mine\n")
    done = cli("predict", path, "--out", tmp_path / "m.tif", "--model", model, "--csv", table)
    assert done.code == 5
    assert not (tmp_path / "m.tif").exists()
