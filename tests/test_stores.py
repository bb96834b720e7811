"""Zarr stores as rasters: OME-Zarr, GeoZarr, xarray's, bare arrays, and those of strangers."""

import errno
import json
import os
import time
import tracemalloc

import numcodecs
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - gives data sets their `rio`
import stores
import xarray as xr
import zarr
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import InputError, ResourceError
from tilenet.geometry import Window
from tilenet.sources import View, find_inputs, open_raster

PIXELS = picture(150, 170, seed=3)
WIDE = np.random.default_rng(0).integers(0, 60000, (3, 150, 170)).astype("uint16")
WGS = TRANSFORM[:6]


def read_all(path, view=None):
    raster = open_raster(path, view)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.zeros(len(raster.info.bands)))


def mapped(pixels=PIXELS):
    found = stores.dataset(pixels, WGS).rio.write_crs(UTM)
    return found.rio.write_transform(TRANSFORM)


WRITERS = {
    "ome4.zarr": lambda p: stores.ome(p, PIXELS),
    "ome4_czyx.zarr": lambda p: stores.ome(p, PIXELS[None, :, None], "tczyx"),
    "ome4_yxc.zarr": lambda p: stores.ome(p, PIXELS.transpose(1, 2, 0), "yxc", chunks=(64, 50, 3)),
    "ome5.ome.zarr": lambda p: stores.ome(p, PIXELS, zarr_format=3),
    "sharded.zarr": lambda p: stores.ome(p, PIXELS, zarr_format=3, shards=(3, 128, 64)),
    "xarray2.zarr": lambda p: stores.write(p, stores.dataset(PIXELS), 2),
    "xarray3.zarr": lambda p: stores.write(p, stores.dataset(PIXELS)),
    "transposed.zarr": lambda p: stores.write(
        p, stores.dataset(PIXELS).transpose("x", "band", "y")
    ),
    "bare.zarr": lambda p: zarr.save_array(p, PIXELS),
    "last.zarr": lambda p: zarr.save_array(p, PIXELS.transpose(1, 2, 0), zarr_format=2),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_store_gives_its_pixels(tmp_path, name):
    WRITERS[name](tmp_path / name)
    pixels, valid = read_all(tmp_path / name)
    assert np.array_equal(pixels, PIXELS)
    assert valid is None


def test_a_mask_is_the_same_from_stores_and_from_tiff(tmp_path, models):
    config = PredictConfig(
        model=str(models / "conv.onnx"), tile=64, overlap=16, block=128, chunk=64
    )
    write_tif(tmp_path / "a.tif", PIXELS, georeferenced=True)
    stores.write(tmp_path / "a.zarr", mapped())
    stores.write(tmp_path / "b.zarr", mapped(), 2)
    stores.ome(tmp_path / "c.zarr", PIXELS, levels=2)
    stores.ome(tmp_path / "d.ome.zarr", PIXELS, zarr_format=3)
    masks = {}
    for path in sorted(tmp_path.iterdir()):
        out = tmp_path / f"{path.name}.mask.zarr"
        assert predict([path], out, config).exit_code == 0
        root = zarr.open_group(out, mode="r")
        masks[path.name] = root["mask"][...], root["ovr_2x/mask"][...]
        place = open_raster(path).info.georeference
        assert (place.crs_wkt is not None) == (path.name[0] in "ab")
        if path.name[0] in "ab":
            tif = open_raster(tmp_path / "a.tif").info.georeference
            assert (place.crs_wkt, place.transform) == (tif.crs_wkt, tif.transform)
    first = masks.pop("a.tif")
    assert len(np.unique(first[0])) == 3
    for name, mask in masks.items():
        assert all(np.array_equal(a, b) for a, b in zip(first, mask, strict=True)), name


def test_levels_and_micrometres_of_ome(tmp_path):
    path = stores.ome(tmp_path / "a.zarr", PIXELS, levels=3, mpp=0.25, labels=("DAPI", "b", "c"))
    info = open_raster(path).info
    assert info.levels == ((150, 170), (75, 85), (38, 43))
    assert info.georeference.mpp == (0.25, 0.25)
    assert not info.georeference.is_georeferenced
    assert info.names == ("DAPI", "b", "c")
    assert info.native_block == (32, 32)
    pixels, _ = read_all(path, View(mpp=0.5))
    assert np.array_equal(pixels, stores.halved(PIXELS))
    assert open_raster(path, View(level=1)).info.georeference.mpp == (0.5, 0.5)
    fine = open_raster(path).info
    assert fine.fingerprint != open_raster(path, View(level=1)).info.fingerprint


def test_a_level_of_other_proportions_is_none(tmp_path):
    path = stores.ome(tmp_path / "a.zarr", PIXELS, levels=3)
    other = PIXELS[:, ::2, ::3].copy()
    zarr.create_array(path / "1", data=other, zarr_format=2, overwrite=True)
    assert open_raster(path).info.levels == ((150, 170),)


def test_bands_are_read_in_any_order(tmp_path):
    for name, chunks in {
        "a.zarr": (1, 64, 64),
        "b.zarr": (2, 64, 64),
        "c.zarr": (3, 64, 64),
    }.items():
        stores.ome(tmp_path / name, PIXELS, chunks=chunks)
        pixels, _ = read_all(tmp_path / name, View(bands=(3, 1, 2)))
        assert np.array_equal(pixels, PIXELS[[2, 0, 1]])


def test_planes_are_chosen_and_never_guessed(tmp_path):
    stack = np.stack([np.stack([PIXELS + z + 10 * t for z in range(3)], 1) for t in range(2)])
    path = stores.ome(tmp_path / "a.zarr", stack, "tczyx", zarr_format=3)
    with pytest.raises(InputError, match=r"t 0 to 1, z 0 to 2.*--plane t=1,z=1"):
        open_raster(path)
    with pytest.raises(InputError, match=r"no plane z=3"):
        open_raster(path, View(plane=(("t", 0), ("z", 3))))
    pixels, _ = read_all(path, View(plane=(("t", 1), ("z", 2))))
    assert np.array_equal(pixels, PIXELS + 12)


def test_times_of_xarray_are_planes_too(tmp_path):
    found = xr.Dataset({"v": (("time", "lat", "lon"), np.stack([PIXELS[0], PIXELS[1]]))})
    path = stores.write(tmp_path / "a.zarr", found)
    pixels, _ = read_all(path, View(plane=(("t", 1),)))
    assert np.array_equal(pixels[0], PIXELS[1])


def test_a_mosaic_of_cubes_has_their_plane_and_variable(tmp_path):
    halves = []
    for name, col in (("a", 0), ("b", 90)):
        times = np.stack([PIXELS[:, :, col : col + 90] + t for t in range(2)], 1)
        x, y = 500_000 + 10 * (col + np.arange(times.shape[3]) + 0.5), 5_000_000 - np.arange(150.0)
        cube = xr.Dataset({"image": (("band", "time", "y", "x"), times)}, {"x": x, "y": 10 * y})
        cube["image"] = cube["image"].rio.write_crs(UTM)
        cube["clouds"] = cube["image"][0] * 0
        halves.append(str(stores.write(tmp_path / f"{name}.zarr", cube)))
    with pytest.raises(InputError, match=r"2 variables.*--variable"):
        open_raster(halves[0], View(mosaic=tuple(halves)))
    view = View(mosaic=tuple(halves), variable="image", plane=(("t", 1),))
    assert np.array_equal(read_all(halves[0], view)[0], PIXELS + 1)
    assert open_raster(halves[0], view).info.plane == (("t", 1),)
    with pytest.raises(InputError, match="no plane t=2"):
        open_raster(halves[0], View(mosaic=tuple(halves), variable="image", plane=(("t", 2),)))


def test_what_the_disk_does_not_give_is_no_hole(tmp_path, monkeypatch):
    """Zarr would take its fill value for the pixels, and a mask would be made of it."""
    path = tmp_path / "a.zarr"
    array = zarr.create_array(
        path, shape=PIXELS.shape, chunks=(3, 64, 64), dtype="uint8", zarr_format=2
    )
    array[:] = PIXELS
    raster = open_raster(path)
    look = os.stat

    def stale(name, **options):
        if str(name).endswith("a.zarr/0.1.1"):
            raise OSError(errno.ESTALE, "Stale file handle", name)
        return look(name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        with pytest.raises(ResourceError, match=r"cannot be read: .*Stale file handle.*resumes"):
            raster.read(Window(0, 0, 150, 170), np.zeros(3), [])
    assert np.array_equal(raster.read(Window(0, 0, 150, 170), np.zeros(3))[0], PIXELS)
    path.rename(tmp_path / "elsewhere")  # as when a disk is taken away
    with pytest.raises(ResourceError, match="the store has gone"):
        raster.read(Window(0, 0, 150, 170), np.zeros(3), [])


def test_a_chunk_that_is_not_stored_is_the_fill_value(tmp_path):
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(3, 64, 64), chunks=(3, 32, 32), dtype="uint8", fill_value=7
    )
    array[:, :32] = 9
    pixels, _ = read_all(tmp_path / "a.zarr")
    assert (np.unique(pixels[:, :32]), np.unique(pixels[:, 32:])) == (9, 7)


def test_one_of_several_variables_is_named(tmp_path):
    found = stores.dataset(PIXELS, clouds=(("y", "x"), PIXELS[0]))
    path = stores.write(tmp_path / "a.zarr", found)
    with pytest.raises(InputError, match=r"2 variables \(clouds, image\).*--variable NAME"):
        open_raster(path)
    assert np.array_equal(read_all(path, View(variable="image"))[0], PIXELS)
    assert np.array_equal(read_all(path, View(variable="clouds"))[0][0], PIXELS[0])
    other = open_raster(path, View(variable="clouds")).info.fingerprint
    assert open_raster(path, View(variable="image")).info.fingerprint != other
    with pytest.raises(InputError, match="no variable depth"):
        open_raster(path, View(variable="depth"))


def test_coordinates_place_a_grid(tmp_path):
    path = stores.write(tmp_path / "a.zarr", stores.dataset(PIXELS, (0.1, 0, 20, 0, -0.1, 50)))
    assert open_raster(path).info.georeference.transform == (0.1, 0, 20, 0, -0.1, 50)
    uneven = stores.dataset(PIXELS, WGS)
    uneven["y"] = np.cumsum(np.arange(150.0))
    info = open_raster(stores.write(tmp_path / "b.zarr", uneven)).info
    assert not info.georeference.is_georeferenced
    assert "not evenly spaced" in info.notes[0]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "value"), [("uint16", 7), ("float32", np.nan), ("float32", -9.5)]
)
def test_nodata_is_that_of_the_variable(tmp_path, zarr_format, dtype, value):
    pixels = WIDE.astype(dtype)
    pixels[:, 3, 4] = value
    found = stores.dataset(pixels)
    encoding = {"image": {"_FillValue": np.dtype(dtype).type(value)}}
    path = stores.write(tmp_path / "a.zarr", found, zarr_format, encoding=encoding)
    read, valid = read_all(path)
    assert open_raster(path).info.nodata == pytest.approx((value,) * 3, nan_ok=True)
    assert np.flatnonzero(~valid).tolist() == [3 * 170 + 4]
    assert np.array_equal(read[:, valid], pixels[:, valid])


