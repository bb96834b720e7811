"""Models: cards, backends, the batch contract, what is loaded and what is not."""

import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import networks
import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import zarr
from rasters import picture, write_tif

from tilenet.blend import Blend, Decision
from tilenet.engine import task
from tilenet.engine.admission import MODELS, admitting
from tilenet.engine.block import BlockJob, drive
from tilenet.errors import ModelError, UsageError
from tilenet.lattice import Axis, Lattice
from tilenet.models import openvino_graph
from tilenet.models.build import build_network
from tilenet.models.card import parse_card
from tilenet.models.contract import keeps_batch_contract
from tilenet.models.devices import cpu_precisions
from tilenet.models.session import Setup, choose, network_shape, open_session
from tilenet.models.store import bundled_models, find_model, identified

needs_bf16 = pytest.mark.skipif("bf16" not in cpu_precisions(), reason="no bf16 on this processor")
PRECISIONS = ["fp32", pytest.param("bf16", marks=needs_bf16)]


def setup(backend, precision, batch_size=4, device="cpu"):
    return Setup(backend, device, precision, 2, batch_size, "")


# -- the batch contract


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_batch_contract_of_the_bundled_model(backend, precision):
    files = find_model("nuclei", None, {})
    session = open_session(files, setup(backend, precision), "uint8")
    assert keeps_batch_contract(session, files.card, (64, 96))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("name", ["conv", "positional"])
def test_batch_contract_of_an_onnx(models, precision, dtype, name):
    files = find_model(str(models / f"{name}.onnx"), None, {})
    session = open_session(files, setup("openvino", precision), dtype)
    assert keeps_batch_contract(session, files.card, (48, 64), dtype)


def test_the_contract_sees_a_network_that_breaks_it(models):
    files = find_model(str(models / "conv.onnx"), None, {})
    session = open_session(files, setup("openvino", "fp32"), "uint8")
    honest = session.scores

    def leaking(tiles, shape):
        for k, scores in enumerate(honest(tiles, shape)):
            yield scores * np.float32(1 - 0.01 * k)  # the place in the sequence shows

    session.scores = leaking
    assert not keeps_batch_contract(session, files.card, (48, 64))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("side", [64, 256])
def test_how_many_are_forwarded_together_on_a_cpu_changes_nothing(backend, precision, side):
    """Kernels for several tiles at once would differ from those for one, in the last bits."""
    files = find_model("nuclei", None, {})
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, 3 * side), np.uint8)
    tiles = [(pixels, 0, k * side) for k in range(3)]

    def scores(batch_size, threads=2):
        how = replace(setup(backend, precision, batch_size), threads=threads)
        session = open_session(files, how, "uint8")
        loaded = [(session.load(one), row, col) for one, row, col in tiles]
        return np.stack([np.array(one) for one in session.scores(loaded, (side, side))])

    alone = scores(1)
    assert np.array_equal(scores(8), alone)
    if backend == "openvino":  # torch's kernels follow the threads
        assert np.array_equal(scores(1, threads=1), alone)


# -- backends


@pytest.fixture(scope="module")
def pixels():
    return picture(160, 128)


def scores_of(files, backend, pixels, precision="fp32", dtype="uint8"):
    session = open_session(files, setup(backend, precision, 1), dtype)
    with session.lock:
        [scores] = session.scores([(session.load(pixels.astype(dtype)), 0, 0)], pixels.shape[1:])
        return np.asarray(scores).copy()


def test_openvino_gives_what_torch_gives(unet, pixels):
    for name in ("nuclei", str(unet)):
        files = find_model(name, None, {})
        ours, theirs = (scores_of(files, b, pixels) for b in ("openvino", "torch"))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-4
        assert theirs.std() > 1e-3


def added_up(session, pixels, blend=Blend.GAUSSIAN):
    """Return the mask of a block of four tiles."""
    lattice = Lattice(*(Axis(n, 96, 64, 32, n) for n in pixels.shape[1:]))
    decision = Decision("sigmoid", 0.5, exact=False)
    job = BlockJob(lattice, 0, None, channels=session.channels, blend=blend, decision=decision)
    with session.lock:
        drive(session, [(job, session.load(pixels))], lattice.tile_shape)
    return job.finish().mask


