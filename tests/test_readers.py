"""Every output with every reader: what opens what, and finds the right class at the right place.

`readers.toml` is the table; each "no" is measured too, so that the table is corrected when a reader
improves. A new output is a row of OUTPUTS, a new reader a function in `probes.py`.
"""

import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from probes import READERS, Absent, Question, process_qgis, stop_qgis
from rasterio.crs import CRS
from rasterio.transform import Affine

from tilenet.classes import ClassInfo
from tilenet.geometry import Georeference
from tilenet.sinks import MaskSpec, MaskStore, write_geotiff, write_ome_tiff, write_png
from tilenet.sinks.readers import FACTS, MISSES, readers_of
from tilenet.sinks.readers import READERS as RULES

HEIGHT, WIDTH = 101, 139
UTM = CRS.from_epsg(32633)
PLACES = {
    "map": Georeference(crs_wkt=UTM.to_wkt(), transform=(10.0, 0.0, 5e5, 0.0, -10.0, 5e6)),
    "south-up": Georeference(crs_wkt=UTM.to_wkt(), transform=(10.0, 0.0, 5e5, 0.0, 10.0, 4e6)),
    "rotated": Georeference(crs_wkt=UTM.to_wkt(), transform=(8.0, 6.0, 5e5, 6.0, -8.0, 5e6)),
    "slide": Georeference(mpp=(0.5, 0.25)),
    "plain": Georeference(),
}
CLASSES = (
    ClassInfo(0, "background", (10, 20, 30)),
    ClassInfo(1, "tissue", (0, 160, 0)),
    ClassInfo(2, "tumour", (200, 0, 40)),
    ClassInfo(3, "fat", (240, 220, 60)),
)
# Corners of patches of 3 × 3 pixels: which way the patch goes on, and where in the corner pixel is
# asked. A shift by half a pixel is to be seen, in every direction.
PIXELS = ((3, 5), (90, 20), (17, 130), (60, 71))
INWARDS = ((1, 1), (-1, 1), (1, -1), (-1, -1))
SPOTS = ((0.2, 0.3), (0.7, 0.2), (0.3, 0.8), (0.8, 0.7))
FOUND = (2, 1, 3, 2)


@dataclass(frozen=True)
class Output:
    """One form of a mask: how it ends, its Zarr format, where it lies."""

    ending: str
    place: str
    zarr_format: int = 3


OUTPUTS = {
    **{
        f"zarr{version}-{place}": Output(".zarr", place, version)
        for version in (2, 3)
        for place in ("slide", "map", "south-up", "rotated")
    },
    **{f"cog-{place}": Output(".tif", place) for place in ("slide", "map", "south-up", "rotated")},
    "ometiff-slide": Output(".ome.tif", "slide"),
    "png": Output(".png", "plain"),
}


