"""Whole runs: the same bytes however they are cut, scheduled, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import networks
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  registers `.rio`
import torch
import xarray as xr
import zarr
from rasters import picture, write_tif
from rio_cogeo.cogeo import cog_validate

from tilenet.api import predict
from tilenet.blend import Blend
from tilenet.config import PredictConfig
from tilenet.engine import cluster, dasktasks, executor, launch
from tilenet.engine import large as engine_large
from tilenet.engine import run as engine_run
from tilenet.engine.cluster import open_executor
from tilenet.engine.journal import records_of
from tilenet.engine.plan import Plan
from tilenet.engine.spill import needed_by
from tilenet.errors import ClusterError, OutputError, UsageError
from tilenet.geometry import reflect

SIZE = (333, 421)
SMALL = {"tile": 64, "overlap": 32, "chunk": 64, "block": 64, "precision": "fp32"}

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_tif(tmp_path_factory.mktemp("scene") / "scene.tif", picture(*SIZE))


def run(source, out, model, **options):
    config = PredictConfig(model=str(model), **SMALL | options)
    [result] = predict([Path(source)], Path(out), config).runs
    return result


def flags(model, **options):
    pairs = {"model": model, **SMALL, **options}
    return [
        part
        for key, value in pairs.items()
        for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def array(out, name="mask"):
    return np.asarray(zarr.open_group(out, mode="r", use_consolidated=False)[name][...])


def pixels_of(path):
    with rasterio.open(path) as src:
        return src.read()


def contents(folder):
    """Return every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- known answers


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("overlap", [0, 20, 48])
def test_identity(scene, models, tmp_path, blend, overlap):
    out = tmp_path / "x.zarr"
    model = models / "identity.onnx"
    run(scene, out, model, blend=blend, overlap=overlap, block=128, probabilities=True)
    assert np.array_equal(array(out, "prob"), pixels_of(scene))
    assert np.array_equal(array(out), pixels_of(scene).argmax(axis=0))


@pytest.mark.parametrize(
    "size", [(1, 1), (63, 63), (64, 64), (65, 65), (101, 67), (1, 5_000), (5_000, 1)]
)
def test_identity_of_odd_sizes(models, tmp_path, size):
    source = write_tif(tmp_path / "a.tif", picture(*size))
    blends = dict.fromkeys(Blend, 64) | {Blend.HANN: 192, Blend.CROP: 128}
    for blend, block in blends.items():
        out = tmp_path / f"{blend}.zarr"
        options = {"blend": blend, "block": block, "probabilities": True}
        result = run(source, out, models / "identity.onnx", **options)
        assert (result.height, result.width) == size
        assert np.array_equal(array(out, "prob"), pixels_of(source))


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize(
    ("values", "activation"),
    [([0.25, 0.45, 0.75], "none"), ([1.0, 2.0], "softmax"), ([0.3], "sigmoid"), ([0.4], "none")],
)
def test_constant(scene, tmp_path, blend, values, activation):
    model = networks.constant(tmp_path / "m.onnx", values, activation=activation)
    result = run(scene, tmp_path / "x.zarr", model, blend=blend, probabilities=True)
    scores = np.array(values)
    if activation == "softmax":
        scores = np.exp(scores) / np.exp(scores).sum()
    elif activation == "sigmoid":
        scores = 1 / (1 + np.exp(-scores))
    prob = array(tmp_path / "x.zarr", "prob")
    assert np.array_equal(prob, np.broadcast_to(np.rint(scores * 255)[:, None, None], prob.shape))
    expected = int(scores[0] >= 0.5) if len(values) == 1 else int(scores.argmax())
    assert (array(tmp_path / "x.zarr") == expected).all()
    counted = {c.id: c.pixels for c in result.classes}
    assert counted == {k: (k == expected) * SIZE[0] * SIZE[1] for k in counted}


@pytest.mark.parametrize("blend", Blend)
def test_a_constant_at_the_threshold_is_class_1_everywhere(scene, tmp_path, blend):
    model = networks.constant(tmp_path / "m.onnx", [0.3], threshold=0.3)
    run(scene, tmp_path / "x.zarr", model, blend=blend, overlap=48)
    assert (array(tmp_path / "x.zarr") == 1).all()


