"""Sinks: every reader of the table in the README finds the right class at the right place."""

import ctypes
import json
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import rioxarray  # noqa: F401  registers `.rio`
import xarray as xr
import zarr
from PIL import Image
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window as RasterWindow
from rio_cogeo.cogeo import cog_validate

from tilenet import pyramid
from tilenet.classes import ClassInfo
from tilenet.errors import InputError, OutputError, VerifyError
from tilenet.geometry import Georeference, Window
from tilenet.sinks import (
    MaskSpec,
    MaskStore,
    documents,
    open_store,
    warnings_for,
    write_geotiff,
    write_png,
    write_probabilities,
    zarr_format_for,
)
from tilenet.sinks.layout import has_gaps

CLASSES = (
    ClassInfo(0, "back ground", (0, 0, 0)),
    ClassInfo(1, "tissue", (0, 160, 0)),
    ClassInfo(2, "tumor & <more>", (200, 0, 40)),
)
UTM = CRS.from_epsg(32633).to_wkt()
WGS84 = CRS.from_epsg(4326).to_wkt()
PLACES = {
    "utm": Georeference(crs_wkt=UTM, transform=(10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)),
    "wgs84": Georeference(crs_wkt=WGS84, transform=(0.001, 0.0, 12.3, 0.0, -0.002, 48.1)),
    "south_up": Georeference(crs_wkt=UTM, transform=(10.0, 0.0, 500000.0, 0.0, 10.0, 4000000.0)),
    "slide": Georeference(mpp=(0.5, 0.25)),
    "plain": Georeference(),
    "rotated": Georeference(crs_wkt=UTM, transform=(8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.1)),
    "gcps": Georeference(
        gcps=(
            (0.0, 0.0, 12.0, 48.0, 0.0),
            (0.0, 90.5, 12.1, 48.0, 1.5),
            (80.0, 0.0, 12.0, 47.9, 0.0),
            (80.0, 90.0, 12.1, 47.9, 0.0),
        ),
        gcp_crs_wkt=WGS84,
    ),
}
RPCS = {
    "LINE_OFF": "50", "SAMP_OFF": "60", "LAT_OFF": "48", "LONG_OFF": "12", "HEIGHT_OFF": "100",
    "LINE_SCALE": "50", "SAMP_SCALE": "60", "LAT_SCALE": "0.1", "LONG_SCALE": "0.1",
    "HEIGHT_SCALE": "500",
    **{f"{n}_{k}_COEFF": "1 " + "0.5 " * 18 + "0.25"
       for n in ("LINE", "SAMP") for k in ("NUM", "DEN")},
}  # fmt: skip
NAMES = sorted(PLACES)
HEIGHT, WIDTH, CHUNK = 101, 139, 32


