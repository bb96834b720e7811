"""Rasters as they lie on disk: what is read, what is refused, which files were used."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
import zarr
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.env import getenv, hasenv
from rasterio.errors import NotGeoreferencedWarning
from rasters import TRANSFORM, UTM, picture, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.quiet import ignoring
from tilenet.sources import View, environment, find_inputs, open_raster

rng = np.random.default_rng(0)
PIXELS = (
    128
    + 60 * np.sin(np.arange(150)[None, :, None] / 9) * np.cos(np.arange(170)[None, None, :] / 7)
    + rng.normal(size=(3, 150, 170)) * 5
).astype(np.uint8)


def save(path, **options):
    if path.suffix == ".tif":
        profile = {"driver": "GTiff", "height": 150, "width": 170, "count": 3, "dtype": "uint8"}
        with ignoring(NotGeoreferencedWarning), rasterio.open(path, "w", **profile, **options) as d:
            d.write(PIXELS)
    else:
        Image.fromarray(PIXELS.transpose(1, 2, 0)).save(path, **options)
    return path


def read_all(path):
    raster = open_raster(path)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.zeros(3))[0]


FORMATS = {
    "a.png": {}, "a.bmp": {}, "a.ppm": {}, "a.webp": {"lossless": True},
    "a.jpg": {"quality": 95}, "progressive.jpg": {"quality": 95, "progressive": True},
    "strips.tif": {}, "deflate.tif": {"compress": "deflate"}, "lzw.tif": {"compress": "lzw"},
    "zstd.tif": {"compress": "zstd", "tiled": True, "blockxsize": 64, "blockysize": 64},
    "jpeg.tif": {"compress": "jpeg", "tiled": True, "blockxsize": 64, "blockysize": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_those_of_the_file(tmp_path, name):
    difference = np.abs(read_all(save(tmp_path / name, **FORMATS[name])).astype(int) - PIXELS)
    lossy = "jp" in name or "progressive" in name
    assert difference.max() == 0 if not lossy else difference.mean() < 8


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_off_file_is_refused_not_filled(tmp_path, name, share):
    path = save(tmp_path / name, **FORMATS[name])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError):
        read_all(path)


def test_world_file_and_pam_are_used_and_listed(tmp_path):
    path = save(tmp_path / "map.png")
    (tmp_path / "map.pgw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    (tmp_path / "map.png.aux.xml").write_text("<PAMDataset><SRS>EPSG:32632</SRS></PAMDataset>")
    info = open_raster(path).info
    assert info.georeference.transform == (10, 0, 500000, 0, -10, 5000000)
    assert "UTM zone 32N" in info.georeference.crs_wkt
    names = {name.rsplit("/", 1)[-1] for name in info.files}
    assert names == {"map.png", "map.pgw", "map.png.aux.xml"}


def test_a_changed_sidecar_is_another_input(tmp_path):
    path = save(tmp_path / "map.png")
    before = open_raster(path).info.fingerprint
    (tmp_path / "map.pgw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    assert open_raster(path).info.fingerprint != before


def test_beyond_the_border_is_reflected(tmp_path):
    raster = open_raster(save(tmp_path / "a.png"))
    pixels, valid = raster.read(Window(-5, -3, 160, 180), np.zeros(3))
    expected = np.pad(PIXELS, ((0, 0), (5, 5), (3, 7)), mode="reflect")
    assert np.array_equal(pixels, expected)
    assert valid is None


def test_levels_that_show_another_picture_are_none(tmp_path):
    # A slide's thumbnail and label are listed among GDAL's overviews; here 2 is one, 3 is not.
    path = tmp_path / "a.tif"
    save(path, tiled=True, blockxsize=64, blockysize=64)
    with ignoring(NotGeoreferencedWarning), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    assert open_raster(path).info.levels == ((150, 170), (75, 85), (38, 43))
    with pytest.raises(InputError, match="levels 0 to 2"):
        open_raster(path, View(level=3))


@pytest.mark.parametrize("dtype", ["int8", "uint32", "float16", "float64", "int16", "uint16"])
def test_other_pixel_types_keep_their_values(tmp_path, dtype):
    values = (np.arange(150 * 170).reshape(1, 150, 170) % 100).astype(dtype)
    profile = {"driver": "GTiff", "height": 150, "width": 170, "count": 1, "dtype": dtype}
    path = tmp_path / "a.tif"
    with ignoring(NotGeoreferencedWarning), rasterio.open(path, "w", **profile) as dataset:
        dataset.write(values)
    pixels, _ = open_raster(path).read(Window(0, 0, 150, 170), np.zeros(1))
    assert np.array_equal(pixels.astype(float), values.astype(float))


def test_not_finite_is_not_valid_and_seen_as_the_mean(tmp_path):
    values = np.ones((2, 40, 50), np.float32)
    values[0, 3, 4], values[1, 5, 6] = np.nan, np.inf
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 2, "dtype": "float32"}
    with ignoring(NotGeoreferencedWarning), rasterio.open(tmp_path / "a.tif", "w", **profile) as d:
        d.write(values)
    pixels, valid = open_raster(tmp_path / "a.tif").read(Window(0, 0, 40, 50), np.array([7.0, 8.0]))
    assert np.argwhere(~valid).tolist() == [[3, 4], [5, 6]]
    assert pixels[:, 3, 4].tolist() == [7, 8]
    assert pixels[:, 5, 6].tolist() == [7, 8]
    assert np.isfinite(pixels).all()


def test_hidden_files_and_sidecars_are_no_inputs(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / ".b.png").write_bytes(b"")
    (tmp_path / "a.pgw").write_text("1\n")
    assert [str(source.stem) for source in find_inputs([tmp_path], tmp_path / "out")] == ["a"]


def test_mutated_headers_are_input_errors(tmp_path):
    """GDAL's own error classes are neither rasterio's nor the system's."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    points = [GroundControlPoint(0, 0, 1, 2), GroundControlPoint(9, 0, 1, 3),
              GroundControlPoint(0, 9, 2, 2)]  # fmt: skip
    save(path, gcps=points, crs="EPSG:4326")
    whole, causes = path.read_bytes(), set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(4):
            data[rng.integers(8, 700)] = rng.integers(256)
        path.write_bytes(data)
        try:
            raster = open_raster(path)
            size = min(raster.info.height, 9), min(raster.info.width, 9)
            raster.read(Window(0, 0, *size), np.zeros(len(raster.info.bands)))
        except InputError as error:
            causes.add(type(error.__cause__).__name__)
    assert causes <= {"RasterioIOError", "CPLE_AppDefinedError", "NoneType"}