def test_our_own_mask_and_geozarr_read_back(tmp_path, models):
    config = PredictConfig(model=str(models / "pointwise.onnx"), chunk=64, tile=64)
    write_tif(tmp_path / "a.tif", PIXELS, georeferenced=True)
    predict([tmp_path / "a.tif"], tmp_path / "m.zarr", config)
    info = open_raster(tmp_path / "m.zarr").info
    tif = open_raster(tmp_path / "a.tif").info
    assert info.levels == ((150, 170), (75, 85), (38, 43))
    assert info.georeference == tif.georeference
    document = json.loads((tmp_path / "m.zarr" / "zarr.json").read_text())
    del document["attributes"]["ome"]  # what is left is GeoZarr
    (tmp_path / "m.zarr" / "zarr.json").write_text(json.dumps(document))
    assert open_raster(tmp_path / "m.zarr").info.levels == info.levels
    assert open_raster(tmp_path / "m.zarr").info.georeference == info.georeference
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.transform[:6] == info.georeference.transform


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2, "dtype": ">u2", "order": "F", "filters": [numcodecs.Delta(">u2")]},
        {"zarr_format": 2, "compressors": numcodecs.LZ4()},
        {"zarr_format": 2, "compressors": numcodecs.BZ2()},
        {"zarr_format": 2, "compressors": numcodecs.Blosc("zlib")},
        {"zarr_format": 2, "compressors": numcodecs.GZip()},
        {"zarr_format": 2, "compressors": None},
        {"serializer": zarr.codecs.BytesCodec(endian="big"), "compressors": zarr.codecs.GzipCodec(),
         "filters": [zarr.codecs.TransposeCodec(order=(2, 0, 1))]},
        {"compressors": [zarr.codecs.BloscCodec(typesize=2), zarr.codecs.Crc32cCodec()]},
    ],
)  # fmt: skip
def test_ways_of_storing_do_not_matter(tmp_path, options):
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=WIDE.shape, chunks=(2, 64, 50), **{"dtype": "uint16"} | options
    )
    array[...] = WIDE
    pixels, _ = read_all(tmp_path / "a.zarr")
    assert np.array_equal(pixels, WIDE)
    assert pixels.dtype == np.dtype("uint16")