def make_mask(height=HEIGHT, width=WIDTH):
    """Return classes that betray any flip, shift or transposition; nodata at the lower right."""
    rows, cols = np.indices((height, width))
    mask = ((rows // 7 + cols // 5) % 3).astype(np.uint8)
    mask[height // 2 :, width // 2 :] = 255
    if height > 3 and width > 5:
        mask[3, 5] = 2
    return mask


def halve(mask):
    """Return every second pixel: what a level holds does not matter here, its place does."""
    return mask[::2, ::2]


def make_spec(name, zarr_format=None, **changes):
    place = PLACES[name]
    values = {
        "height": HEIGHT, "width": WIDTH, "classes": CLASSES, "georeference": place,
        "chunk": CHUNK, "zarr_format": zarr_format or zarr_format_for(place), "title": name,
    }  # fmt: skip
    return MaskSpec(**{**values, **changes})


def make_store(root, spec):
    store = MaskStore(root, spec)
    store.create()
    mask = make_mask(spec.height, spec.width)
    for path, *_ in spec.levels:
        store.write(path, mask, 0, 0)
        mask = halve(mask)
    if spec.channels:
        store.write("prob", make_probabilities(spec), 0, 0)
    return store


def make_probabilities(spec):
    shape = (len(spec.channels), spec.height, spec.width)
    return (np.indices(shape).sum(0) % 256).astype(np.uint8)


def finish(store):
    values, counts = np.unique(make_mask(), return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    store.finish({k: n for k, n in pixels.items() if k != 255}, {"plan": b"{}", "journal": b""})


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def open_zarr(root):
    return xr.open_zarr(root, decode_coords="all")


def quiet_open(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path)


@pytest.fixture(
    scope="module",
    params=[(n, f) for n in NAMES for f in (2, 3)],
    ids=lambda p: f"{p[0]}-v{p[1]}",
)
def finished(request, tmp_path_factory):
    """Return a complete store, which the tests only read."""
    name, zarr_format = request.param
    store = make_store(tmp_path_factory.mktemp(name) / "mask.zarr", make_spec(name, zarr_format))
    finish(store)
    return store


class TestSpec:
    def test_levels_halve_until_one_chunk(self):
        levels = make_spec("plain").levels
        assert levels == [
            ("mask", 1, 101, 139),
            ("ovr_2x/mask", 2, 51, 70),
            ("ovr_4x/mask", 4, 26, 35),
            ("ovr_8x/mask", 8, 13, 18),
        ]
        assert make_spec("plain", height=1, width=1).levels == [("mask", 1, 1, 1)]

    @pytest.mark.parametrize("name", NAMES)
    def test_survives_json_and_pickle(self, name, tmp_path):
        spec = make_spec(name, channels=("a", "b"))
        assert pickle.loads(pickle.dumps(spec)) == spec
        MaskStore(tmp_path / "m", spec).create()
        assert open_store(tmp_path / "m").spec == spec

    def test_formats(self):
        formats = {n: zarr_format_for(p) for n, p in PLACES.items()}
        assert {n for n, f in formats.items() if f == 2} == {"slide", "plain"}


class TestReaders:
    def test_xarray_finds_classes_and_coordinates(self, finished):
        place, zarr_format = finished.spec.georeference, finished.spec.zarr_format
        expected = make_mask()
        with open_zarr(finished.root) as data:
            mask = data["mask"]
            assert mask.dims == ("y", "x")
            # xarray masks a format-2 fill value; format 3 keeps the integers.
            assert mask.dtype == (np.uint8 if zarr_format == 3 else np.float32)
            values = mask.fillna(255).astype(np.uint8).to_numpy()
            np.testing.assert_array_equal(values, expected)
            assert mask.attrs["flag_meanings"] == "back_ground tissue tumor_&_<more>"
            if place.transform is not None and not place.is_rotated:
                a, _, c, _, e, f = place.transform
            elif place.mpp is not None:
                (e, a), c, f = place.mpp, 0.0, 0.0
            else:
                assert "x" not in data.coords
                return
            found = mask.sel(x=c + a * 5.5, y=f + e * 3.5, method="nearest", tolerance=abs(a) / 9)
            assert int(found) == 2 == expected[3, 5]
            assert "units" in data["x"].attrs

    def test_levels_lie_over_each_other(self, finished):
        place = finished.spec.georeference
        with (
            open_zarr(finished.root) as fine,
            xr.open_zarr(finished.root, group="ovr_2x") as coarse,
        ):
            assert coarse["mask"].shape == (51, 70)
            if place.mpp is None and (place.transform is None or place.is_rotated):
                assert "x" not in coarse.coords
                return
            np.testing.assert_allclose(
                coarse["x"][:69], fine["x"][:138].to_numpy().reshape(-1, 2).mean(1)
            )

    @pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
    def test_rioxarray(self, finished):
        place = finished.spec.georeference
        with open_zarr(finished.root) as data:
            mask = data["mask"]
            if place.crs_wkt is None:
                assert mask.rio.crs is None
                return
            assert mask.rio.crs == CRS.from_wkt(place.crs_wkt)
            assert tuple(mask.rio.transform())[:6] == place.transform

    def test_gdal(self, finished):
        place = finished.spec.georeference
        with quiet_open(f'ZARR:"{finished.root}":/mask') as src:
            np.testing.assert_array_equal(src.read(1), make_mask())
            assert src.nodata == 255
            if place.crs_wkt is not None:
                assert src.crs == CRS.from_wkt(place.crs_wkt)
            if place.transform is not None and not place.is_rotated:
                assert src.transform.almost_equals(place.transform, 1e-9)
                x, y = src.xy(3, 5)
                assert next(src.sample([(x, y)])) == [2]

    def test_ome_zarr_reader(self, finished):
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        node = next(iter(Reader(parse_url(str(finished.root)))()))
        assert [level.shape for level in node.data] == [(h, w) for *_, h, w in finished.spec.levels]
        np.testing.assert_array_equal(np.asarray(node.data[0]), make_mask())
        assert node.metadata["color"][1] == pytest.approx([0, 160 / 255, 0, 1])

    def test_ome_models(self, finished):
        from ome_zarr_models import open_ome_zarr

        with warnings.catch_warnings():
            # pydantic-zarr's own use of zarr; the model is what counts.
            warnings.simplefilter("ignore")
            group = zarr.open_group(finished.root, mode="r", use_consolidated=False)
            model = open_ome_zarr(group)
        assert type(model).__name__ == "ImageLabel"
        attributes = model.attributes if finished.spec.zarr_format == 2 else model.ome_attributes
        axes = attributes.multiscales[0].axes
        assert [axis.name for axis in axes] == ["y", "x"]

    def test_conventions(self, finished):
        import zarr_cm

        root = zarr.open_group(finished.root, mode="r")
        attributes = root.attrs.asdict()
        zarr_cm.validate_all(attributes)
        geo = finished.spec.zarr_format == 3 and finished.spec.georeference.transform is not None
        assert ("spatial:transform" in attributes) == geo
        if geo:
            assert set(zarr_cm.detect_revisions(attributes)) == {"proj", "spatial", "multiscales"}
            zarr_cm.validate_all(root["ovr_4x/mask"].attrs.asdict())

    def test_ome_scale_and_unit(self, tmp_path):
        store = make_store(tmp_path / "m", make_spec("slide"))
        scale = zarr.open_group(store.root).attrs["multiscales"][0]
        assert [axis["unit"] for axis in scale["axes"]] == ["micrometer", "micrometer"]
        assert scale["datasets"][2]["coordinateTransformations"] == [
            {"type": "scale", "scale": [2.0, 1.0]},
            {"type": "translation", "translation": [0.75, 0.375]},
        ]

    def test_exact_place_is_kept_where_no_reader_looks(self, tmp_path):
        place = PLACES["gcps"]
        rpc = Georeference(gcps=place.gcps, gcp_crs_wkt=WGS84, rpcs=(("LINE_OFF", "50"),))
        spec = make_spec("gcps", georeference=rpc)
        attributes = zarr.open_array(make_store(tmp_path / "m", spec).root / "mask").attrs
        points = [tuple(p.values()) for p in attributes["tilenet_gcps"]["points"]]
        assert tuple(points) == place.gcps
        assert attributes["tilenet_rpcs"] == {"LINE_OFF": "50"}
        assert len(warnings_for(spec)) == 2
        assert len(warnings_for(make_spec("rotated"))) == 1
        assert all(not warnings_for(make_spec(n)) for n in ("utm", "wgs84", "slide", "plain"))

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_probabilities(self, tmp_path, zarr_format):
        spec = make_spec("utm", zarr_format, channels=("tissue", "tumor"))
        store = make_store(tmp_path / "m", spec)
        finish(store)
        with open_zarr(store.root) as data:
            prob = data["prob"]
            assert prob.dims == ("class", "y", "x")
            np.testing.assert_allclose(prob, make_probabilities(spec) / 255, atol=1e-7)
            assert data["class"].dtype.kind == "i"
            assert data["class"].attrs["names"] == ["tissue", "tumor"]
            assert float(prob.sel({"class": 1, "x": 500055, "y": 4999965})) == pytest.approx(
                9 / 255
            )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_chunk_is_left_out_only_where_its_value_is_stated(tmp_path, zarr_format):
    """Of chunks that are not there and have no fill value, readers may make what they like."""
    spec = make_spec("plain", zarr_format, channels=("a",))
    store = MaskStore(tmp_path / "m", spec)
    store.create()
    store.write("mask", np.full((HEIGHT, WIDTH), 255, np.uint8), 0, 0)
    store.write("prob", np.zeros((1, HEIGHT, WIDTH), np.uint8), 0, 0)
    for name, layout in spec.layouts.items():
        array = zarr.open_array(store.root / name, mode="r", zarr_format=zarr_format)
        stored = [path for path in (store.root / name).rglob("[0-9]*") if path.is_file()]
        stated = zarr_format == 3 or name != "prob"
        assert (array.metadata.fill_value is not None) == stated
        chunks = -(-layout.shape[-1] // CHUNK) * -(-layout.shape[-2] // CHUNK)
        assert len(stored) == (0 if stated else chunks)


@pytest.mark.parametrize("zarr_format", [2, 3])
class TestStore:
    def test_reads_what_was_written(self, tmp_path, zarr_format):
        store = make_store(tmp_path / "m", make_spec("utm", zarr_format, channels=("a", "b")))
        window = Window(30, 60, 40, 79)
        np.testing.assert_array_equal(store.read("mask", window), make_mask()[window.slices()])
        expected = make_probabilities(store.spec)[(..., *window.slices())]
        np.testing.assert_array_equal(store.read("prob", window), expected)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (33, 31), (64, 64)])
    def test_odd_sizes(self, tmp_path, zarr_format, height, width):
        store = make_store(
            tmp_path / "m", make_spec("plain", zarr_format, height=height, width=width)
        )
        expected = make_mask(height, width)
        for path, _, h, w in store.spec.levels:
            np.testing.assert_array_equal(store.read(path, Window(0, 0, h, w)), expected)
            expected = halve(expected)

    def test_chunks_are_the_files(self, tmp_path, zarr_format):
        import hashlib

        spec = make_spec("plain", zarr_format)
        store = MaskStore(tmp_path / "m", spec)
        store.create()
        before = set(tree(store.root))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:32, 32:64] = 255
        chunks = store.write("mask", mask, 0, 0)
        files = tree(store.root)
        assert len(chunks) == 20
        # Background has files, "no answer" has none.
        assert [c.path for c in chunks if c.sha256 is None] == [
            "mask/0/1" if zarr_format == 2 else "mask/c/0/1"
        ]
        written = {c.path: (c.sha256, c.size) for c in chunks if c.sha256}
        assert written == {
            p: (hashlib.sha256(b).hexdigest(), len(b))
            for p, b in files.items() if p not in before
        }  # fmt: skip
        assert [c.path for c in store.write("mask", mask[32:64, 32:64], 32, 32)] == [chunks[6].path]

    def test_stale_chunk_goes(self, tmp_path, zarr_format):
        store = make_store(tmp_path / "m", make_spec("plain", zarr_format))
        (chunk,) = store.write("mask", np.full((32, 32), 255, np.uint8), 0, 0)
        assert chunk.sha256 is None
        assert not (store.root / chunk.path).exists()
        assert (store.read("mask", Window(0, 0, 32, 32)) == 255).all()

    def test_same_bytes_as_zarr(self, tmp_path, zarr_format):
        """Our encoder must be the codec that the metadata names, byte for byte."""
        store = make_store(tmp_path / "m", make_spec("plain", zarr_format))
        ours = {p: b for p, b in tree(store.root).items() if p.startswith("mask/")}
        array = zarr.open_array(
            store.root / "mask", mode="r+", config={"write_empty_chunks": False}
        )
        array[...] = make_mask()
        theirs = {p: b for p, b in tree(store.root).items() if p.startswith("mask/")}
        assert theirs == ours

    @pytest.mark.parametrize("offset", [0.2, 0.5, 0.99])
    def test_damage_is_noticed(self, tmp_path, zarr_format, offset):
        store = MaskStore(tmp_path / "m", make_spec("plain", zarr_format))
        store.create()
        noise = np.random.default_rng(0).integers(0, 3, (32, 32), np.uint8)
        (chunk,) = store.write("mask", noise, 0, 0)
        file = store.root / chunk.path
        data = bytearray(file.read_bytes())
        data[int(len(data) * offset)] ^= 1
        file.write_bytes(data)
        with pytest.raises(Exception, match=r"(?i)zstd|zlib|check|decompress"):
            zarr.open_array(store.root / "mask", mode="r")[:32, :32]
        with pytest.raises(VerifyError, match="cannot be decoded"):
            store.read("mask", Window(0, 0, 32, 32))

    def test_threads_and_order_make_no_difference(self, tmp_path, zarr_format):
        spec, mask = make_spec("utm", zarr_format), make_mask()
        one = make_store(tmp_path / "one", spec)
        two = MaskStore(tmp_path / "two", spec)
        two.create()
        jobs = []
        for path, *_ in spec.levels:
            height, width = mask.shape
            jobs += [
                (path, mask[r : r + 32, c : c + 32], r, c)
                for r in range(0, height, 32)
                for c in range(0, width, 32)
            ]
            mask = halve(mask)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda job: two.write(*job), reversed(jobs)))
        finish(one)
        finish(two)
        assert tree(one.root) == tree(two.root)

    def test_finish_twice_gives_the_same_bytes(self, tmp_path, zarr_format):
        store = make_store(tmp_path / "m", make_spec("utm", zarr_format))
        finish(store)
        before = tree(store.root)
        (store.root / "mask" / ".0.abcd.tmp").write_bytes(b"left by a kill")
        (store.root / "zarr.0123.partial").write_bytes(b"")
        finish(store)
        assert tree(store.root) == before
        assert documents(store.root) == {"plan": b"{}", "journal": b""}
        attributes = zarr.open_group(store.root, mode="r").attrs
        label = (attributes if zarr_format == 2 else attributes["ome"])["image-label"]
        assert label["properties"][1] == {
            "label-value": 1,
            "class": "tissue",
            "area (pixels)": int((make_mask() == 1).sum()),
        }
        assert attributes["tilenet"]["complete"] is True

    def test_a_document_that_claims_gigabytes_is_damaged(self, tmp_path, zarr_format):
        store = make_store(tmp_path / "m", make_spec("utm", zarr_format))
        finish(store)
        name = "zarr.json" if zarr_format == 3 else ".zarray"
        metadata = store.root / "tilenet/plan" / name
        document = json.loads(metadata.read_text()) | {"shape": [1 << 31]}
        metadata.write_text(json.dumps(document))
        with pytest.raises(VerifyError, match="2147483648 bytes of"):
            documents(store.root)

    def test_create_refuses_what_exists(self, tmp_path, zarr_format):
        store = make_store(tmp_path / "m", make_spec("plain", zarr_format))
        with pytest.raises(OutputError):
            store.create()
        assert [p.name for p in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize(
        "at", [(16, 0, 32, 32), (0, 0, 31, 32), (0, 128, 32, 12), (0, 0, 0, 32)]
    )
    def test_partial_chunks_are_refused(self, tmp_path, zarr_format, at):
        row, col, height, width = at
        store = MaskStore(tmp_path / "m", make_spec("plain", zarr_format))
        with pytest.raises(ValueError, match="whole chunks"):
            store.write("mask", np.zeros((height, width), np.uint8), row, col)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_finish_mends_what_an_earlier_run_left(tmp_path, zarr_format):
    one, two = (
        make_store(tmp_path / name, make_spec("plain", zarr_format)) for name in ("one", "two")
    )
    finish(one)
    metadata = sorted(p for p in (tmp_path / "two" / "mask").iterdir() if p.is_file())
    metadata[0].unlink()
    (tmp_path / "two" / "tilenet").mkdir()
    stale = ".zgroup" if zarr_format == 2 else "zarr.json"
    (tmp_path / "two" / "tilenet" / stale).write_text("{}")
    finish(two)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


class TestForeign:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError):
            open_store(tmp_path / "none")

    def test_a_folder(self, tmp_path):
        with pytest.raises(InputError):
            open_store(tmp_path)

    def test_a_store_of_others(self, tmp_path):
        zarr.create_group(tmp_path / "g")
        with pytest.raises(InputError):
            documents(tmp_path / "g")

    def test_a_broken_spec(self, tmp_path):
        zarr.create_group(tmp_path / "g", attributes={"tilenet": {"schema": 1, "spec": {}}})
        with pytest.raises(InputError):
            open_store(tmp_path / "g")