@pytest.mark.parametrize("nodata", [9999, -9999, 32767, -32768, 0])
def test_nodata_of_signed_integers(tmp_path, nodata):
    values = np.full((1, 20, 30), 7, "int16")
    values[0, 3:5] = nodata
    profile = {"driver": "GTiff", "height": 20, "width": 30, "count": 1, "dtype": "int16"}
    with (
        ignoring(NotGeoreferencedWarning),
        rasterio.open(tmp_path / "a.tif", "w", **profile, nodata=nodata) as dataset,
    ):
        dataset.write(values)
    _, valid = open_raster(tmp_path / "a.tif").read(Window(0, 0, 20, 30), np.zeros(1))
    assert valid is not None
    assert np.array_equal(~valid, values[0] == nodata)


FILL = 77.0


def read_filled(path, view=None):
    raster = open_raster(path, view)
    window = Window(0, 0, raster.info.height, raster.info.width)
    pixels, valid = raster.read(window, np.full(len(raster.info.bands), FILL))
    return pixels, np.ones(pixels.shape[1:], bool) if valid is None else valid


def rows(*values, dtype="uint8"):
    """Return a picture, (3, rows, 16), each row of one colour."""
    return np.repeat(np.array(values, dtype).T[:, :, None], 16, axis=2)