def test_what_is_not_stored_is_the_fill_value_and_what_is_broken_is_listed(tmp_path, models):
    path = stores.ome(tmp_path / "a.zarr", PIXELS, chunks=(3, 50, 50), fill_value=7)
    (path / "0" / "0.1.1").unlink()
    broken = path / "0" / "0.2.0"
    broken.write_bytes(broken.read_bytes()[:-20])
    raster = open_raster(path)
    damaged = []
    pixels, valid = raster.read(Window(0, 0, 150, 170), np.zeros(3), damaged)
    assert damaged == [Window(100, 0, 50, 50)]
    assert (pixels[:, 50:100, 50:100] == 7).all()
    assert not valid[100:, :50].any()
    assert valid.sum() == 150 * 170 - 50 * 50
    config = PredictConfig(model=str(models / "identity.onnx"))
    done = predict([path], tmp_path / "mask.zarr", config)
    assert done.exit_code == 7
    assert (zarr.open_array(tmp_path / "mask.zarr/mask")[...] == 255).sum() == 2500


def bomb(kind):
    """Return few bytes that claim to be many."""
    codec = numcodecs.get_codec({"id": kind})
    return codec.encode(np.zeros(1 << 28 if kind != "bz2" else 1 << 25, np.uint8))


@pytest.mark.parametrize("cut", [1, 20, 60])
@pytest.mark.parametrize("kind", ["zstd", "blosc", "zlib", "gzip", "bz2", "lz4"])
def test_a_chunk_that_is_cut_off_is_damaged(tmp_path, kind, cut):
    codec = numcodecs.get_codec({"id": kind})
    noise = np.random.default_rng(1).integers(0, 256, (60, 60)).astype("uint8")
    zarr.create_array(
        tmp_path / "a.zarr", data=noise, chunks=(20, 20), compressors=codec, zarr_format=2
    )
    chunk = tmp_path / "a.zarr" / "1.1"
    chunk.write_bytes(chunk.read_bytes()[:-cut])
    damaged = []
    open_raster(tmp_path / "a.zarr").read(Window(0, 0, 60, 60), np.zeros(1), damaged)
    assert damaged == [Window(20, 20, 20, 20)]