def read_from(values):
    return lambda window: values[(..., *window.slices())]


@pytest.mark.parametrize("side", [None, 2200], ids=["memory", "disk"])
@pytest.mark.parametrize("name", NAMES)
class TestGeotiff:
    def test_is_a_cog_with_everything(self, tmp_path, name, side):
        spec = make_spec(name, height=side or HEIGHT, width=side or WIDTH)
        mask, out = make_mask(spec.height, spec.width), tmp_path / "mask.tif"
        result = write_geotiff(read_from(mask), spec, out)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.tif", "mask.tif.aux.xml"]
        assert result["size"] == out.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            assert cog_validate(out) == (True, [], [])
        place = spec.georeference
        with quiet_open(out) as src:
            np.testing.assert_array_equal(src.read(1), mask)
            assert src.nodata == 255
            assert src.descriptions == ("class",)
            assert src.colormap(1)[2][:3] == (200, 0, 40)
            assert src.tags(1)["CLASS_2"] == "tumor & <more>"
            assert src.tags()["TIFFTAG_SOFTWARE"].startswith("tilenet ")
            assert src.overviews(1) == ([2, 4, 8] if side else [])
            points = tuple((p.row, p.col, p.x, p.y, p.z) for p in src.gcps[0])
            if place.crs_wkt is not None:
                assert src.crs == CRS.from_wkt(place.crs_wkt)
                assert tuple(src.transform)[:6] == place.transform
                assert next(src.sample([src.xy(3, 5)])) == [2]
            elif place.gcps:
                assert (points, src.gcps[1]) == (place.gcps, CRS.from_wkt(WGS84))
            else:
                assert src.transform.is_identity
            if name == "slide":
                assert float(src.tags()["TIFFTAG_XRESOLUTION"]) == 40000
                assert float(src.tags()["TIFFTAG_YRESOLUTION"]) == 20000
                assert src.tags()["TIFFTAG_RESOLUTIONUNIT"].startswith("3")

    def test_same_bytes_again(self, tmp_path, name, side):
        spec = make_spec(name, height=side or HEIGHT, width=side or WIDTH)
        mask, out = make_mask(spec.height, spec.width), tmp_path / "mask.tif"
        first = write_geotiff(read_from(mask), spec, out)
        assert write_geotiff(read_from(mask), spec, out) == first