@pytest.mark.parametrize("nodata", [0, 255])
def test_bytes_that_are_nodata_in_some_bands_are_colours(tmp_path, nodata):
    pixels = rows((nodata, 40, 50), (nodata, nodata, 50), (nodata,) * 3, (10, 20, 30))
    found, valid = read_filled(
        write_tif(tmp_path / "a.tif", pixels, georeferenced=True, nodata=nodata)
    )
    assert valid[:, 0].tolist() == [True, True, False, True]
    assert np.array_equal(found, np.where(valid, pixels, int(FILL)))


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_wider_nodata_in_some_bands_is_seen_as_the_mean(tmp_path, dtype):
    nodata = 0 if dtype == "uint16" else -9999
    pixels = rows((nodata, 40, 50), (nodata,) * 3, (10, 20, 30), dtype=dtype)
    found, valid = read_filled(
        write_tif(tmp_path / "a.tif", pixels, georeferenced=True, nodata=nodata)
    )
    assert valid[:, 0].tolist() == [True, False, True]
    assert found[:, :, 0].T.tolist() == [[FILL, 40, 50], [FILL] * 3, [10, 20, 30]]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_where_there_is_a_mask_nodata_says_nothing(tmp_path, dtype):
    pixels = rows((0, 0, 0), (0, 40, 50), (10, 20, 30), dtype=dtype)
    path = write_tif(tmp_path / "a.tif", pixels, georeferenced=True, nodata=0)
    mask = np.full((3, 16), 255, np.uint8)
    mask[2] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    assert open_raster(path).info.validity == "mask"
    found, valid = read_filled(path)
    assert valid[:, 0].tolist() == [True, True, False]
    assert np.array_equal(found, np.where(valid, pixels, int(FILL)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_alpha_and_nodata_both_count(tmp_path, dtype):
    pixels = rows((0, 0, 0), (0, 40, 50), (10, 20, 30), (10, 20, 30), dtype=dtype)
    alpha = np.repeat(np.array([[255], [255], [1], [0]]), 16, axis=1)
    path = write_tif(tmp_path / "a.tif", pixels, georeferenced=True, alpha=alpha, nodata=0)
    assert open_raster(path).info.validity == "alpha+nodata"
    found, valid = read_filled(path)
    assert valid[:, 0].tolist() == [False, True, True, False]
    second = [0, 40, 50] if dtype == "uint8" else [FILL, 40, 50]
    assert found[:, :, 0].T.tolist() == [[FILL] * 3, second, [10, 20, 30], [FILL] * 3]
    assert open_raster(path, View(bands=(4,))).info.validity == "nodata"


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_alpha_counts_in_a_picture_of_any_bands(tmp_path, bands):
    alpha = np.repeat(np.array([[255], [0]]), 16, axis=1)
    pixels = np.full((bands, 2, 16), 9, np.uint8)
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": bands + 1, "height": 2, "width": 16, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, crs=UTM, transform=TRANSFORM) as dataset:
        others = [ColorInterp.undefined] * (bands - 1)
        dataset.colorinterp = [ColorInterp.gray, *others, ColorInterp.alpha]
        dataset.write(np.concatenate([pixels, alpha[None].astype(np.uint8)]))
    raster = open_raster(path)
    assert (raster.info.validity, len(raster.info.bands)) == ("alpha", bands)
    found, valid = read_filled(path)
    assert valid[:, 0].tolist() == [True, False]
    assert np.array_equal(found, np.where(valid, pixels, int(FILL)))


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_nodata_of_each_band_in_a_vrt(tmp_path, dtype):
    pixels = rows((30, 40, 50), (30, 1, 50), (1, 30, 30), dtype=dtype)
    path = write_tif(tmp_path / "a.tif", pixels, georeferenced=True)
    rasterio.shutil.copy(path, tmp_path / "a.vrt", driver="VRT")
    text = (tmp_path / "a.vrt").read_text()
    for band, value in enumerate((30, 40, 50), 1):
        opening = f'band="{band}">'
        text = text.replace(opening, f"{opening}<NoDataValue>{value}</NoDataValue>")
    (tmp_path / "a.vrt").write_text(text)
    view = View(allow_remote=True)
    assert open_raster(tmp_path / "a.vrt", view).info.nodata == (30, 40, 50)
    found, valid = read_filled(tmp_path / "a.vrt", view)
    assert valid[:, 0].tolist() == [False, True, True]
    second = [30, 1, 50] if dtype == "uint8" else [FILL, 1, FILL]
    assert found[:, :, 0].T.tolist() == [[FILL] * 3, second, [1, 30, 30]]


def test_nodata_of_each_band_in_the_metadata(tmp_path):
    pixels = rows((0, 255, 9), (0, 255, 8), (9, 9, 9))
    path = write_tif(tmp_path / "a.tif", pixels, georeferenced=True)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(NODATA_VALUES="0 255 9")
    assert open_raster(path, View(bands=(3, 1))).info.nodata == (9, 0)
    found, valid = read_filled(path)
    assert valid[:, 0].tolist() == [False, True, True]
    assert np.array_equal(found, np.where(valid, pixels, int(FILL)))


def test_what_gdal_reads_has_no_planes(tmp_path):
    path = write_tif(tmp_path / "a.tif", picture(40, 50), georeferenced=True)
    with pytest.raises(InputError, match=r"no planes to choose from.*leave --plane out"):
        open_raster(path, View(plane=(("z", 1),)))


def test_pages_in_a_circle_and_a_codec_of_nobody(tmp_path):
    path = write_tif(tmp_path / "a.tif", picture(40, 50))
    data = bytearray(path.read_bytes())
    [first] = struct.unpack_from("<I", data, 4)
    [tags] = struct.unpack_from("<H", data, first)
    for entry in range(first + 2, first + 2 + 12 * tags, 12):
        if struct.unpack_from("<H", data, entry) == (259,):
            struct.pack_into("<H", data, entry + 8, 65535)
    struct.pack_into("<I", data, first + 2 + 12 * tags, first)
    path.write_bytes(data)
    with pytest.raises(InputError, match="codec 65535"):
        open_raster(path)


def test_gdal_is_set_within_and_only_there():
    def told():
        return getenv()["GDAL_PNG_WHOLE_IMAGE_OPTIM"], getenv()["GDAL_DISABLE_READDIR_ON_OPEN"]

    with environment():
        assert told() == (False, "TRUE")
        with environment(distant=True):
            assert told() == (False, "EMPTY_DIR")
            with environment():
                assert told() == (False, "TRUE")
            assert told() == (False, "EMPTY_DIR")
        with environment():
            assert told() == (False, "TRUE")
        assert told() == (False, "TRUE")
    assert not hasenv()


# -- pages


PAGES = [picture(60, 70, seed=k) for k in range(3)]


def imagej(path):
    """Write planes under one directory, as ImageJ does where they are large."""
    planes = np.stack([page[0] for page in PAGES])
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "ZYX"})