def test_the_path_of_a_device_gives_what_the_cpu_gives(pixels):
    session = open_session(find_model("nuclei", None, {}), setup("torch", "fp32", 1), "uint8")
    ours = added_up(session, pixels)
    session._on_device = True  # CPU tensors through the code that a GPU runs
    assert np.array_equal(added_up(session, pixels), ours)
    assert len(np.unique(ours)) == 2


def test_a_process_keeps_the_networks_that_it_used_last(monkeypatch):
    class Loaded:
        pass

    monkeypatch.setattr(task, "_sessions", {})
    monkeypatch.setattr(task, "open_session", lambda *_: Loaded())
    files = find_model("nuclei", None, {})

    def session(number):
        return task.session_for(files, setup("torch", "fp32", number), "uint8")

    first, used = weakref.ref(session(1)), session(2)
    for number in (1, 3, 4, 1, 5):  # the last one takes the place of 2
        session(number)
    assert len(task._sessions) == 4
    assert session(1) is first()
    assert session(2) is not used
    for number in range(6, 10):
        session(number)
    assert len(task._sessions) == 4
    assert first() is None


def cuda_flags():
    """Return what a process says of CUDA's arithmetic, in words that take any mixture."""
    dnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (dnn.enabled, dnn.benchmark, dnn.deterministic), (
        dnn.conv.fp32_precision, dnn.rnn.fp32_precision, matmul.fp32_precision,
    )  # fmt: skip


@pytest.fixture(params=["nothing", "conv and rnn", "older words", "a parent"])
def what_a_program_set(request, monkeypatch):
    dnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    ours = {
        "nothing": [],
        "conv and rnn": [(dnn.conv, "tf32"), (dnn.rnn, "ieee")],
        "older words": [],
        "a parent": [(dnn.conv, "none"), (dnn.rnn, "none"), (matmul, "none"), (dnn, "tf32")],
    }[request.param]
    before = [(owner, owner.fp32_precision) for owner in (dnn.conv, dnn.rnn, matmul, dnn)]
    oldest = torch.get_float32_matmul_precision()
    if request.param == "older words":
        torch.set_float32_matmul_precision("high")
        monkeypatch.setattr(dnn, "benchmark", True)
    for owner, value in ours:
        owner.fp32_precision = value
    yield
    dnn.fp32_precision = "none"
    torch.set_float32_matmul_precision(oldest)
    for owner, value in before:
        owner.fp32_precision = value


@pytest.mark.parametrize("on_device", [False, True])
def test_fp32_is_no_tf32_whatever_a_program_has_set(pixels, what_a_program_set, on_device):
    session = open_session(find_model("nuclei", None, {}), setup("torch", "fp32", 1), "uint8")
    session._on_device = on_device  # CPU tensors through the code that a GPU runs
    before, inside = cuda_flags(), []
    network = session._network
    session._network = lambda inputs: (inside.append(cuda_flags()), network(inputs))[1]
    added_up(session, pixels)
    assert cuda_flags() == before
    if not on_device:
        assert set(inside) == {before}
        return
    assert {flags for flags, _ in inside} == {(True, False, True)}
    assert {one for _, (conv, _, matmul) in inside for one in (conv, matmul)} <= {"ieee", "none"}
    assert {rnn for _, (_, rnn, _) in inside} == {before[1][1]}


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_caller_that_breaks_off_leaves_a_session_in_order(backend, pixels):
    session = open_session(find_model("nuclei", None, {}), setup(backend, "fp32", 1), "uint8")
    tiles = [(session.load(pixels), row, 0) for row in range(0, 96, 16)]
    expected = [np.asarray(scores).copy() for scores in session.scores(tiles, (64, 64))]
    broken_off = session.scores(tiles[::-1], (64, 64))
    next(broken_off)
    broken_off.close()
    again = [np.asarray(scores).copy() for scores in session.scores(tiles, (64, 64))]
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_all_pixel_types_give_the_same_scores(unet, pixels, backend, dtype):
    files = find_model(str(unet), None, {})
    assert np.array_equal(
        scores_of(files, backend, pixels, dtype=dtype), scores_of(files, backend, pixels)
    )