def gdal_info(path):
    """Return category names and attribute table as the GDAL in rasterio's wheel reads them."""
    folder = Path(rasterio.__file__).parents[1] / "rasterio.libs"
    libraries = sorted(folder.glob("libgdal*.so*"))
    if not libraries:
        pytest.skip("GDAL's library is elsewhere on this platform")
    gdal = ctypes.CDLL(str(libraries[0]))
    void, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p

    def call(name, result, *arguments):
        function = getattr(gdal, name)
        function.restype = result
        return function(*arguments)

    with rasterio.Env():
        dataset = void(call("GDALOpen", void, text(os.fsencode(path)), integer(0)))
        # Like gdalinfo: the sidecar is not loaded before somebody asks for the georeference.
        call("GDALGetProjectionRef", text, dataset)
        band = void(call("GDALGetRasterBand", void, dataset, integer(1)))
        names = call("GDALGetRasterCategoryNames", ctypes.POINTER(text), band)
        table = void(call("GDALGetDefaultRAT", void, band))
        rows, columns = (
            call(f"GDALRATGet{what}Count", integer, table) for what in ("Row", "Column")
        )
        cells = [
            [
                call("GDALRATGetValueAsString", text, table, integer(r), integer(c)).decode()
                for c in range(columns)
            ]
            for r in range(rows)
        ]
        categories = [names[k].decode() for k in range(len(CLASSES))]
        call("GDALClose", None, dataset)
    return {"categories": categories, "rat": cells}