@pytest.mark.parametrize("kind", ["zstd", "blosc", "zlib", "gzip", "bz2", "lz4"])
def test_a_chunk_never_holds_more_than_a_chunk(tmp_path, kind):
    codec = numcodecs.get_codec({"id": kind})
    zarr.create_array(
        tmp_path / "a.zarr", data=PIXELS[0], chunks=(50, 50), compressors=codec, zarr_format=2
    )
    (tmp_path / "a.zarr" / "0.0").write_bytes(bomb(kind))
    damaged = []
    tracemalloc.start()
    pixels, _ = open_raster(tmp_path / "a.zarr").read(Window(0, 0, 150, 170), np.zeros(1), damaged)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert damaged == [Window(0, 0, 50, 50)]
    assert np.array_equal(pixels[0, 50:], PIXELS[0, 50:])
    assert peak < 16 << 20


def edit(path, **keys):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | keys))


def base(path, **options):
    return zarr.create_array(path, data=PIXELS, chunks=(1, 64, 64), zarr_format=2, **options)


def packed(path):
    stores.write(path, stores.dataset(PIXELS))
    document = path / "image" / "zarr.json"
    edit(document, attributes={"scale_factor": 0.5})


def outside(path):
    base(path)
    (path.parent / "elsewhere").write_text((path / ".zarray").read_text())
    (path / ".zarray").unlink()
    (path / ".zarray").symlink_to(path.parent / "elsewhere")