def test_scores_that_are_not_finite(models, tmp_path):
    pixels = picture(*SIZE)
    pixels[0] = np.maximum(pixels[0], 1)
    pixels[0, 100:120, 50:90] = 0  # the network divides by it
    source = write_tif(tmp_path / "a.tif", pixels)
    result = run(source, tmp_path / "x.zarr", models / "broken.onnx", probabilities=True)
    assert result.nonfinite_scores > 0
    prob = array(tmp_path / "x.zarr", "prob")
    assert not prob[:, 100:120, 50:90].any()
    outside = np.ones(SIZE, bool)
    outside[100:120, 50:90] = False
    assert (prob[:, outside] == 255).all()


def test_255_classes(tmp_path):
    model = networks.pointwise(tmp_path / "m.onnx", channels=255)
    source = write_tif(tmp_path / "a.tif", picture(70, 90))
    run(source, tmp_path / "x.zarr", model)
    weights = expected_weights(255)
    expected = np.einsum("kc,chw->khw", weights, picture(70, 90).astype(np.float64)).argmax(axis=0)
    assert (array(tmp_path / "x.zarr") == expected).mean() > 0.999  # float32 may tie otherwise


def expected_weights(channels, bands=3, seed=1):
    weights = 4 * np.random.default_rng(seed).normal(size=(channels, bands)).astype(np.float32)
    return weights - weights.mean(axis=1, keepdims=True)


# -- the same bytes


@pytest.fixture(scope="module", params=[3, 8])
def original(request, scene, models, tmp_path_factory):
    """Return a positional network, the options and the mask made in one block."""
    model = models / ("positional.onnx" if request.param == 3 else "positional8.onnx")
    out = tmp_path_factory.mktemp("original") / "x.zarr"
    options = {"probabilities": True, "overlap": 40, "tile": 96}
    result = run(scene, out, model, **options | {"block": 512})
    assert result.blocks == 1
    assert len(np.unique(array(out))) > request.param // 2
    return model, options, out


def assert_same(out, original):
    for name in ("mask", "prob"):
        assert np.array_equal(array(out, name), array(original, name))