class TestGeotiffFaults:
    def test_gdal_reads_the_names(self, tmp_path):
        out = tmp_path / "mask.tif"
        write_geotiff(read_from(make_mask()), make_spec("utm"), out)
        info = gdal_info(out)
        assert info["categories"] == [c.name for c in CLASSES]
        assert info["rat"][2] == ["2", "tumor & <more>", "200", "0", "40"]

    @pytest.mark.parametrize("side", [200, 2200])
    def test_rpcs(self, tmp_path, side):
        place = Georeference(rpcs=tuple(RPCS.items()))
        out = tmp_path / "mask.tif"
        write_geotiff(
            read_from(make_mask(side, side)),
            make_spec("plain", georeference=place, height=side, width=side),
            out,
        )
        with quiet_open(out) as src:
            assert src.rpcs.line_num_coeff == [1.0, *[0.5] * 18, 0.25]
            assert src.rpcs.long_off == 12

    def test_a_pixel_that_changes_on_disk(self, tmp_path, monkeypatch):
        """What was read from the store is compared with what the finished file gives."""
        copy = rasterio.shutil.copy

        def meddle(source, target, **options):
            if Path(target).name == "cog.tif":
                with rasterio.open(Path(source).with_name("plain.tif"), "r+") as dst:
                    pixel = RasterWindow(700, 900, 1, 1)
                    dst.write(dst.read(window=pixel) ^ 1, window=pixel)
            copy(source, target, **options)

        monkeypatch.setattr(rasterio.shutil, "copy", meddle)
        with pytest.raises(OutputError, match="read back"):
            write_geotiff(
                read_from(make_mask(1100, 1100)),
                make_spec("utm", height=1100, width=1100),
                tmp_path / "m.tif",
            )
        assert list(tmp_path.iterdir()) == []

    def test_overviews_are_majorities(self, tmp_path):
        mask, out = make_mask(1301, 2203), tmp_path / "m.tif"
        write_geotiff(read_from(mask), make_spec("utm", height=1301, width=2203), out)
        with rasterio.open(out) as src:
            assert src.overviews(1) == [2, 4, 8]
        for level in range(3):
            mask = pyramid.halve(mask)
            with rasterio.open(out, overview_level=level) as src:
                np.testing.assert_array_equal(src.read(1), mask)
                assert src.block_shapes == [(512, 512)]

    @pytest.mark.parametrize("side", [500, 2200])
    def test_disk_limit(self, tmp_path, side):
        """A file-size limit stops the write, GDAL's (2200) too: nothing is left behind."""
        code = (
            "import numpy as np, resource, sys; sys.path.insert(0, 'tests');"
            "import test_sinks as t;"
            f"m = np.random.default_rng(0).integers(0, 250, ({side}, {side})).astype('uint8');"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
            f"s = t.make_spec('utm', height={side}, width={side});"
            f"t.write_geotiff(t.read_from(m), s, t.Path({str(tmp_path / 'm.tif')!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "tilenet.errors.ResourceError" in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("side", [60, 2200])
    def test_probabilities(self, tmp_path, side):
        spec = make_spec("utm", channels=("tissue", "tumor"), height=side, width=side)
        prob, out = make_probabilities(spec), tmp_path / "prob.tif"
        write_probabilities(read_from(prob), spec, out)
        assert cog_validate(out) == (True, [], [])
        with rasterio.open(out) as src:
            np.testing.assert_array_equal(src.read(), prob)
            assert src.descriptions == ("tissue", "tumor")
            assert src.scales == (1 / 255, 1 / 255)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(OutputError):
            write_geotiff(read_from(make_mask()), make_spec("utm"), tmp_path / "no" / "m.tif")


def test_png(tmp_path):
    out = tmp_path / "mask.png"
    write_png(make_mask(), make_spec("plain"), out)
    with Image.open(out) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), make_mask())
        rgba = image.convert("RGBA")
        assert rgba.getpixel((5, 3)) == (200, 0, 40, 255)
        assert rgba.getpixel((WIDTH - 1, HEIGHT - 1))[3] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]


class TestLayout:
    @pytest.mark.parametrize("bigtiff", ["IF_SAFER", "YES"])
    def test_a_cog_has_no_gaps(self, tmp_path, bigtiff):
        out = tmp_path / "m.tif"
        write_geotiff(
            read_from(make_mask(1301, 2203)), make_spec("utm", height=1301, width=2203), out
        )
        again = tmp_path / "again.tif"
        rasterio.shutil.copy(str(out), str(again), driver="COG", blocksize=512, bigtiff=bigtiff)
        assert not has_gaps(again)
        data = again.read_bytes()
        again.write_bytes(data + b"\0")
        assert has_gaps(again)

    def test_what_was_written_twice_shows(self, tmp_path):
        out = tmp_path / "m.tif"
        write_geotiff(
            read_from(make_mask(1301, 2203)), make_spec("utm", height=1301, width=2203), out
        )
        with rasterio.open(out, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dst:
            dst.update_tags(again="a directory at the end; the first one is nobody's now")
        with rasterio.open(out) as src:
            assert src.tags()["again"]
        assert has_gaps(out)