def make_mask():
    """Return background with patches of classes, at no two places alike under flip or turn."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for (row, col), (down, right), number in zip(PIXELS, INWARDS, FOUND, strict=True):
        for k in range(9):
            mask[row + down * (k // 3), col + right * (k % 3)] = number
    mask[40:50, 100:] = 255
    return mask


def write(name, folder):
    """Write one output; return its path."""
    output, mask = OUTPUTS[name], make_mask()
    path = folder / f"{name}{output.ending}"
    spec = MaskSpec(HEIGHT, WIDTH, CLASSES, PLACES[output.place], chunk=64,
                    zarr_format=output.zarr_format, title=name)  # fmt: skip
    if output.ending == ".tif":
        write_geotiff(lambda window: mask[window.slices()], spec, path)
    elif output.ending == ".ome.tif":
        write_ome_tiff(lambda window: mask[window.slices()], spec, path)
    elif output.ending == ".png":
        write_png(mask, spec, path)
    else:
        store = MaskStore(path, spec)
        store.create()
        for step, (array, *_) in enumerate(spec.levels):
            store.write(array, np.ascontiguousarray(mask[:: 2**step, :: 2**step]), 0, 0)
        store.finish({}, {"plan": b"{}"})
    return path


def question(name):
    """Return PIXELS, and the same places in CRS units or µm from the outer corner."""
    place = PLACES[OUTPUTS[name].place]
    if place.transform is not None:
        affine = Affine(*place.transform)
    else:
        affine = Affine.scale(*(place.mpp or (1.0, 1.0))[::-1])
    corners = zip(PIXELS, INWARDS, SPOTS, strict=True)
    places, middles = [], []
    for (row, col), (down, right), (y, x) in corners:
        places.append(affine @ (col + x, row + y))
        middles.append(affine @ (col + right + 0.5, row + down + 0.5))
    return Question(PIXELS, tuple(places), tuple(middles))


def missing(path, name, reader):
    """Return what a reader misses of an output, in the words of `tilenet.sinks.readers`."""
    place = PLACES[OUTPUTS[name].place]
    try:
        with warnings.catch_warnings():
            # What a reader thinks of a file without a place, or of its own dependencies.
            warnings.simplefilter("ignore")
            seen = READERS[reader](path, question(name))
    except (Absent, ModuleNotFoundError):
        raise
    except Exception:  # whatever a reader raises at what it does not know
        return ("opening",)
    off = {
        "classes": seen.by_pixel != FOUND,
        "class ids": not seen.ids,
        "CRS": place.crs_wkt is not None and seen.crs != UTM,
        "place": place.transform is not None and seen.by_place != FOUND,
        "pixel size": place.mpp is not None
        and (seen.by_place != FOUND or seen.mpp not in (None, pytest.approx(place.mpp))),
    }
    return tuple(what for what in MISSES if off.get(what))


TABLE = tomllib.loads(Path(__file__).with_name("readers.toml").read_text())


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Return the path of every output by name."""
    folder = tmp_path_factory.mktemp("masks")
    yield {name: write(name, folder) for name in OUTPUTS}
    stop_qgis()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_reader(masks, name, reader):
    try:
        found = missing(masks[name], name, reader)
    except (Absent, ModuleNotFoundError) as absent:
        pytest.skip(str(absent))
    assert TABLE[name][reader] == ("no: " + ", ".join(found) if found else "yes")


@pytest.mark.parametrize(
    "name",
    [n for n in OUTPUTS if OUTPUTS[n].place in ("map", "south-up")
     and TABLE[n]["QGIS 3.22"] == "yes"],
)  # fmt: skip
def test_qgis_process_finds_the_same_classes(masks, name, tmp_path):
    try:
        assert process_qgis(masks[name], question(name), UTM, tmp_path) == FOUND
    except Absent as absent:
        pytest.skip(str(absent))


def test_the_table_is_whole():
    assert set(TABLE) == set(OUTPUTS)
    assert all(set(row) == set(READERS) for row in TABLE.values())


def test_info_tells_what_the_table_says():
    assert set(RULES) == set(READERS)
    assert set(FACTS) == set(TABLE)
    for name, output in OUTPUTS.items():
        form = name.partition("-")[0]
        told = readers_of(form, PLACES[output.place])
        said = {r: "no: " + ", ".join(m) if m else "yes" for r, m in told.items()}
        assert said == TABLE[name], name


def test_every_output_has_a_reader_of_maps_or_of_slides():
    for name, output in OUTPUTS.items():
        whole = {reader for reader, cell in TABLE[name].items() if cell == "yes"}
        if output.place == "slide":
            assert whole & {"napari", "tifffile"}, name
        elif output.place != "plain":
            assert whole & {"rasterio", "rioxarray"}, name


def test_a_plain_grid_has_nothing_to_miss():
    told = readers_of("zarr2", PLACES["plain"])
    assert told["zarr-cm"] == ()
    assert told["OpenSlide"] == ("opening",)
    assert readers_of("zarr9", PLACES["plain"]) is None


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_opens_a_format_or_does_not(reader):
    """A place does not keep anybody from opening a file: where it seems so, the probe is wrong."""
    for form in ("zarr2", "zarr3", "cog"):
        rows = [row for name, row in TABLE.items() if name.startswith(form)]
        assert len({row[reader] == "no: opening" for row in rows}) == 1