@pytest.mark.parametrize("block", [64, 128, 192])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_same_bytes_for_any_block_size(scene, tmp_path, original, block, batch_size):
    model, options, expected = original
    options = options | {"block": block, "batch_size": batch_size}
    result = run(scene, tmp_path / "x.zarr", model, **options)
    assert result.blocks == (-(-SIZE[0] // block)) * (-(-SIZE[1] // block))
    assert result.tiles_forwarded == result.tiles > 1
    assert_same(tmp_path / "x.zarr", expected)
    ours, theirs = contents(tmp_path / "x.zarr"), contents(expected)
    chunks = {k for k in theirs if k.startswith(("mask/", "prob/", "ovr_"))}
    assert all(ours[k] == theirs[k] for k in chunks)


@pytest.mark.long
@pytest.mark.parametrize("original", [8], indirect=True)
def test_same_bytes_in_many_blocks_on_dask(command, scene, tmp_path, original):
    model, options, expected = original
    line = flags(model, **options | {"block": 16, "chunk": 16})
    done = command("predict", scene, "--out", tmp_path / "x.zarr", *line, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["blocks"] == 21 * 27  # too many for the thread pool; tasks of two blocks
    assert found["tiles_forwarded"] == found["tiles"]
    assert_same(tmp_path / "x.zarr", expected)


def test_same_bytes_when_run_again_in_one_process(scene, models, tmp_path):
    for _ in range(2):
        result = run(scene, tmp_path / "x.zarr", models / "identity.onnx", overwrite=True)
        assert result.blocks > 1
        assert result.blocks_resumed == 0
    assert np.array_equal(array(tmp_path / "x.zarr"), pixels_of(scene).argmax(axis=0))


@pytest.mark.parametrize("original", [8], indirect=True)
def test_same_bytes_with_two_processes(command, scene, tmp_path, original):
    model, options, expected = original
    line = flags(model, **options | {"scheduler": "processes:2"})
    done = command("predict", scene, "--out", tmp_path / "x.zarr", *line, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tiles_forwarded"] == found["tiles"]
    assert_same(tmp_path / "x.zarr", expected)


@contextmanager
def started_by_hand(folder, environment):
    """Start a scheduler and a worker; yields the address and both processes."""
    dask = str(Path(sys.executable).with_name("dask"))
    file = folder / "scheduler.json"
    lines = [
        [dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
         "--scheduler-file", str(file)],
        [dask, "worker", "--scheduler-file", str(file), "--nthreads", "2", "--no-nanny",
         "--no-dashboard", "--host", "127.0.0.1", "--local-directory", str(folder)],
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        running = [
            subprocess.Popen(line, env=environment, stdout=log, stderr=log, cwd=folder)
            for line in lines
        ]
        try:
            wait_for(lambda: file.exists() and file.read_text().endswith("}"))
            yield json.loads(file.read_text())["address"], running
        finally:
            for process in running[::-1]:
                process.terminate()
                process.wait(20)


@pytest.fixture(scope="module")
def address(tmp_path_factory, environment):
    with started_by_hand(tmp_path_factory.mktemp("dask"), environment) as (address, _):
        yield address


def wait_for(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.002)


@pytest.mark.parametrize("original", [8], indirect=True)
def test_same_bytes_on_a_cluster_started_by_hand(
    command, scene, tmp_path, original, address, monkeypatch
):
    model, options, expected = original
    monkeypatch.chdir(tmp_path)  # the worker stands elsewhere
    line = flags(model, **options | {"scheduler": address})
    done = command("predict", os.path.relpath(scene), "--out", "x.zarr", *line, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tiles_forwarded"] == found["tiles"]
    assert_same(tmp_path / "x.zarr", expected)


def test_a_cluster_that_is_lost(models, tmp_path, environment, monkeypatch):
    for module in (dasktasks, executor):
        monkeypatch.setattr(module, "LOOK", 0.2)
    monkeypatch.setattr(launch, "_GRACE", 1.0)
    source = write_tif(tmp_path / "a.tif", picture(1200, 1200))
    out = tmp_path / "x.zarr"
    with started_by_hand(tmp_path, environment) as (address, processes):
        journal = tmp_path / ".x.zarr.tilenet" / "journal.jsonl"

        def end() -> None:
            wait_for(lambda: journal.exists() and journal.stat().st_size)
            for process in processes:
                process.kill()

        ending = threading.Thread(target=end)
        ending.start()
        with pytest.raises(ClusterError) as caught:
            run(source, out, models / "positional.onnx", scheduler=address)
        ending.join()
    assert caught.value.code == 9
    assert run(source, out, models / "positional.onnx").blocks_resumed > 0


class CutOff:
    """A future whose result cannot be fetched: the link broke."""

    def result(self):
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_link_that_breaks_while_a_result_is_fetched():
    with open_executor("local", 1000) as executor, pytest.raises(ClusterError) as caught:
        executor.result(CutOff())
    assert caught.value.code == 9


def test_a_local_cluster_opens_no_port_to_others():
    import psutil

    with open_executor("local", 1000) as executor:
        assert executor.submit(sum, [1, 2]).result() == 3
        listening = [
            c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"
        ]
    assert not [a for a in listening if a.ip not in ("127.0.0.1", "::1")]


# -- nodata


def nodata_scene(folder, kind):
    pixels = np.maximum(picture(512, 640), 1)
    keep = np.ones((512, 640), bool)
    keep[:, :320] = False
    keep[40:60, 500:520] = False
    pixels[:, ~keep] = 0
    alpha = keep * np.uint8(255)
    source = folder / "half.tif"
    if kind == "alpha":
        return write_tif(source, pixels, alpha=alpha), keep
    return write_tif(source, pixels, nodata=0), keep


@pytest.mark.parametrize("kind", ["nodata", "alpha"])
@pytest.mark.parametrize("blend", ["gaussian", "crop"])
def test_half_of_it_nodata(models, tmp_path, kind, blend):
    source, keep = nodata_scene(tmp_path, kind)
    options = {"probabilities": True, "blend": blend, "block": 128}
    model = models / "positional.onnx"
    skipped = run(source, tmp_path / "a.zarr", model, **options)
    every = run(source, tmp_path / "b.zarr", model, **options, skip_nodata=False)
    assert skipped.tiles == every.tiles == every.tiles_forwarded
    assert skipped.tiles_forwarded == skipped.tiles - skipped.tiles_skipped
    assert 0.45 < skipped.tiles_forwarded / skipped.tiles < 0.6
    assert every.tiles_skipped == 0
    for name in ("mask", "prob"):
        assert np.array_equal(array(tmp_path / "a.zarr", name), array(tmp_path / "b.zarr", name))
    mask = array(tmp_path / "a.zarr")
    assert np.array_equal(mask == 255, ~keep)
    assert skipped.nodata_pixels == int((~keep).sum())
    assert sum(c.pixels for c in skipped.classes) == int(keep.sum())


def test_no_skip_on_the_command_line(cli, models, tmp_path):
    source, _ = nodata_scene(tmp_path, "nodata")
    line = flags(models / "pointwise.onnx", block=128)
    done = cli("predict", source, "--out", tmp_path / "a.zarr", *line, "--json", "--no-skip")
    found = json.loads(done.out)
    assert (done.code, found["tiles_skipped"]) == (0, 0)
    assert found["tiles_forwarded"] == found["tiles"]


def test_what_the_network_sees_at_nodata_is_the_mean(models, tmp_path):
    source, keep = nodata_scene(tmp_path, "nodata")
    # With a mean of 0.5, nodata becomes 0 inside the network: its neighbours see mean pixels.
    for out, pixels in (("a", None), ("b", 128)):
        shown = pixels_of(source)
        if pixels is not None:
            shown[:, ~keep] = pixels
            shown_at = write_tif(tmp_path / "filled.tif", shown)
        else:
            shown_at = source
        model = networks.conv(tmp_path / "m.onnx", mean=[128 / 255])
        run(shown_at, tmp_path / f"{out}.zarr", model, probabilities=True, block=128)
    mask, filled = (array(tmp_path / f"{k}.zarr", "prob")[:, keep] for k in "ab")
    assert np.array_equal(mask, filled)


def test_nothing_valid(models, tmp_path):
    source = write_tif(tmp_path / "a.tif", np.zeros((3, 200, 200), np.uint8), nodata=0)
    result = run(source, tmp_path / "x.zarr", models / "conv.onnx")
    assert (result.tiles_forwarded, result.nodata_pixels) == (0, 200 * 200)
    assert (array(tmp_path / "x.zarr") == 255).all()


# -- the whole-image pass


def test_crop_with_enough_halo_is_the_whole_image_pass(scene, models, tmp_path):
    model = models / "conv.onnx"
    options = {"blend": "crop", "probabilities": True}
    run(scene, tmp_path / "a.zarr", model, **options | {"overlap": 8})
    run(scene, tmp_path / "b.zarr", model, **options | {"tile": 512, "overlap": 0})
    assert np.array_equal(array(tmp_path / "a.zarr"), array(tmp_path / "b.zarr"))
    assert np.array_equal(array(tmp_path / "a.zarr", "prob"), array(tmp_path / "b.zarr", "prob"))


def whole_image(folder, pixels):
    """Return the scores of one forward over the whole image, padded to a multiple of 32."""
    import segmentation_models_pytorch as smp

    network = smp.from_pretrained(folder).eval()
    height, width = pixels.shape[1:]
    rows = reflect(0, -(-height // 32) * 32, height)
    cols = reflect(0, -(-width // 32) * 32, width)
    padded = pixels[:, rows[:, None], cols].astype(np.float32)
    with torch.inference_mode():
        inputs = (torch.from_numpy(padded)[None] / 255 - 0.4) / 0.25
        scores = network(inputs)[0, :, :height, :width].softmax(dim=0)
    return scores.numpy()


def assert_classes(mask, scores):
    """The mask is the argmax; only where two classes tie to 1e-5 may arithmetic choose."""
    first, second = np.sort(scores, axis=0)[[-1, -2]]
    differs = mask != scores.argmax(axis=0)
    assert differs.mean() < 1e-4
    assert not differs[first - second > 1e-5].any()


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("size", [(97, 53), (31, 65), (2, 40), (200, 260)])
def test_a_tile_that_exceeds_the_image_is_the_whole_image_pass(unet, tmp_path, backend, size):
    source = write_tif(tmp_path / "a.tif", picture(*size, seed=sum(size)))
    options = {"backend": backend, "tile": 512, "overlap": 64}
    run(source, tmp_path / "x.zarr", unet, **options)
    mask = array(tmp_path / "x.zarr")
    assert_classes(mask, whole_image(unet, pixels_of(source)))
    assert len(np.unique(mask)) > 1 or min(size) == 2


@pytest.mark.parametrize(
    ("depth", "tile", "overlap", "size"), [(3, 256, 160, SIZE), (5, 768, 576, (801, 970))]
)
def test_unet_crop_with_enough_halo(tmp_path, depth, tile, overlap, size):
    folder = networks.unet(tmp_path / "unet", depth=depth)
    source = write_tif(tmp_path / "a.tif", picture(*size))
    options = {"backend": "torch", "blend": "crop", "tile": tile, "overlap": overlap, "block": 512}
    result = run(source, tmp_path / "x.zarr", folder, **options)
    assert result.tiles >= 6
    scores = whole_image(folder, pixels_of(source))
    assert_classes(array(tmp_path / "x.zarr"), scores)
    run(source, tmp_path / "y.zarr", folder, **options | {"tile": 64, "overlap": 0})
    assert (array(tmp_path / "y.zarr") != scores.argmax(axis=0)).mean() > 1e-4  # too little halo


def test_a_fixed_network_on_smaller_rasters(models, tmp_path):
    weights = expected_weights(3)
    for size in ((20, 30), (64, 10), (100, 64), (150, 200)):
        pixels = picture(*size)
        source = write_tif(tmp_path / f"{size}.tif", pixels)
        out = tmp_path / f"{size}.zarr"
        result = run(source, out, models / "fixed.onnx", tile=None, overlap=None, block=128)
        assert result.tile == 64
        expected = np.einsum("kc,chw->khw", weights, pixels.astype(np.float64)).argmax(axis=0)
        assert (array(out) == expected).mean() > 0.999
    with pytest.raises(UsageError, match="takes tiles of 64 only"):
        run(source, tmp_path / "no.zarr", models / "fixed.onnx", tile=128, overlap=0)


# -- georeference, bands, levels


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "mapped.tif"
    return write_tif(path, picture(*SIZE), georeferenced=True, levels=(2, 4))


def classes_at(source, points):
    weights = expected_weights(3)
    with rasterio.open(source) as src:
        return [int((weights @ v.astype(np.float64)).argmax()) for v in src.sample(points)]


def some_points(source, count=60):
    rng = np.random.default_rng(0)
    with rasterio.open(source) as src:
        rows, cols = rng.integers(0, src.height, count), rng.integers(0, src.width, count)
        return [src.xy(int(r), int(c)) for r, c in zip(rows, cols, strict=True)]


def test_a_cog_opens_at_the_right_coordinates(mapped, models, tmp_path):
    out = tmp_path / "x.tif"
    run(mapped, out, models / "pointwise.onnx", probabilities=True)
    points = some_points(mapped)
    with rasterio.open(out) as dst, rasterio.open(mapped) as src:
        assert (dst.crs, dst.transform, dst.shape) == (src.crs, src.transform, src.shape)
        assert [int(v[0]) for v in dst.sample(points)] == classes_at(mapped, points)
    valid, errors, _ = cog_validate(str(out))
    assert valid, errors
    with rasterio.open(tmp_path / "x.prob.tif") as prob:
        assert prob.count == 3
        assert prob.transform == rasterio.open(mapped).transform
        assert np.array_equal(prob.read().argmax(axis=0), pixels_of(out)[0]) or (
            (prob.read().argmax(axis=0) == pixels_of(out)[0]).mean() > 0.9  # bytes tie
        )


# rioxarray 0.22 multiplies affine transforms in a way that affine deprecates.
@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
def test_a_store_opens_at_the_right_coordinates(mapped, models, tmp_path):
    out = tmp_path / "x.zarr"
    run(mapped, out, models / "pointwise.onnx")
    assert json.loads((out / "zarr.json").read_text())["zarr_format"] == 3
    points = some_points(mapped)
    with xr.open_zarr(out, decode_coords="all") as data, rasterio.open(mapped) as src:
        assert data["mask"].rio.crs == src.crs
        found = [int(data["mask"].sel(x=x, y=y, method="nearest")) for x, y in points]
    assert found == classes_at(mapped, points)


def test_a_plain_image_makes_a_version_2_store(scene, models, tmp_path):
    run(scene, tmp_path / "x.zarr", models / "pointwise.onnx")
    assert (tmp_path / "x.zarr" / ".zgroup").exists()


def test_bands_in_the_order_asked_for(models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(90, 100, bands=5))
    options = {"bands": (3, 1, 5), "probabilities": True}
    run(source, tmp_path / "x.zarr", models / "identity.onnx", **options)
    assert np.array_equal(array(tmp_path / "x.zarr", "prob"), pixels_of(source)[[2, 0, 4]])


@pytest.mark.parametrize("level", [1, 2])
def test_level(mapped, models, tmp_path, level):
    factor = 2**level
    options = {"level": level, "probabilities": True}
    for name in ("x.tif", "x.zarr"):
        run(mapped, tmp_path / name, models / "identity.onnx", **options)
    with rasterio.open(mapped, OVERVIEW_LEVEL=level - 1) as coarse:
        shape, expected = coarse.shape, coarse.read()
    assert shape == (-(-SIZE[0] // factor), -(-SIZE[1] // factor))
    assert np.array_equal(array(tmp_path / "x.zarr", "prob"), expected)
    assert np.array_equal(pixels_of(tmp_path / "x.prob.tif"), expected)
    with rasterio.open(tmp_path / "x.tif") as dst, rasterio.open(mapped) as src:
        assert dst.shape == shape
        assert dst.transform.a == pytest.approx(10 * SIZE[1] / shape[1])
        assert dst.transform.e == pytest.approx(-10 * SIZE[0] / shape[0])
        assert (dst.transform.c, dst.transform.f) == (src.transform.c, src.transform.f)
        assert dst.bounds == pytest.approx(src.bounds)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint32", "float64"])
def test_other_pixels_than_bytes(models, tmp_path, dtype):
    source = write_tif(tmp_path / "a.tif", picture(70, 100, dtype=dtype))
    run(source, tmp_path / "x.zarr", models / "identity.onnx", probabilities=True)
    expected = np.rint(pixels_of(source).astype(np.float64)).astype(np.uint8)
    assert np.abs(array(tmp_path / "x.zarr", "prob").astype(int) - expected).max() <= 1
    if dtype not in ("float32", "float64"):
        assert np.array_equal(array(tmp_path / "x.zarr", "prob"), expected)


# -- resuming

RESUMED = {"overlap": 48, "probabilities": True}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_tif(tmp_path_factory.mktemp("large") / "large.tif", picture(500, 500, seed=5))


@pytest.fixture(scope="module")
def undisturbed(large, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "x.zarr"
    result = run(large, out, models / "positional.onnx", **RESUMED)
    assert result.blocks == 64
    return contents(out)


@pytest.fixture(scope="module")
def killed(large, models, environment, tmp_path_factory):
    """Return the folder of a run that was killed half-way."""
    folder = tmp_path_factory.mktemp("killed")
    line = [sys.executable, "-m", "tilenet", "predict", str(large), "--out", str(folder / "x.zarr")]
    line += flags(models / "positional.onnx", **RESUMED)
    journal = folder / ".x.zarr.tilenet" / "journal.jsonl"
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE) as process:
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 6)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "x.zarr").exists()
    assert journal.read_bytes().count(b"\n") < 60
    return folder


@pytest.fixture
def half_done(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "again")
    return tmp_path / "again"


def resume(large, models, folder, **options):
    return run(large, folder / "x.zarr", models / "positional.onnx", **RESUMED | options)


def test_resume_after_a_kill(large, models, half_done, undisturbed):
    finished = (half_done / ".x.zarr.tilenet" / "journal.jsonl").read_bytes().count(b"\n")
    result = resume(large, models, half_done)
    assert result.blocks_resumed == finished > 0
    assert result.tiles_forwarded < result.tiles
    assert contents(half_done / "x.zarr") == undisturbed
    assert not (half_done / ".x.zarr.tilenet").exists()


def test_resume_with_other_blocks_and_batches(large, models, half_done, undisturbed):
    result = resume(large, models, half_done, block=128, batch_size=3)
    assert result.blocks == 64
    assert contents(half_done / "x.zarr") == undisturbed


def test_resume_in_tasks_of_many_blocks(large, models, half_done, undisturbed, monkeypatch):
    for module in (cluster, engine_run):
        monkeypatch.setattr(module, "FEW_BLOCKS", 8)  # 64 blocks on Dask, eight to a task
    result = resume(large, models, half_done)
    assert result.blocks_resumed > 0
    assert result.tiles_forwarded < result.tiles
    assert contents(half_done / "x.zarr") == undisturbed


def test_resume_of_a_torn_journal(large, models, half_done, undisturbed):
    journal = half_done / ".x.zarr.tilenet" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: whole.rindex(b"\n", 0, -1) - 40])
    result = resume(large, models, half_done)
    assert result.blocks_resumed == whole.count(b"\n") - 2
    assert contents(half_done / "x.zarr") == undisturbed


def test_resume_without_the_strips(large, models, half_done, undisturbed):
    strips = list((half_done / ".x.zarr.tilenet" / "strips").glob("*.strips"))
    assert strips
    for strip in strips:
        strip.unlink()
    resume(large, models, half_done)
    assert contents(half_done / "x.zarr") == undisturbed


def test_resume_removes_what_nobody_needs(large, models, half_done, undisturbed, monkeypatch):
    """Half-written files, strips of blocks that are done, and the tokens of killed runs."""
    folder, seen = half_done / ".x.zarr.tilenet", {}
    lattice = Plan.load((folder / "plan.json").read_bytes()).lattice
    done = {record.block for record in records_of([folder / "journal.jsonl"])}
    (folder / "models").mkdir()
    (folder / ".0123abcd.tmp" / "mask").mkdir(parents=True)
    planted = [folder / name for name in (
        "strips/.63.own.0123abcd.tmp", "strips/.64.strips.0123abcd.tmp", "old.run",
        "models/.0123.onnx.0123abcd.tmp", ".0123abcd.tmp/mask/0",
    )]  # fmt: skip
    planted += [folder / f"strips/{block}.own" for block in sorted(done)]
    for path in planted:
        path.write_bytes(b"left")
    before = {path.name for path in (folder / "strips").iterdir()}
    needed = {
        name
        for block in range(lattice.blocks)
        for name, takers in needed_by(lattice, block).items()
        if not done.issuperset(takers)
    }

    def look(plan, folder, *arguments):
        seen["tokens"] = list(folder.glob("*.run"))
        seen["others"] = list(folder.glob(".*"))
        seen["strips"] = {path.name for path in (folder / "strips").iterdir()}
        seen["models"] = list((folder / "models").iterdir())
        return run_blocks(plan, folder, *arguments)

    run_blocks = engine_large.run_blocks
    monkeypatch.setattr(engine_large, "run_blocks", look)
    resume(large, models, half_done)
    assert seen == {"tokens": [], "others": [], "strips": before & needed, "models": []}
    assert before & needed
    assert contents(half_done / "x.zarr") == undisturbed


def test_resume_with_damaged_strips(large, models, half_done, undisturbed):
    spilled = [p for p in (half_done / ".x.zarr.tilenet" / "strips").iterdir() if p.is_file()]
    for k, path in enumerate(sorted(p for p in spilled if p.stat().st_size)):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if k % 2 else data[: len(data) // 3])
    resume(large, models, half_done)
    assert contents(half_done / "x.zarr") == undisturbed


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"overlap": 16}, "overlap"),
        ({"blend": "hann"}, "blend"),
        ({"threshold": 0.3}, "threshold"),
        ({"probabilities": False}, "probabilities"),
    ],
)
def test_other_options_than_those_of_the_half_done_run(large, models, half_done, options, key):
    before = contents(half_done)
    with pytest.raises(OutputError, match=key):
        resume(large, models, half_done, **options)
    after = contents(half_done)
    assert {k: v for k, v in after.items() if not k.endswith("lock")} == {
        k: v for k, v in before.items() if not k.endswith("lock")
    }


def test_overwrite_drops_a_half_done_run(large, models, half_done):
    result = resume(large, models, half_done, blend="hann", overwrite=True)
    assert result.blocks_resumed == 0
    assert result.tiles_forwarded == result.tiles


@pytest.mark.parametrize("name", ["x.zarr", "x.tif", "x.png"])
def test_a_finished_output(cli, scene, models, tmp_path, name):
    out, line = tmp_path / name, flags(models / "conv.onnx")
    assert cli("predict", scene, "--out", out, *line).code == 0
    before = contents(tmp_path)
    again = cli("predict", scene, "--out", out, *line, "--json")
    found = json.loads(again.out)
    assert (again.code, found["tiles_forwarded"]) == (0, 0)
    assert found["blocks_resumed"] == found["blocks"] == 42
    assert sum(c["pixels"] for c in found["classes"]) == SIZE[0] * SIZE[1]
    refused = cli("predict", scene, "--out", out, *line, "--blend", "crop")
    assert refused.code == 5
    assert "blend" in refused.err
    assert contents(tmp_path) == before
    replaced = cli("predict", scene, "--out", out, *line, "--blend", "crop", "--overwrite")
    assert replaced.code == 0, replaced.err
    fresh = tmp_path / "fresh"
    assert cli("predict", scene, "--out", fresh / name, *line, "--blend", "crop").code == 0
    changed = {k: v for k, v in contents(tmp_path).items() if not k.startswith("fresh")}
    assert changed == contents(fresh)


def test_overwrite_is_refused_on_what_is_not_ours(cli, scene, models, tmp_path):
    folder, file = tmp_path / "theirs.zarr", tmp_path / "theirs.tif"
    zarr.create_group(folder, zarr_format=3)
    write_tif(file, picture(20, 20))
    before = contents(tmp_path)
    for out in (folder, file):
        done = cli("predict", scene, "--out", out, *flags(models / "conv.onnx"), "--overwrite")
        assert done.code == 5
    assert {k: v for k, v in contents(tmp_path).items() if k in before} == before


def test_a_changed_source_is_another_run(cli, models, tmp_path):
    source, out = tmp_path / "a.tif", tmp_path / "x.zarr"
    line = flags(models / "conv.onnx")
    write_tif(source, picture(100, 100))
    assert cli("predict", source, "--out", out, *line).code == 0
    write_tif(source, picture(100, 100, seed=1))
    done = cli("predict", source, "--out", out, *line)
    assert done.code == 5
    assert "input" in done.err


def test_a_second_run_of_one_output_is_refused(large, models, half_done):
    import fcntl

    with (half_done / ".x.zarr.tilenet" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing"):
            resume(large, models, half_done)


def test_dry_run_touches_nothing(cli, scene, models, tmp_path):
    out = tmp_path / "x.zarr"
    line = flags(models / "conv.onnx")
    done = cli("predict", scene, "--out", out, *line, "--dry-run", "--json")
    estimate = json.loads(done.out)["estimate"]
    assert done.code == 0
    assert not list(tmp_path.iterdir())
    result = run(scene, out, models / "conv.onnx")
    for key in ("tiles", "blocks", "pixels", "tile", "overlap", "plan_hash"):
        assert estimate[key] == getattr(result, key)