def by_pillow(path):
    first, *more = (Image.fromarray(np.moveaxis(page, 0, -1)) for page in PAGES)
    first.save(path, save_all=True, append_images=more)


def by_tifffile(path):
    tifffile.imwrite(path, np.stack([page[0] for page in PAGES]), photometric="minisblack")


@pytest.mark.parametrize("write", [imagej, by_pillow, by_tifffile])
def test_of_pages_of_one_kind_one_is_chosen(tmp_path, write):
    """Whoever wrote them: the first of thirty slices is not the picture."""
    path = tmp_path / "a.tif"
    write(path)
    with pytest.raises(InputError, match=r"a stack of planes .*--plane") as caught:
        open_raster(path)
    axis = re.search(r"--plane (\w)=", str(caught.value))[1]
    info = open_raster(path, View(plane=((axis, 1),))).info
    pixels, _ = open_raster(path, View(plane=((axis, 1),))).read(
        Window(0, 0, 60, 70), np.zeros(len(info.bands))
    )
    assert np.array_equal(pixels, PAGES[1][: len(info.bands)])


def test_a_page_of_another_kind_is_no_plane(tmp_path):
    """A thumbnail, a smaller level, a mask."""
    for name, other in (
        ("small", PAGES[1][:, :30, :35]), ("grey", PAGES[1][:1]), ("wide", PAGES[1].astype("u2")),
    ):  # fmt: skip
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tif:
            tif.write(np.moveaxis(PAGES[0], 0, -1), photometric="rgb", metadata=None)
            photometric = "minisblack" if len(other) == 1 else "rgb"
            tif.write(np.moveaxis(other, 0, -1), photometric=photometric, metadata=None)
        assert open_raster(tmp_path / f"{name}.tif").info.driver == "GTiff"
    path = write_tif(tmp_path / "masked.tif", PAGES[0][:1])
    with (
        ignoring(NotGeoreferencedWarning),
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "r+") as dst,
    ):
        dst.write_mask(np.eye(60, 70, dtype=bool))
    assert open_raster(path).info.driver == "GTiff"


def test_numbers_that_float32_does_not_hold_need_no_word(tmp_path):
    """Warnings are errors here: stderr belongs to the events."""
    pixels = picture(40, 50).astype("float64")
    pixels[:, :5] = -1.7976931348623157e308
    path = write_tif(tmp_path / "a.tif", pixels, nodata=-1.7976931348623157e308)
    found, valid = open_raster(path).read(Window(0, 0, 40, 50), np.full(3, 7.0))
    assert not valid[:5].any()
    assert valid[5:].all()
    assert np.array_equal(found[:, 5:], pixels[:, 5:])
    small = open_raster(write_tif(tmp_path / "b.tif", picture(40, 50), nodata=0))
    assert small.read(Window(0, 0, 40, 50), np.full(3, 5000.0))[0].dtype == "uint8"


@pytest.mark.parametrize(("height", "width"), [(33, 64), (64, 33), (33, 33)])
def test_the_last_row_and_column_of_a_raster_are_reflected(tmp_path, models, height, width):
    """A block may begin with them; its mask is that of the run in one block."""
    source = write_tif(tmp_path / "a.tif", picture(height, width))
    options = {"tile": 32, "overlap": 0, "chunk": 32, "model": str(models / "conv.onnx")}
    for name, block in (("one.zarr", None), ("many.zarr", 32)):
        predict([source], tmp_path / name, PredictConfig(**options, block=block))
    one, many = (zarr.open_array(tmp_path / f"{n}.zarr/mask")[:] for n in ("one", "many"))
    assert np.array_equal(one, many)
