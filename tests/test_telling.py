"""What a run says of itself: remarks, figures, what it waited for."""

import time
from contextlib import closing

import networks
import pytest
import rasterio
from crashes import BLOCKS, Crash, crash, run
from rasterio.transform import Affine
from rasters import picture, write_image, write_tif

from tilenet.api import predict
from tilenet.blend import Blend, Decision
from tilenet.config import PredictConfig
from tilenet.engine import large
from tilenet.engine.block import BlockJob, drive
from tilenet.engine.meter import Meter, Spans
from tilenet.lattice import Axis, Lattice
from tilenet.models.session import choose, open_session
from tilenet.models.store import find_model
from tilenet.predicting.telling import say_bottleneck
from tilenet.results import PredictResult, times_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

ROTATED = Affine(8, 6, 5e5, 6, -8, 5e6)
CUTS = {"one block": (), "many blocks": tuple(f"--{k}={v}" for k, v in BLOCKS.items())}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.positional(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.mark.parametrize("cut", CUTS)
def test_a_rotated_grid(cut, cli, model, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(150, 200), georeferenced=True)
    with rasterio.open(source, "r+") as dst:
        dst.transform = ROTATED
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", model, *CUTS[cut])
    assert done.code == 0
    assert "do not see the affine" in done.err
    assert "× the pixels)" in done.err  # the redundancy


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_numbers_that_the_model_does_not_expect(cut, dtype, cli, model, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(150, 200).astype(dtype))
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", model, *CUTS[cut])
    assert f"pixels are {dtype}, but the model expects values 0 to 255" in done.err


@pytest.mark.parametrize("cut", CUTS)
def test_a_place_that_is_lost(cut, cli, model, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(150, 200), georeferenced=True)
    done = cli("predict", source, "--out", tmp_path / "x.ome.tif", "--model", model, *CUTS[cut])
    assert "an OME-TIFF has no place on a map" in done.err


def test_many_rasters_say_it_once(cli, model, tmp_path):
    for k in range(3):
        write_tif(tmp_path / "in" / f"{k}.tif", picture(60, 50).astype("uint16"))
    done = cli("predict", tmp_path / "in", "--out", tmp_path / "m", "--model", model)
    assert done.code == 0
    [line] = [line for line in done.err.splitlines() if "pixels are uint16" in line]
    assert line.endswith("(3 rasters)")
    assert "3 rasters of one block: tiles of " in done.err


def test_figures_of_small_rasters_add_up(model, tmp_path):
    for k in range(5):
        write_image(tmp_path / "in" / f"{k}.png", picture(60, 50 + k))
    config = PredictConfig(model=str(model))
    found = predict([tmp_path / "in"], tmp_path / "m", config)
    assert 0 < sum(one.seconds for one in found.runs) <= found.seconds + 0.01
    assert found.wait_seconds == pytest.approx(found.seconds - found.forward_seconds, abs=1e-3)
    assert found.mpixels_per_second == pytest.approx(found.pixels / 1e6 / found.seconds, abs=1e-3)
    assert all(0 <= one.efficiency <= 1 for one in (found, *found.runs))
    again = predict([tmp_path / "in"], tmp_path / "m", config)
    assert again.mpixels_per_second == 0  # it made none
    assert again.forward_seconds == 0


def test_the_only_run_is_all_of_it(model, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(150, 200))
    found = predict([source], tmp_path / "x.zarr", PredictConfig(model=str(model), **BLOCKS))
    [one] = found.runs
    assert one.forward_seconds > 0
    names = set(times_of(Meter(), 0)) - {"seconds"}
    assert {n: getattr(found, n) for n in names} == {n: getattr(one, n) for n in names}
    assert found.peak_rss_bytes == one.peak_rss_bytes > 0
    assert one.redundancy > 1


def test_pixels_per_second_are_those_of_this_run(model, tmp_path, monkeypatch):
    source = write_tif(tmp_path / "a.tif", picture(150, 200))
    with monkeypatch.context() as patch:
        patch.setattr(large, "check_unchanged", crash)
        with pytest.raises(Crash):
            run(source, tmp_path / "x.zarr", model)
    result = run(source, tmp_path / "x.zarr", model)
    assert result.blocks_resumed == result.blocks
    assert result.mpixels_per_second == 0


def test_an_export_counts_as_writing(model, tmp_path, monkeypatch):
    source, export = write_tif(tmp_path / "a.tif", picture(150, 200)), large.export

    def slow(*arguments, **options):
        time.sleep(0.5)
        export(*arguments, **options)

    monkeypatch.setattr(large, "export", slow)
    assert run(source, tmp_path / "x.tif", model).write_seconds > 0.5


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_what_is_done_beside_the_network_is_no_forward(backend):
    files = find_model("nuclei", None, {})
    session = open_session(files, choose(files, backend=backend), "uint8")
    spans, start = Spans(), time.time()
    tiles = [(session.load(picture(64, 64)), 0, 0)] * 4
    with closing(session.scores(tiles, (64, 64), spans)) as scores:
        for _ in scores:
            time.sleep(0.3)
    wall = time.time() - start
    assert wall > 1.2
    assert 0 < spans.forward_seconds < wall - 0.6
    assert spans.forward[0][0] >= start
    assert spans.forward[-1][1] <= start + wall
    if backend == "openvino":  # it is compiled for a tile
        assert 0 < spans.prepare < wall - spans.forward_seconds


def test_adding_up_is_told_apart(model):
    files = find_model(str(model), None, {})
    session, spans = open_session(files, choose(files), "uint8"), Spans()
    lattice = Lattice(*(Axis(n, 64, 48, 1, 256) for n in (150, 200)))
    decision = Decision("softmax", 0.5, exact=False)
    job = BlockJob(
        lattice, 0, None, channels=session.channels, blend=Blend.GAUSSIAN, decision=decision
    )
    drive(session, [(job, session.load(picture(150, 200)))], lattice.tile_shape, spans)
    assert spans.blend > 0


@pytest.mark.parametrize(
    ("most", "figure"),
    [("reading", "read"), ("writing", "write"), ("adding up", "blend"),
     ("preparing the network", "prepare")],
)  # fmt: skip
def test_the_bottleneck(most, figure, caplog):
    caplog.set_level("INFO", "tilenet")
    times = {"seconds": 2.0, "forward_seconds": 0.6, "efficiency": 0.3, "read_seconds": 0.1}
    say_bottleneck(PredictResult((), **times | {f"{figure}_seconds": 1.25}))
    assert caplog.messages == [
        f"the network ran 30 % of the time; {most} took most beside it: 1.2 s over its threads"
    ]
    caplog.clear()
    say_bottleneck(PredictResult((), **times | {"efficiency": 0.7}))
    say_bottleneck(PredictResult((), **times | {"forward_seconds": 0.0}))  # it made none
    assert caplog.messages == []