@needs_bf16
def test_bf16_is_close_to_fp32(pixels):
    files = find_model("nuclei", None, {})
    exact = scores_of(files, "torch", pixels)
    for backend in ("torch", "openvino"):
        difference = np.abs(scores_of(files, backend, pixels, "bf16") - exact)
        assert difference.mean() < 0.01
        assert difference.max() < 0.3  # a few scores near the threshold, where it is steepest


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Return a network that BatchNorms keep in range, by numbers that bf16 and fp16 do not hold."""
    folder = networks.classic(tmp_path_factory.mktemp("uneven") / "m", norm=True)
    network = build_network(find_model(str(folder), None, {})).train()
    for _ in range(100):  # sees what it will see
        network((torch.from_numpy(picture(160, 128))[None] / 255 - 0.4) / 0.25)
    state = network.state_dict()
    for name in [name for name in state if name.endswith(".running_var")]:
        before, _, number = name.removesuffix(".running_var").rpartition(".")
        var = state[name].clone()
        state[name] = 2.0 ** torch.linspace(7, 23, len(var)).round() * (1 + 0.98 * 2**-8)
        factor = (state[name] / var).sqrt()
        state[f"{before}.{number}.running_mean"] *= factor
        state[f"{before}.{number}.weight"] += 1.02 * 2**-8
        state[f"{before}.{int(number) - 1}.weight"] *= factor[:, None, None, None]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return find_model(str(folder), None, {})


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("torch", "bf16"), ("torch", "fp16"),
        pytest.param("inductor", "bf16", marks=[needs_compiler, pytest.mark.long]),
    ],
)  # fmt: skip
def test_statistics_keep_their_precision(uneven, pixels, backend, precision):
    exact = scores_of(uneven, "torch", pixels)
    session = open_session(uneven, setup("torch", precision, 1), "uint8")
    session._network.to(session._dtype)  # these too, which they are not to be
    [rounded] = session.scores([(session.load(pixels), 0, 0)], pixels.shape[1:])
    kept = scores_of(uneven, backend, pixels, precision)
    assert np.isfinite(kept).all()
    assert kept.std(axis=(1, 2)).min() > 0.05
    assert np.abs(kept - exact).mean() < 0.003
    assert np.abs(kept - exact).mean() < 0.7 * np.abs(rounded - exact).mean()


# -- the compiled network


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory):
    return networks.unet(tmp_path_factory.mktemp("inductor") / "m", depth=3)


@pytest.mark.long
@needs_compiler
def test_inductor_gives_what_torch_gives(small_unet, pixels, caplog):
    caplog.set_level("INFO", "tilenet")
    files = find_model(str(small_unet), None, {})
    compiled, eager = (
        open_session(files, setup(b, "fp32", 2), "uint8") for b in ("inductor", "torch")
    )
    assert keeps_batch_contract(compiled, files.card, (96, 96))
    assert [r.message for r in caplog.records if "compiling tiny for 96×96" in r.message]
    [ours], [theirs] = (
        [one.copy() for one in session.scores([(session.load(pixels), 32, 16)], (96, 96))]
        for session in (compiled, eager)
    )
    assert np.abs(ours - theirs).max() < 1e-5
    first, second, _ = np.sort(theirs, axis=0)[::-1]
    sure = first - second > 1e-4
    assert sure.mean() > 0.99
    assert np.array_equal(ours.argmax(axis=0)[sure], theirs.argmax(axis=0)[sure])
    assert len(np.unique(theirs.argmax(axis=0)[sure])) > 1
    mask = added_up(compiled, pixels)
    compiled._on_device = True  # CPU tensors through the code that a GPU runs
    assert np.array_equal(added_up(compiled, pixels), mask)
    assert len(caplog.records) == 1  # compiled once


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory):
    """Return a folder with a network that compiles in seconds."""
    return networks.classic(tmp_path_factory.mktemp("inductor") / "classic")


@needs_compiler
def test_a_mask_of_compiled_tiles_is_no_other_backends(few_layers, tmp_path, cli):
    source = write_tif(tmp_path / "a.tif", picture(160, 130))
    line = ["predict", source, "--model", few_layers, "--tile", 96, "--batch-size", 2]
    line += ["--device", "cpu", "--precision", "fp32", "--out"]
    done = cli(*line, tmp_path / "a.zarr", "--backend", "inductor", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["backend"] == "inductor"
    assert cli(*line, tmp_path / "b.zarr", "--backend", "torch").code == 0
    ours, theirs = (
        zarr.open_group(tmp_path / name, mode="r")["mask"][:] for name in ("a.zarr", "b.zarr")
    )
    assert np.mean(ours != theirs) < 1e-3
    refused = cli(*line, tmp_path / "a.zarr", "--backend", "torch")
    assert refused.code == 5
    chunk = tmp_path / "a.zarr" / "mask" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(b"")
    assert cli("verify", tmp_path / "a.zarr", "--repair").code == 0
    assert chunk.read_bytes() == whole


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("fails", ["there is none", "at its work"])
def test_without_a_working_compiler(few_layers, tmp_path, environment, fails):
    compiler = tmp_path / "c++"
    if fails == "at its work":  # it says what it is, and no more
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ "$@"\nexit 1\n')
        compiler.chmod(0o755)
    own = {**environment, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    source = write_tif(tmp_path / "a.tif", picture(60, 70))
    line = [sys.executable, "-m", "tilenet", "predict", source, "--out", tmp_path / "x.zarr",
            "--model", few_layers, "--device", "cpu", "--backend", "inductor"]  # fmt: skip
    done = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, env=own, timeout=120, check=False
    )
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tilenet: ")
    assert "inductor" in last
    assert last.endswith("use --backend torch")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.zarr").exists()


def test_the_input_is_normalised_per_band(tmp_path):
    keys = {"value_range": [10, 210], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 2.0]}
    path = networks.pointwise(tmp_path / "m.onnx", activation="none", **keys)
    files = find_model(str(path), None, {})
    pixels = picture(8, 8)
    weights = 4 * np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    weights -= weights.mean(axis=1, keepdims=True)
    bands = (pixels - 10.0) / 200 - np.array(keys["mean"])[:, None, None]
    expected = np.einsum("kc,chw->khw", weights, bands / np.array(keys["std"])[:, None, None])
    assert np.allclose(scores_of(files, "openvino", pixels), expected, atol=1e-4)
    assert np.allclose(files.card.offset, [30, 50, 70])
    assert np.allclose(files.card.scale, [100, 50, 400])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_activations(tmp_path, activation):
    files = find_model(
        str(networks.constant(tmp_path / "m.onnx", [0.5, -1.0], activation=activation)), None, {}
    )
    logits = torch.tensor([0.5, -1.0])
    expected = {"softmax": logits.softmax(0), "sigmoid": logits.sigmoid(), "none": logits}
    scores = scores_of(files, "openvino", picture(8, 8))
    assert np.allclose(scores[:, 3, 4], expected[activation].numpy(), atol=1e-6)


def test_choices(models):
    files = find_model(str(models / "conv.onnx"), None, {})
    assert choose(files, precision="fp32").backend == "openvino"
    for backend in ("torch", "inductor"):
        with pytest.raises(ModelError, match=f"{backend} cannot run ONNX"):
            choose(files, backend=backend)
    with pytest.raises(UsageError, match="auto, torch, openvino or inductor"):
        choose(files, backend="tensorflow")
    libraries = [setup(b, "fp32").library for b in ("torch", "inductor", "openvino")]
    assert libraries == ["torch", "torch", "openvino"]
    nuclei = find_model("nuclei", None, {})
    made = choose(nuclei, device="cpu", backend="torch", precision="fp32", batch_size=3)
    assert (made.backend, made.device, made.precision, made.batch_size) == (
        "torch", "cpu", "fp32", 3,
    )  # fmt: skip
    assert choose(nuclei, device="cpu").precision in ("fp32", "bf16")
    assert choose(nuclei, device="cpu").backend != "inductor"  # which waits to be asked for


@pytest.fixture
def two_gpus(monkeypatch):
    """Let torch see an A100 and a T4, which only emulates bf16."""
    current = [0]

    @contextmanager
    def chosen(device):
        current.append(torch.device(device).index or 0)
        yield
        current.pop()

    majors = {0: SimpleNamespace(major=8), 1: SimpleNamespace(major=7)}
    monkeypatch.setattr("tilenet.models.session.has_cuda", lambda: True)
    for name, value in {
        "device": chosen, "is_available": lambda: True, "device_count": lambda: 2,
        "current_device": lambda: current[-1], "get_device_properties": majors.__getitem__,
        "_check_bf16_tensor_supported": lambda _: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(
    ("device", "precision"), [("cuda", "bf16"), ("cuda:0", "bf16"), ("cuda:1", "fp16")]
)
def test_the_precision_is_what_the_device_itself_has(two_gpus, device, precision):
    assert choose(find_model("nuclei", None, {}), device=device).precision == precision


def test_a_gpu_too_many(two_gpus):
    with pytest.raises(ModelError, match="no such CUDA device; --device cuda:2"):
        choose(find_model("nuclei", None, {}), device="cuda:2")


def test_a_network_that_shrinks_its_tiles_is_refused(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "a", "b"])
    weights = numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "valid", [x], [y], [weights])
    opset = helper.make_opsetid("", networks.OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=networks.IR_VERSION)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".json").write_text(json.dumps(networks.card(2)))
    files = find_model(str(path), None, {})
    with pytest.raises(ModelError, match="64×64 gives scores of 62×62"):
        scores_of(files, "openvino", picture(64, 64))


# -- cards


def test_what_ships():
    assert "nuclei" in bundled_models()
    for name in bundled_models():
        files = find_model(name, None, {})
        shape = network_shape(files)
        assert (shape.bands, shape.fixed) == (files.card.band_count, None)
        assert files.weights.stat().st_size <= 10e6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": []}, "classes"),
        ({"classes": [{"id": k, "name": "a"} for k in (1, 2)]}, "ids must be 0, 1, 2"),
        ({"classes": [{"id": k, "name": "a"} for k in range(256)]}, "classes"),
        ({"classes": [{"id": 0, "name": "a", "color": [0, 0, 300]}]}, "color"),
        ({"bands": 0}, "bands"),
        ({"value_range": [1, 1]}, "lo must be below hi"),
        ({"mean": [0, 0]}, "mean: give 1 or 3"),
        ({"std": [0.0]}, "std: must be above 0"),
        ({"std": [float("nan")]}, "std"),
        ({"activation": "relu"}, "activation"),
        ({"tile": 0}, "tile"),
        ({"divisor": 0}, "divisor"),
        ({"overlap": -1}, "overlap"),
        ({"context": "some"}, "context"),
        ({"schema": 2}, "schema"),
        ({"threshold": "high"}, "threshold"),
        ({"value_range": [0, float("inf")]}, "value_range"),
        ({"mpp": 0}, "mpp: .* greater than 0"),
        ({"mpp": -0.5}, "mpp: .* greater than 0"),
        ({"ground_resolution": 0.0}, "ground_resolution: .* greater than 0"),
        ({"ground_resolution": float("inf")}, "ground_resolution: .* finite"),
        ({"threshold": float("nan")}, "threshold"),
        ({"activation": "none", "threshold": 2000}, "threshold: scores"),
    ],
)
def test_impossible_cards(change, words):
    text = json.dumps(networks.card(3) | change).encode()
    with pytest.raises(ModelError, match=words):
        parse_card(text, "card.json", {})


def test_flags_beat_the_card():
    text = json.dumps(networks.card(3)).encode()
    card = parse_card(text, "card.json", {"mean": (0.5,), "activation": "sigmoid"})
    assert (card.mean, card.activation) == ((0.5,), "sigmoid")


def test_band_names_and_class_colours():
    classes = [{"id": 0, "name": "no", "color": [1, 2, 3]}, {"id": 1, "name": "yes"}]
    document = networks.card(2, bands=["red", "nir"]) | {"classes": classes}
    card = parse_card(json.dumps(document).encode(), "card.json", {})
    assert card.band_count == 2
    one, two = card.class_infos()
    assert one.color == (1, 2, 3)
    assert two.color != one.color
    assert card.channel_names(1) == ("yes",)
    assert card.channel_names(2) == ("no", "yes")


def test_unknown_keys_of_later_releases_are_read():
    text = json.dumps(networks.card(2, flavour="vanilla")).encode()
    assert parse_card(text, "card.json", {}).name == "tiny"


def test_the_identity_follows_what_decides_the_scores(tmp_path):
    path = networks.conv(tmp_path / "m.onnx")
    first = find_model(str(path), None, {}).sha256
    assert find_model(str(path), None, {}).sha256 == first
    assert find_model(str(path), None, {"mean": (0.5,)}).sha256 != first
    networks.conv(path, seed=9)
    assert find_model(str(path), None, {}).sha256 != first


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_a_network_with_its_own_activation_is_activated_once(unet, pixels, tmp_path, backend):
    """SMP's may end in one; what the card says of the scores holds."""
    folder = shutil.copytree(unet, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"activation": "softmax2d"}
    (folder / "config.json").write_text(json.dumps(config))
    plain = scores_of(find_model(str(unet), None, {}), backend, pixels)
    own = find_model(str(folder), None, {})
    assert np.array_equal(scores_of(own, backend, pixels), plain)
    as_it_is = find_model(str(folder), None, {"activation": "none"})
    assert np.abs(scores_of(as_it_is, backend, pixels) - plain).max() < 1e-6
    assert own.sha256 != as_it_is.sha256
    with pytest.raises(ModelError, match="ends in its own softmax2d, and is to get sigmoid on top"):
        find_model(str(folder), None, {"activation": "sigmoid"})


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_labels_of_whole_images_are_left_out(unet, pixels, tmp_path, backend):
    """SMP's `aux_params` make a network of two answers."""
    import segmentation_models_pytorch as smp

    config = json.loads((unet / "config.json").read_text())
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    network = smp.Unet(**known | {"aux_params": {"classes": 4}})
    network.load_state_dict(safetensors.torch.load_file(unet / "model.safetensors"), strict=False)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    config["aux_params"] = {"classes": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(unet / "tilenet.json", tmp_path)
    plain = scores_of(find_model(str(unet), None, {}), backend, pixels)
    assert np.array_equal(scores_of(find_model(str(tmp_path), None, {}), backend, pixels), plain)


def test_what_cannot_be_converted_is_no_defect(unet, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(openvino_graph, "_traced", refuse)
    monkeypatch.setattr(openvino_graph, "_is_whole", lambda _: False)
    files = replace(find_model(str(unet), None, {}), sha256="0" * 64)
    with pytest.raises(ModelError, match=r"cannot convert it: no such operation; .*backend torch"):
        scores_of(files, "openvino", picture(64, 64))


def external(path, source):
    """Save an ONNX file whose weights lie in another file, as torch's exporter does."""
    model = onnx.load(source)
    where = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=True, location=where, size_threshold=0)
    shutil.copy(source.with_suffix(".json"), path.with_suffix(".json"))
    return path.with_name(where)


def test_weights_in_another_file_are_the_models_too(pixels, tmp_path):
    source, path = networks.conv(tmp_path / "a.onnx"), tmp_path / "in" / "b.onnx"
    path.parent.mkdir()
    data = external(path, source)
    files = find_model(str(path), None, {})
    expected = scores_of(find_model(str(source), None, {}), "openvino", pixels)
    assert np.array_equal(scores_of(files, "openvino", pixels), expected)
    content = bytearray(data.read_bytes())
    content[7] ^= 1
    data.write_bytes(content)
    assert find_model(str(path), None, {}).sha256 != files.sha256
    data.unlink()
    with pytest.raises(ModelError, match=r"weights in b\.onnx\.data are missing"):
        find_model(str(path), None, {})


def test_workers_get_weights_in_another_file_too(tmp_path):
    path = tmp_path / "b.onnx"
    external(path, networks.conv(tmp_path / "a.onnx"))
    files, folder = find_model(str(path), None, {}), tmp_path / "run"
    folder.mkdir()
    for _ in range(2):
        with admitting(folder, files, {"tilenet": "0"}, elsewhere=True):
            [copy] = (folder / MODELS).glob("*.onnx")
            assert identified(replace(files, weights=copy)).sha256 == files.sha256
        (folder / MODELS / "b.onnx.data").write_bytes(b"rotten")


def test_weights_elsewhere_are_not_looked_for(tmp_path):
    path = tmp_path / "b.onnx"
    external(path, networks.conv(tmp_path / "a.onnx"))
    path.write_bytes(path.read_bytes().replace(b"b.onnx.data", b"../nnx.data"))
    with pytest.raises(ModelError, match="put them beside it"):
        find_model(str(path), None, {})


def test_weights_that_do_not_fit_the_architecture(unet, tmp_path):
    shutil.copytree(unet, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"decoder_channels": [9] * 5}))
    files = find_model(str(tmp_path / "m"), None, {})
    with pytest.raises(ModelError, match="differ in"):
        open_session(files, setup("torch", "fp32"), "uint8")