def with_path(path, name):
    stores.ome(path, PIXELS)
    document = json.loads((path / ".zattrs").read_text())
    document["multiscales"][0]["datasets"][0]["path"] = name
    (path / ".zattrs").write_text(json.dumps(document))


def changed(**keys):
    def make(path):
        base(path)
        edit(path / ".zarray", **keys)

    return make


def changed_group(**keys):
    def make(path):
        stores.ome(path, PIXELS)
        edit(path / ".zattrs", **keys)

    return make


def deep(path):
    base(path)
    (path / ".zarray").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def long(path):
    base(path)
    with (path / ".zattrs").open("wb") as file:
        file.truncate(1 << 33)


REFUSED = {
    "complex": (lambda p: zarr.save_array(p, PIXELS.astype("c8")), "pixels are complex64"),
    "bool": (lambda p: zarr.save_array(p, PIXELS > 9), "pixels are bool"),
    "64 bits": (lambda p: zarr.save_array(p, PIXELS.astype("i8")), "pixels are int64"),
    "objects": (changed(dtype="|O"), r"pixels are \|O"),
    "records": (changed(dtype=[["a", "|u1"]]), "pixels are "),
    "pickles": (changed(filters=[{"id": "pickle"}]), "codec pickle"),
    "unknown": (changed(compressor={"id": "zfpy"}), "codec zfpy"),
    "object filter": (changed(filters=[{"id": "delta", "dtype": "|O"}]), "codec delta"),
    "large chunks": (changed(shape=[1, 1 << 20, 1 << 20], chunks=[1, 1 << 15, 1 << 15]), "64 MiB"),
    "no numbers": (changed(shape=[3, "150", 170]), "no array's"),
    "negative": (changed(shape=[3, -150, 170]), "no array's"),
    "no pixels": (changed(shape=[3, 0, 170]), "it is empty"),
    "chunks of nothing": (changed(chunks=[0, 64, 64]), "no array's"),
    "many axes": (changed(shape=[1] * 99, chunks=[1] * 99), "no array's"),
    "deep": (deep, r"\.zarray is no JSON"),
    "long": (long, "more than the 16777216 that can be"),
    "no JSON": (lambda p: (base(p), (p / ".zarray").write_text("{"))[0], "is no JSON"),
    "a link": (outside, "lies outside of the store"),
    "up": (lambda p: with_path(p, "../b"), "as a part of it"),
    "absolute": (lambda p: with_path(p, "/etc"), "as a part of it"),
    "missing": (lambda p: with_path(p, "9"), "no array 9"),
    "no datasets": (changed_group(multiscales=[{"datasets": []}]), "no datasets"),
    "no axes": (changed_group(multiscales=[{"datasets": [{"path": "0"}], "axes": "z"}]), "no pic"),
    "a plate": (changed_group(multiscales=None, plate={}), "a collection of images"),
    "packed": (packed, "scale_factor 0.5"),
    "square": (lambda p: zarr.save_array(p, np.zeros((64, 64, 64), "u1")), "axes have no names"),
    "nothing": (lambda p: zarr.create_group(p), "no picture in it"),
    "groups": (lambda p: zarr.create_group(p).create_group("r10m"), r"groups \(r10m\)"),
    "a profile": (lambda p: stores.write(p, xr.Dataset({"v": ("y", PIXELS[0, 0])})), "no picture"),
}  # fmt: skip


