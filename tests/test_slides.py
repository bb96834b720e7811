"""Slides, stacks and resolutions: which pixels are read, at which grid, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import identity, pointwise
from PIL import Image
from rasters import TRANSFORM, picture, write_tif
from slides import halved, write_ome, write_svs

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import InputError, TilenetError
from tilenet.geometry import Georeference, Window
from tilenet.mask_api import verify
from tilenet.sinks import open_store
from tilenet.sources import View, open_raster
from tilenet.sources.resample import resample, source_window
from tilenet.sources.view import Resampling, settle

PICTURE = picture(600, 500)
FILL = np.zeros(3)


def whole(raster):
    return raster.read(Window(0, 0, raster.info.height, raster.info.width), FILL)[0]


def mask_of(path):
    store = open_store(path)
    return store.read("mask", Window(0, 0, store.spec.height, store.spec.width))


# Resampling


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 9.0), st.integers(20, 200), st.integers(20, 200), st.data(),
)  # fmt: skip
def test_a_pixel_is_the_same_in_every_window(step, height, width, data):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 60_000, (2, height, width)).astype(np.uint16)
    valid = rng.random((height, width)) > 0.2
    grid = Resampling((step, step * 1.1), (height, width))
    size = max(1, round(height / step)), max(1, round(width / step / 1.1))
    blank = np.zeros((2, 1, 1), np.uint16)

    def at(window):
        box = source_window(window, grid)
        where = box.slices()
        return resample(pixels[(slice(None), *where)], valid[where], box, window, grid, blank)

    all_pixels, all_valid = at(Window(0, 0, *size))
    row, col = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    part = Window.from_bounds(
        row, col,
        data.draw(st.integers(row + 1, size[0])), data.draw(st.integers(col + 1, size[1])),
    )  # fmt: skip
    some, kept = at(part)
    assert np.array_equal(some, all_pixels[(slice(None), *part.slices())])
    if all_valid is not None:
        kept = np.ones(some.shape[1:], bool) if kept is None else kept
        assert np.array_equal(kept, all_valid[part.slices()])


@pytest.mark.parametrize(("factor", "filter"), [(2, "BILINEAR"), (3, "BILINEAR"), (0.5, "BICUBIC")])
def test_resampling_is_what_pillow_calls_so(factor, filter):
    grid = Resampling((factor, factor), (600, 480))
    size = Window(0, 0, int(600 / factor), int(480 / factor))
    source = np.ascontiguousarray(PICTURE[:, :, :480])
    ours, valid = resample(source, None, Window(0, 0, 600, 480), size, grid, FILL)
    image = Image.fromarray(source.transpose(1, 2, 0))
    theirs = np.asarray(image.resize((size.width, size.height), Image.Resampling[filter]))
    assert valid is None
    assert np.abs(ours - theirs.transpose(2, 0, 1).astype(int)).max() <= 1


@pytest.mark.parametrize("step", [64.0, 1e9, 1e30])
def test_a_filter_wider_than_the_raster_stays_in_it(step):
    # Its weights once took as much memory as it is wide.
    pixels = np.full((1, 40, 30), 9, np.uint8)
    grid, pixel = Resampling((step, step), (40, 30)), Window(0, 0, 1, 1)
    assert source_window(pixel, grid) == Window(0, 0, 40, 30)
    made, valid = resample(pixels, None, Window(0, 0, 40, 30), pixel, grid, FILL[:1])
    assert valid is None
    assert made.tolist() == [[[9]]]


def test_what_is_invalid_leaves_no_trace():
    pixels = np.full((1, 40, 40), 100, np.uint8)
    valid = np.ones((40, 40), bool)
    pixels[:, 10:21], valid[10:21] = 255, False
    grid = Resampling((2.0, 2.0), (40, 40))
    made, kept = resample(
        pixels, valid, Window(0, 0, 40, 40), Window(0, 0, 20, 20), grid, np.full((1, 1, 1), 7)
    )
    assert set(np.unique(made[:, kept])) == {100}
    assert set(np.unique(made[:, ~kept])) == {7}
    assert kept[:, 0].tolist() == [True] * 5 + [False] * 5 + [True] * 10


# Which level


LEVELS = ((4000, 3000), (2000, 1500), (1000, 750), (250, 188))
PLACE = Georeference(mpp=(0.25, 0.25))


@pytest.mark.parametrize(
    ("view", "level", "size", "step"),
    [
        (View(), 0, (4000, 3000), None),
        (View(level=2), 2, (1000, 750), None),
        (View(mpp=0.25), 0, (4000, 3000), None),
        (View(mpp=0.5), 1, (2000, 1500), None),
        (View(mpp=0.75), 1, (1333, 1000), 1.5),
        (View(mpp=0.4999), 1, (2000, 1500), None),
        (View(mpp=3.0), 2, (333, 250), 3.0),
        (View(mpp=0.125), 0, (8000, 6000), 0.5),
        (View(trained_mpp=0.5), 1, (2000, 1500), None),
        (View(trained_mpp=0.46), 1, (2000, 1500), None),
        (View(trained_mpp=0.46, level=0), 0, (4000, 3000), None),
        (View(mpp=1.0, source_mpp=1.0), 0, (4000, 3000), None),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(view, level, size, step):
    chosen = settle(view, LEVELS, PLACE, None, "slide")
    assert (chosen.level, chosen.size) == (level, size)
    assert (chosen.resampling and round(chosen.resampling.step[0], 9)) == step
    if view.mpp is not None and step is not None:
        assert chosen.georeference.mpp == (view.mpp, view.mpp)


def test_a_file_without_resolution_is_told_of():
    bare = Georeference()
    assert settle(View(), LEVELS, bare, None, "x").notes == ()
    assert "trained at 0.5" in settle(View(trained_mpp=0.5), LEVELS, bare, None, "x").notes[0]
    asked = settle(View(mpp=0.5), LEVELS, bare, None, "x")
    assert asked.georeference.mpp == (0.5, 0.5)
    assert asked.size == LEVELS[0]
    assert "taken to be 0.5" in asked.notes[0]
    with pytest.raises(InputError, match="ground resolution"):
        settle(View(resolution=1.0), LEVELS, bare, None, "x")
    with pytest.raises(InputError, match="enlarged 20 times"):
        settle(View(mpp=0.0125), LEVELS, PLACE, None, "x")


MAP = Georeference("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))


@pytest.mark.parametrize(
    ("view", "place", "words"),
    [
        (View(mpp=1e9), PLACE, "for --mpp 1e.09.* finer --mpp.*--source-mpp"),
        (View(mpp=0.5, source_mpp=1e-30), PLACE, "less than half a pixel, for --mpp 0.5"),
        (View(resolution=1e10), MAP, "for --resolution 1e.10.* finer --resolution"),
        (View(trained_mpp=0.5), Georeference(mpp=(5e-9, 5e-9)), "model's 0.5 .*--source-mpp"),
        (View(trained_mpp=0.5), Georeference(mpp=(0.25, 5e-320)), "inf times"),
        (View(trained_resolution=1e6), MAP, "model's 1e.06 m .*choose with --resolution"),
    ],
)
def test_a_reduction_to_nothing_is_refused(view, place, words):
    with pytest.raises(InputError, match=words):
        settle(view, LEVELS, place, 1.0, "x")


def test_half_a_pixel_is_left():
    def size(*level):
        return settle(View(mpp=32.0), (level,), Georeference(mpp=(1.0, 1.0)), None, "x").size

    assert size(40, 40) == (1, 1)
    assert size(16, 900) == (1, 28)
    with pytest.raises(InputError, match="15×900 pixels would be reduced 32 times"):
        size(15, 900)


def test_a_file_that_claims_an_absurd_resolution_is_refused(tmp_path, models, cli):
    image = write_ome(tmp_path / "a.ome.tif", PICTURE, "CYX", mpp=1e-30)
    flags = ("--model", models / "identity.onnx", "--out", tmp_path / "x.tif", "--mpp", 0.5)
    done = cli("predict", image, *flags)
    assert done.code == 3
    assert "for --mpp 0.5" in done.err
    assert "Warning" not in done.err
    assert cli("predict", image, *flags, "--source-mpp", 0.25).code == 0


def test_a_network_of_metres_does_not_shrink_a_map_in_degrees():
    degrees = Georeference("EPSG:4326", (0.00025, 0.0, 15.0, 0.0, -0.00025, 45.0))
    chosen = settle(View(trained_resolution=10.0), LEVELS, degrees, None, "x")
    assert chosen.size == LEVELS[0]
    assert "trained at 10 m (or degrees) per pixel" in chosen.notes[0]
    assert settle(View(trained_resolution=0.0005), LEVELS, degrees, None, "x").notes == ()


def test_a_network_of_degrees_does_not_shrink_a_map_in_metres():
    place = Georeference("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    chosen = settle(View(trained_resolution=1e-5), LEVELS, place, 1.0, "x")
    assert chosen.size == LEVELS[0]
    assert "--resolution" in chosen.notes[0]
    assert settle(View(trained_resolution=20.0), LEVELS, place, 1.0, "x").level == 1
    feet = Georeference("EPSG:2263", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    assert settle(View(trained_resolution=6.096), LEVELS, feet, 0.3048, "x").level == 1


# Slides


@pytest.mark.parametrize(("compression", "loss"), [("jpeg", 12.0), (33005, 0.0)])
def test_a_slide_is_read_by_openslide_at_every_level(tmp_path, compression, loss):
    path = write_svs(tmp_path / "a.svs", PICTURE, levels=3, compression=compression)
    info = open_raster(path).info
    assert (info.driver, info.dtype, info.georeference.mpp) == ("openslide", "uint8", (0.5, 0.5))
    assert info.levels == ((600, 500), (300, 250), (150, 125))
    expected = PICTURE
    for level in range(3):
        got = whole(open_raster(path, View(level=level)))
        assert np.abs(got.astype(int) - expected).mean() <= loss
        expected = halved(expected)
    assert open_raster(path, View(bands=(2,))).info.bands == (2,)


def test_content_decides_not_the_name(tmp_path):
    slide = write_svs(tmp_path / "slide.svs", PICTURE)
    plain = write_tif(tmp_path / "plain.tif", PICTURE)
    slide.rename(tmp_path / "slide.tif")
    plain.rename(tmp_path / "plain.svs")
    assert open_raster(tmp_path / "slide.tif").info.driver == "openslide"
    assert open_raster(tmp_path / "plain.svs").info.driver == "GTiff"


def test_levels_that_begin_between_pixels_are_the_same_in_every_window(tmp_path):
    path = write_svs(tmp_path / "a.svs", picture(2501, 2203), levels=2, compression=33005)
    raster = open_raster(path, View(level=1))
    assert raster.info.levels[1] == (1250, 1101)
    everything = whole(raster)
    part = Window(701, 803, 333, 290)
    assert np.array_equal(raster.read(part, FILL)[0], everything[(slice(None), *part.slices())])


@pytest.mark.parametrize("axes", ["YXS", "CYX", "ZCYX", "TZCYX"])
def test_a_stack_gives_the_plane_that_is_chosen(tmp_path, axes):
    shape = {"T": 2, "Z": 4, "C": 3, "S": 3, "Y": 300, "X": 260}
    stack = picture(300, 260, bands=24).reshape(2, 4, 3, 300, 260)
    wanted = stack[1, 2]
    if axes == "YXS":
        stack = wanted.transpose(1, 2, 0)
    else:
        stack = stack[(1,) * ("T" not in axes)][
            (slice(None),) * ("T" in axes) + (2,) * ("Z" not in axes)
        ]
    assert stack.shape == tuple(shape[a] for a in axes)
    path = write_ome(tmp_path / "a.ome.tif", stack, axes, mpp=0.25, levels=2)
    plane = tuple((a.lower(), {"T": 1, "Z": 2}[a]) for a in axes if a in "TZ")
    raster = open_raster(path, View(plane=plane))
    assert raster.info.driver == "tifffile"
    assert raster.info.georeference.mpp == (0.25, 0.25)
    assert np.array_equal(whole(raster), wanted)
    half = whole(open_raster(path, View(plane=plane, level=1)))
    assert np.array_equal(half, wanted[:, ::2, ::2])
    if plane:
        with pytest.raises(InputError, match="none was chosen"):
            open_raster(path)
        with pytest.raises(InputError, match="goes from 0 to"):
            open_raster(path, View(plane=((plane[0][0], 9),)))


def test_names_and_bands_of_a_stack(tmp_path):
    stack = picture(200, 200, bands=3, dtype="uint16", high=40_000)
    path = write_ome(tmp_path / "a.ome.tif", stack, "CYX", names=["DAPI", "GFP", "Cy5"])
    info = open_raster(path).info
    assert (info.names, info.dtype) == (("DAPI", "GFP", "Cy5"), "uint16")
    raster = open_raster(path, View(bands=(3, 1)))
    assert np.array_equal(raster.read(Window(0, 0, 200, 200), np.zeros(2))[0], stack[[2, 0]])


def test_names_are_those_of_the_first_image(tmp_path):
    stack = picture(200, 200, bands=3)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tif:
        for names in (["DAPI", "GFP", "Cy5"], ["one", "two", "three"]):
            tif.write(stack, metadata={"axes": "CYX", "Channel": {"Name": names}})
    info = open_raster(path).info
    assert info.names == ("DAPI", "GFP", "Cy5")
    assert "holds 2 images" in info.notes[0]
    assert open_raster(path, View(bands=("Cy5", "DAPI"))).info.bands == (3, 1)


def test_names_that_are_not_the_bands_are_none(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(picture(90, 80), metadata={"axes": "CYX"})
        tif.write(picture(90, 80)[0], metadata={"axes": "YX", "Channel": {"Name": ["lonely"]}})
    assert open_raster(path).info.names == ("", "", "")


# Through predict


def test_a_resampled_run_is_that_of_a_raster_resampled_before(tmp_path):
    model = pointwise(tmp_path / "m.onnx")
    fine = write_tif(tmp_path / "fine.tif", picture(900, 1100), georeferenced=True)
    raster = open_raster(fine, View(resolution=25.0))
    assert (raster.info.height, raster.info.width) == (360, 440)
    place = TRANSFORM @ TRANSFORM.scale(2.5)
    coarse = tmp_path / "coarse.tif"
    profile = {
        "driver": "GTiff", "count": 3, "height": 360, "width": 440, "dtype": "uint8",
        "crs": "EPSG:32633", "transform": place,
    }  # fmt: skip
    with rasterio.open(coarse, "w", **profile) as file:
        file.write(whole(raster))
    options = {"model": str(model), "tile": 128, "overlap": 32, "chunk": 64}
    results = {
        name: predict([path], tmp_path / f"{name}.zarr", PredictConfig(**options, **more)).runs[0]
        for name, path, more in [
            ("once", fine, {"resolution": 25.0, "block": 128}),
            ("blocks", fine, {"resolution": 25.0, "block": 256, "scheduler": "processes:2"}),
            ("before", coarse, {"block": 128}),
        ]
    }
    masks = {name: mask_of(tmp_path / f"{name}.zarr") for name in results}
    assert np.array_equal(masks["once"], masks["before"])
    assert np.array_equal(masks["once"], masks["blocks"])
    place = open_store(tmp_path / "once.zarr").spec.georeference
    assert place.transform == (25.0, 0.0, 500000.0, 0.0, -25.0, 5000000.0)


def test_a_slide_and_its_half_agree_at_the_models_resolution(tmp_path):
    """A slide at 0.5 and one at 1.0 micrometres, a model at 0.5: one mask, but for 2 %."""
    model = pointwise(tmp_path / "m.onnx", mpp=0.5)
    smooth = halved(halved(picture(2400, 2000)))
    full = np.asarray(
        Image.fromarray(smooth.transpose(1, 2, 0)).resize((1000, 1200), Image.Resampling.BICUBIC)
    ).transpose(2, 0, 1)
    fine = write_svs(tmp_path / "fine.svs", full, mpp=0.5, levels=2, compression=33005)
    coarse = write_svs(tmp_path / "coarse.svs", halved(full), mpp=1.0, compression=33005)
    config = PredictConfig(model=str(model))
    masks = []
    for path in (fine, coarse):
        run = predict([path], path.with_suffix(".zarr"), config).runs[0]
        assert (run.height, run.width) == (1200, 1000)
        assert open_store(path.with_suffix(".zarr")).spec.georeference.mpp == (0.5, 0.5)
        masks.append(mask_of(path.with_suffix(".zarr")))
    assert (masks[0] == masks[1]).mean() >= 0.98


def test_a_mask_of_a_resampled_slide_is_repaired(tmp_path):
    model = identity(tmp_path / "m.onnx")
    slide = write_svs(tmp_path / "a.svs", PICTURE, levels=2, compression=33005)
    out = tmp_path / "mask.zarr"
    config = PredictConfig(model=str(model), mpp=0.8, chunk=128, block=128, tile=64, overlap=16)
    predict([slide], out, config)
    before = mask_of(out)
    chunk = next(p for p in sorted((out / "mask").rglob("*")) if p.is_file() and p.name != ".zarray"
                 and p.suffix != ".json" and not p.name.startswith("."))  # fmt: skip
    chunk.write_bytes(b"rot")
    assert not verify(out).ok
    assert verify(out, repair=True).ok
    assert np.array_equal(mask_of(out), before)


def test_another_resolution_on_the_same_output_is_refused(tmp_path):
    model = identity(tmp_path / "m.onnx")
    slide = write_svs(tmp_path / "a.svs", PICTURE)
    out = tmp_path / "mask.zarr"
    predict([slide], out, PredictConfig(model=str(model)))
    with pytest.raises(TilenetError, match="resampling") as caught:
        predict([slide], out, PredictConfig(model=str(model), mpp=0.8))
    assert caught.value.code == 5


def test_a_broken_tile_of_a_slide_costs_its_own_pixels(tmp_path):
    model = identity(tmp_path / "m.onnx")
    slide = write_svs(tmp_path / "a.svs", PICTURE, compression=33005)
    data = bytearray(slide.read_bytes())
    import tifffile

    with tifffile.TiffFile(slide) as tif:
        offset = tif.pages[0].dataoffsets[1]
    data[offset : offset + 400] = bytes(400)
    slide.write_bytes(data)
    result = predict([slide], tmp_path / "mask.zarr", PredictConfig(model=str(model)))
    assert result.exit_code == 7
    mask = mask_of(tmp_path / "mask.zarr")
    assert (mask[:256, 256:] == 255).all()
    assert (mask[256:] != 255).all()
    assert (mask[:256, :256] != 255).all()


def test_planes_and_resolutions_on_the_command_line(tmp_path, cli):
    model = identity(tmp_path / "m.onnx")
    stack = picture(200, 220, bands=9).reshape(3, 3, 200, 220)
    write_ome(tmp_path / "a.ome.tif", stack, "ZCYX", mpp=0.5)
    base = ["predict", tmp_path / "a.ome.tif", "--out", tmp_path / "m.png", "--model", model]
    refused = cli(*base)
    assert refused.code == 3
    assert "--plane z=1" in refused.err
    assert cli(*base, "--plane", "2").code == 2
    assert cli(*base, "--mpp", "1", "--level", "0").code == 2
    done = cli(*base, "--plane", "z=2", "--mpp", "1", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["height"], found["width"]) == (100, 110)
    assert Path(found["output"]).name == "m.png"


def test_a_pyramid_of_nobodys_is_read_at_the_level_that_fits(tmp_path):
    """Four levels, as OpenSlide's boxes.tiff has them; GDAL reads it, and no level by mistake."""
    path = write_tif(tmp_path / "boxes.tif", PICTURE, block=64, levels=(2, 4, 8))
    assert open_raster(path).info.levels == ((600, 500), (300, 250), (150, 125), (75, 63))
    view = View(source_mpp=0.25, mpp=1.0)
    info = open_raster(path, view).info
    assert (info.level, info.resampling, info.georeference.mpp) == (2, None, (1.0, 1.0))
    between = open_raster(path, View(source_mpp=0.25, mpp=0.8)).info
    assert (between.level, between.height, between.width) == (1, 188, 156)
    with pytest.raises(InputError, match="levels 0 to 3"):
        open_raster(path, View(level=4))


def test_the_mask_of_an_ome_tiff_loses_both_endings(tmp_path, cli):
    (tmp_path / "in").mkdir()
    write_ome(tmp_path / "in" / "a.ome.tif", PICTURE, "CYX")
    model = identity(tmp_path / "m.onnx")
    assert cli("predict", tmp_path / "in", "--out", tmp_path / "out", "--model", model).code == 0
    assert (tmp_path / "out" / "a.png").is_file()
