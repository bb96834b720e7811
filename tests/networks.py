"""Tiny networks: ONNX files with their sidecars, and seeded SMP folders."""

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8


def card(classes, *, bands=3, activation="softmax", **keys):
    """Return a `tilenet.json` document for values 0 to 255 as they are."""
    return {
        "schema": 1,
        "name": "tiny",
        "classes": [{"id": k, "name": f"class {k}"} for k in range(classes)],
        "bands": bands,
        "value_range": [0, 255],
        "mean": [0.0],
        "std": [1.0],
        "activation": activation,
        "divisor": 1,
        "context": "local",
        **keys,
    }


def _save(path, nodes, weights, bands, channels, document, *, side=None):
    sides = [side, side] if side else ["h", "w"]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", bands, *sides])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", channels, *sides])
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "tiny", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".json").write_text(json.dumps(document))
    return path


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def identity(path, bands=3, count=None, **keys):
    """Scores = pixels / 255, unbounded: one channel makes two classes; bands may be names."""
    named, bands = bands, count or bands
    document = card(max(bands, 2), bands=named, activation="none", **keys)
    return _save(path, [helper.make_node("Identity", ["x"], ["y"])], {}, bands, bands, document)


def constant(path, values, bands=3, activation="none", **keys):
    """Scores = `values` at every pixel, whatever is there."""
    nodes = [
        helper.make_node("Conv", ["x", "zero"], ["z"]),
        helper.make_node("Add", ["z", "values"], ["y"]),
    ]
    k = len(values)
    weights = {
        "zero": np.zeros((k, bands, 1, 1), np.float32),
        "values": np.asarray(values, np.float32)[None, :, None, None],
    }
    classes = k + 1 if activation == "sigmoid" or k == 1 else k
    document = card(classes, bands=bands, activation=activation, **keys)
    return _save(path, nodes, weights, bands, k, document)


def pointwise(path, channels=3, bands=3, seed=1, activation="softmax", side=None, **keys):
    """A 1×1 convolution; with `side`, one that takes tiles of that size only."""
    weights = {"w": 4 * _normal(seed, channels, bands, 1, 1)}
    weights["w"] -= weights["w"].mean(axis=1, keepdims=True)  # no class wins by brightness alone
    classes = channels + 1 if activation == "sigmoid" or channels == 1 else channels
    document = card(classes, bands=bands, activation=activation, **keys)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    return _save(path, nodes, weights, bands, channels, document, side=side)


def conv(path, channels=3, bands=3, seed=2, hidden=4, **keys):
    """Two 3×3 convolutions with a ReLU between: a receptive field of 5 pixels."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    weights = {
        "w1": _normal(seed, hidden, bands, 3, 3),
        "w2": _normal(seed + 1, channels, hidden, 3, 3),
    }
    return _save(path, nodes, weights, bands, channels, card(channels, bands=bands, **keys))


def three_convolutions(path, channels=3, bands=3, seed=5, hidden=4, **keys):
    """Three 3×3 convolutions with ReLUs between: a receptive field of 7 pixels."""
    names, weights = [bands, hidden, hidden, channels], {}
    nodes = []
    for k, (taken, given) in enumerate(itertools.pairwise(names)):
        weights[f"w{k}"] = _normal(seed + k, given, taken, 3, 3)
        target = "y" if k == 2 else f"a{k}"
        source = f"r{k - 1}" if k else "x"
        nodes.append(helper.make_node("Conv", [source, f"w{k}"], [target], pads=[1, 1, 1, 1]))
        if k < 2:
            nodes.append(helper.make_node("Relu", [target], [f"r{k}"]))
    return _save(path, nodes, weights, bands, channels, card(channels, bands=bands, **keys))


def positional(path, channels=3, bands=3, seed=3, **keys):
    """A 1×1 convolution plus ramps over the tile: the scores depend on the place inside it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Mul", ["a", "zero"], ["z"]),
        helper.make_node("Add", ["z", "step"], ["s"]),
        helper.make_node("CumSum", ["s", "rows"], ["r"]),
        helper.make_node("CumSum", ["s", "cols"], ["c"]),
        helper.make_node("Mul", ["r", "c"], ["rc"]),
        helper.make_node("Sin", ["rc"], ["wave"]),
        helper.make_node("Add", ["a", "wave"], ["y"]),
    ]
    steps = 0.02 + 0.1 * np.random.default_rng(seed).random((1, channels, 1, 1))
    weights = {
        "w": _normal(seed, channels, bands, 1, 1),
        "zero": np.zeros((1, channels, 1, 1), np.float32),
        "step": steps.astype(np.float32),
        "rows": np.asarray(2, np.int64),
        "cols": np.asarray(3, np.int64),
    }
    return _save(path, nodes, weights, bands, channels, card(channels, bands=bands, **keys))


def broken(path, channels=2, bands=3, **keys):
    """NaN at pixels whose first band is 0: 0 / 0."""
    nodes = [
        helper.make_node("Div", ["x", "x"], ["one"]),
        helper.make_node("Conv", ["one", "w"], ["y"]),
    ]
    weights = {"w": np.zeros((channels, bands, 1, 1), np.float32)}
    weights["w"][:, 0] = 1.0
    document = card(channels, bands=bands, activation="none", **keys)
    return _save(path, nodes, weights, bands, channels, document)


def _unet(classes, bands, seed, depth):
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(seed)
    network = smp.Unet(
        "resnet18",
        encoder_weights=None,
        encoder_depth=depth,
        decoder_channels=(32, 24, 16, 12, 8)[-depth:],
        in_channels=bands,
        classes=classes,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(
                    0.3 * torch.randn(module.running_mean.shape, generator=generator)
                )
                module.running_var.copy_(
                    0.5 + torch.rand(module.running_var.shape, generator=generator)
                )
                module.weight.copy_(
                    0.7 + 0.6 * torch.rand(module.weight.shape, generator=generator)
                )
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    return network.eval()


def classic(folder, classes=3, seed=7, norm=False, **keys):
    """Save a random classic U-Net of a few layers; returns its folder."""
    import safetensors.torch
    import torch

    from tilenet.models.classic import ClassicUNet

    folder, options = (
        Path(folder),
        {"in_channels": 3, "classes": classes, "widths": [4, 8], "norm": norm},
    )
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    network = ClassicUNet(3, classes, widths=(4, 8), norm=norm)
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    config = {"_model_class": "ClassicUNet", **options}
    (folder / "config.json").write_text(json.dumps(config))
    document = card(classes, mean=[0.4], std=[0.25], divisor=2)
    (folder / "tilenet.json").write_text(json.dumps(document | keys))
    return folder


def unet(folder, classes=3, bands=3, seed=4, depth=5, encoder_weights=None, with_card=True, **keys):
    """Save a random ResNet-18 U-Net whose scores vary; returns its folder."""
    folder = Path(folder)
    network = _unet(classes, bands, seed, depth)
    with warnings.catch_warnings():
        # huggingface_hub writes a model card from a template and may complain about it.
        warnings.simplefilter("ignore")
        network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder_weights"] = encoder_weights
    (folder / "config.json").write_text(json.dumps(config))
    if with_card:
        document = card(max(classes, 2), bands=bands, divisor=None, mean=[0.4], std=[0.25])
        document["activation"] = "sigmoid" if classes == 1 else "softmax"
        (folder / "tilenet.json").write_text(json.dumps(document | keys))
    return folder