def test_an_unknown_architecture(unet, tmp_path):
    shutil.copytree(unet, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"_model_class": "Vnet"}))
    with pytest.raises(ModelError, match="SMP has no Vnet"):
        open_session(find_model(str(tmp_path / "m"), None, {}), setup("torch", "fp32"), "uint8")


# -- what is loaded, and what is not


def unshared():
    """Whether this machine lets us cut off the network."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not unshared(), reason="unshare -n is not permitted here")
def test_imagenet_in_the_config_needs_no_network(tmp_path, environment):
    model = networks.unet(tmp_path / "m", depth=3, encoder_weights="imagenet")
    source = write_tif(tmp_path / "a.tif", picture(60, 70))
    line = ["unshare", "-rn", sys.executable, "-m", "tilenet", "predict", str(source), "--out",
            str(tmp_path / "x.zarr"), "--model", str(model), "--backend", "torch"]  # fmt: skip
    clean = {**environment, "HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch")}
    done = subprocess.run(line, capture_output=True, text=True, env=clean, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.zarr").is_dir()
    assert not (tmp_path / "torch").exists()


LOADED = """
import sys
from tilenet.cli import run
code = run(sys.argv[1:])
heavy = "torch rasterio zarr openvino distributed segmentation_models_pytorch boto3 absl scipy tqdm"
print("loaded", *[name for name in heavy.split() if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def loaded_by(environment, *arguments):
    line = [sys.executable, "-c", LOADED, *map(str, arguments)]
    done = subprocess.run(
        line, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    [loaded] = [e for e in done.stderr.splitlines() if e.startswith("loaded")]
    return set(loaded.split()[1:]), done


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["--version"]])
def test_help_is_light(environment, arguments):
    assert loaded_by(environment, *arguments)[0] == set()


def test_the_graph_is_converted_once_and_torch_is_not_imported_again(tmp_path, environment):
    model = networks.unet(tmp_path / "m", depth=3)
    source = write_tif(tmp_path / "a.tif", picture(60, 70))
    own = {**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def once(name):
        out = tmp_path / name
        line = ["predict", source, "--out", out, "--model", model, "--backend", "openvino"]
        return (*loaded_by(own, *line, "--precision", "fp32"), out)

    loaded, done, first = once("1.tif")
    assert {"torch", "segmentation_models_pytorch", "openvino"} <= loaded
    assert "converting" in done.stderr
    graphs = list((tmp_path / "cache").rglob("graph.xml"))
    assert len(graphs) == 1
    made = graphs[0].stat().st_mtime_ns
    loaded, done, second = once("2.tif")
    assert loaded == {"rasterio", "zarr", "openvino"}
    assert "converting" not in done.stderr
    assert graphs[0].stat().st_mtime_ns == made
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["a page of zeros", "cut off", "lost", "no hash"])
def test_a_graph_that_was_damaged_is_converted_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = networks.unet(tmp_path / "m", depth=3)
    files, tile = find_model(str(model), None, {}), (picture(64, 64), 0, 0)

    def answer():
        setup = choose(files, backend="openvino", precision="fp32")
        with closing(open_session(files, setup, "uint8").scores([tile], (64, 64))) as scores:
            return next(scores).copy()

    first = answer()
    [graph] = (tmp_path / "cache" / "tilenet" / "openvino").iterdir()
    weights = (graph / "graph.bin").read_bytes()
    shutil.rmtree(tmp_path / "cache" / "tilenet" / "compiled")  # else nobody asks for the graph
    if damage == "a page of zeros":
        (graph / "graph.bin").write_bytes(weights[:4096] + bytes(4096) + weights[8192:])
    elif damage == "cut off":
        (graph / "graph.xml").write_text((graph / "graph.xml").read_text()[:5000])
    else:
        (graph / ("graph.bin" if damage == "lost" else "sha256")).unlink()
    assert np.array_equal(answer(), first)
    assert (graph / "graph.bin").read_bytes() == weights
    assert os.listdir(graph.parent) == [graph.name]  # noqa: PTH208 - names will do


def test_a_full_disk_keeps_no_graph(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = networks.unet(tmp_path / "m", depth=3)
    files = find_model(str(model), None, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # as /dev/full, for its files
    try:
        scores = scores_of(files, "openvino", picture(64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert scores.shape == (3, 64, 64)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "the graph is not cached" in caplog.text


def test_one_class_stands_on_a_background():
    document = networks.card(3) | {"classes": [{"id": 1, "name": "roof", "color": [9, 8, 7]}]}
    card = parse_card(json.dumps(document | {"activation": "sigmoid"}).encode(), "card.json", {})
    assert [(c.id, c.name) for c in card.class_infos()] == [(0, "background"), (1, "roof")]
    assert card.class_infos()[1].color == (9, 8, 7)
    card.check_channels(1, "here")


def test_softmax_over_one_channel_is_refused():
    card = parse_card(json.dumps(networks.card(2)).encode(), "card.json", {})
    with pytest.raises(ModelError, match="1 everywhere"):
        card.check_channels(1, "here")


def test_openvino_reports_to_nobody(tmp_path):
    program = (
        "import sys, tilenet.models.openvino_backend as backend\n"
        "names = ('openvino_telemetry', 'openvino.tools.ovc')\n"
        "assert not [name for name in sys.modules if name.startswith(names)]\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not list(tmp_path.iterdir())  # no identifier for statistics


SIGNALLED = """
import gc, os, signal, sys, threading
import numpy as np
from tilenet.models.session import choose, open_session
from tilenet.models.store import find_model

heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
files = find_model(sys.argv[1], None, {})
sessions = [open_session(files, choose(files, backend="openvino"), "uint8")]
pixels = sessions[0].load(np.zeros((3, 64, 64), np.uint8))
list(sessions[0].scores([(pixels, 0, 0)], (64, 64)))

def drop():
    sessions.clear()
    gc.collect()

thread = threading.Thread(target=drop)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
assert heard
"""


def test_a_signal_after_a_network_has_gone(models, environment):
    """OpenVINO would take the signals' stack of the thread that loaded it along, from another."""
    line = [sys.executable, "-c", SIGNALLED, models / "conv.onnx"]
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