@pytest.mark.alone
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_at_once(tmp_path, name):
    make, why = REFUSED[name]
    make(tmp_path / "a.zarr")
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(InputError, match=why):
        open_raster(tmp_path / "a.zarr")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - start < 2
    assert peak < 100 << 20


def test_no_link_out_of_the_store_is_followed(tmp_path):
    base(tmp_path / "a.zarr", compressors=None)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 4096)
    chunk = tmp_path / "a.zarr" / "0.0.0"
    chunk.unlink()
    chunk.symlink_to(secret)
    damaged = []
    pixels, _ = open_raster(tmp_path / "a.zarr").read(Window(0, 0, 150, 170), np.zeros(3), damaged)
    assert damaged == [Window(0, 0, 64, 64)]
    assert not (pixels[0, :64, :64] == ord("x")).any()


def test_a_pipe_is_no_chunk(tmp_path):
    base(tmp_path / "a.zarr", fill_value=9)
    chunk = tmp_path / "a.zarr" / "0.0.0"
    chunk.unlink()
    os.mkfifo(chunk)
    assert (read_all(tmp_path / "a.zarr")[0][0, :64, :64] == 9).all()


def test_a_changed_chunk_is_another_input(tmp_path):
    path = stores.ome(tmp_path / "a.zarr", PIXELS)
    before = open_raster(path).info.fingerprint
    assert open_raster(path).info.fingerprint == before
    zarr.open_array(path / "0", mode="r+")[0, 0, 0] = 255
    assert open_raster(path).info.fingerprint != before


def test_stores_in_a_folder_are_inputs_but_no_masks(tmp_path, models, cli):
    folder = tmp_path / "in"
    stores.ome(folder / "a.ome.zarr", PIXELS)
    stores.write(folder / "deeper" / "b.zarr", stores.dataset(PIXELS))
    write_tif(folder / "c.tif", PIXELS)
    write_tif(folder / "a.ome.zarr" / "inside.tif", PIXELS)
    config = PredictConfig(model=str(models / "pointwise.onnx"))
    predict([folder / "c.tif"], folder / "m.zarr", config)
    found = find_inputs([folder], tmp_path / "out")
    assert [str(one.stem) for one in found] == ["a", "c", "deeper/b"]
    done = cli("predict", folder, "--out", tmp_path / "out", "--model", models / "pointwise.onnx")
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "out").rglob("*.png")} == {"a.png", "b.png", "c.png"}
    one = cli("predict", folder / "deeper" / "b.zarr", "-o", tmp_path / "b.png", "--variable",
              "image", "--model", models / "pointwise.onnx", "--json")  # fmt: skip
    assert one.code == 0, one.err
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "out" / "c.png").read_bytes()
    said = cli("info", folder / "a.ome.zarr", "--json")
    assert json.loads(said.out)["driver"] == "zarr"
