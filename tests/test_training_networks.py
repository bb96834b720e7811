"""The classic U-Nets, encoders' weights from files, and what the card says of a network."""

import json

import labelled
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import ModelError
from tilenet.geometry import Window
from tilenet.models.card import parse_card
from tilenet.models.classic import CLASSIC, ClassicUNet
from tilenet.models.shapes import classic_margin
from tilenet.sources import open_raster
from tilenet.train_api import train
from tilenet.training.config import TrainConfig
from tilenet.training.network import (
    context_of,
    divisor_of,
    load_encoder,
    network_config,
    new_network,
)
from tilenet.training.result import write_model


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "bands", "classes", "expected"),
    [
        ("classic-unet-valid", 1, 2, 31_030_658),
        ("classic-unet", 3, 1, 31_031_745),
        ("classic-unet-small", 3, 1, 1_941_105),
    ],
)
def test_parameter_counts(name, bands, classes, expected):
    with torch.device("meta"):
        network = ClassicUNet(bands, classes, **CLASSIC[name])
    assert parameters(network) == expected


def test_valid_unet_has_23_convolutions_and_answers_388_of_572():
    network = ClassicUNet(1, 2, padding="valid", widths=(2, 4, 8, 16, 32))
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    assert sum(isinstance(m, kinds) for m in network.modules()) == 23
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert network.margin == classic_margin(5, "valid") == (92, 96)


@pytest.mark.parametrize("name", sorted(CLASSIC))
def test_classic_networks_answer_their_tile(name):
    network = ClassicUNet(2, 3, **(CLASSIC[name] | {"widths": (4, 8, 16)})).eval()
    side = 32 + sum(network.margin)
    with torch.inference_mode():
        out = network(torch.randn(1, 2, side, side))
    assert out.shape[-1] >= 32
    assert context_of(network) == "local"
    assert divisor_of(network) == 4


def valid_model(folder, levels=3):
    """Write a seeded valid U-Net as a model folder."""
    torch.manual_seed(0)
    widths = [4, 8, 16][:levels]
    network = ClassicUNet(3, 1, padding="valid", widths=widths)
    torch.nn.init.constant_(network.head.bias, -0.1)  # where no unit is active: not at the edge
    with torch.no_grad():
        network.head.weight *= -20  # answers well on both sides of it
    document = {
        "schema": 1, "classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}], "bands": 3,
        "value_range": [0, 255], "mean": [0.4], "std": [0.3], "activation": "sigmoid", "tile": 64,
        "overlap": 16, "divisor": network.divisor, "context": "local",
        "margin": list(network.margin),
    }  # fmt: skip
    folder.mkdir()
    config = {"_model_class": "ClassicUNet", "in_channels": 3, "classes": 1, "padding": "valid",
              "widths": widths}  # fmt: skip
    card = parse_card(json.dumps(document).encode(), "", {})
    write_model(folder, config, card, network.state_dict())
    return network, card


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_tiled_prediction_of_a_valid_unet_equals_the_whole_image_pass(backend, tmp_path):
    network, card = valid_model(tmp_path / "model")
    grey, _ = labelled.disc(3, 200, 30)
    labelled.scene(tmp_path / "scene.tif", np.moveaxis(labelled.rgb(grey), -1, 0)[:, :150])
    settings = PredictConfig(
        model=str(tmp_path / "model"), backend=backend, precision="fp32", device="cpu", tile=64,
        overlap=16, block=64, chunk=64, probabilities=True,
    )  # fmt: skip
    predict([tmp_path / "scene.tif"], tmp_path / "mask.zarr", settings)
    raster = open_raster(tmp_path / "scene.tif")
    before, after = card.margin
    height, width = 152, 200  # padded to the divisor
    seen = Window(-before, -before, height + before + after, width + before + after)
    pixels, _ = raster.read(seen, card.offset)
    inputs = (pixels.astype(np.float32) - card.offset[:, None, None]) / card.scale[:, None, None]
    with torch.inference_mode():
        scores = network.eval()(torch.from_numpy(inputs.astype(np.float32))[None])[0, 0]
    whole = scores.sigmoid().numpy()[:150, :200]
    from tilenet.sinks import open_store

    store = open_store(tmp_path / "mask.zarr")
    mask = store.read("mask", Window(0, 0, 150, 200))
    sure = np.abs(whole - 0.5) > 1e-5
    np.testing.assert_array_equal(mask[sure], (whole >= 0.5)[sure])
    assert sure.mean() > 0.99
    assert 0 < mask.mean() < 1
    prob = store.read("prob", Window(0, 0, 150, 200)).reshape(150, 200)
    assert np.abs(prob - whole * 255).max() <= 0.51


def test_a_valid_unet_is_trained(tmp_path):
    config = TrainConfig(
        data=labelled.pairs(tmp_path / "d"), arch="classic-unet-valid", tile=32, batch_size=2,
        options={"widths": [4, 8, 16]}, epochs=1, steps=2, workers=0, device="cpu",
        precision="fp32", border_w0=5,
    )  # fmt: skip
    result = train(config, tmp_path / "model")
    card = json.loads((tmp_path / "model" / "tilenet.json").read_text())
    assert card["margin"] == list(classic_margin(3, "valid"))
    assert result.metrics["validation"]["accuracy"] is not None


def test_a_network_of_smp_is_trained_and_run(tmp_path):
    config = TrainConfig(
        data=labelled.pairs(tmp_path / "d"), arch="unetplusplus", encoder="tu-test_convnext",
        tile=32, batch_size=2, epochs=1, steps=1, workers=0, device="cpu", precision="fp32",
        engine_images=1,
    )  # fmt: skip
    train(config, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["encoder_weights"] is None
    assert stored["_model_class"] == "unetplusplus"
    card = json.loads((tmp_path / "model" / "tilenet.json").read_text())
    assert card["divisor"] == 32


def test_a_dense_encoder_learns():
    config = TrainConfig(data=".", encoder="densenet121")
    network = new_network(config, network_config(config, 4, 3))
    logits = network(torch.randn(2, 4, 32, 32))
    assert logits.shape == (2, 3, 32, 32)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("arch", "encoder", "context"),
    [
        ("unet", "resnet18", "local"),
        ("unetplusplus", "resnet18", "local"),
        ("unet", "densenet121", "local"),
        ("unet", "tu-tf_efficientnet_lite0", "local"),
        ("unet", "efficientnet-b0", "global"),
        ("pspnet", "resnet18", "global"),
        ("unet", "mit_b0", "global"),
    ],
)
def test_context_is_read_from_the_modules(arch, encoder, context):
    config = TrainConfig(data=".", arch=arch, encoder=encoder)
    arguments = network_config(config, 5, 2)
    assert arguments["encoder_weights"] is None
    network = new_network(config, arguments)
    assert context_of(network) == context
    assert divisor_of(network) == (8 if arch == "pspnet" else 32)


@pytest.mark.parametrize("how", ["name", "order", "safetensors"])
def test_encoder_weights_from_a_file(how, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    state = timm.create_model("mobilenetv3_small_050", pretrained=False).state_dict()
    wanted = state["conv_stem.weight"]
    if how == "order":
        state = {f"other.{k}": tensor for k, tensor in enumerate(state.values())}
    path = tmp_path / ("w.safetensors" if how == "safetensors" else "w.pth")
    save_file(state, path) if how == "safetensors" else torch.save(state, path)
    network = smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None)
    load_encoder(network, "tu-mobilenetv3_small_050", path)
    assert torch.equal(network.encoder.state_dict()["model.conv_stem.weight"], wanted)
    more = smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None, in_channels=5)
    load_encoder(more, "tu-mobilenetv3_small_050", path)
    spread = more.encoder.state_dict()["model.conv_stem.weight"]
    assert torch.allclose(spread[:, 3], wanted[:, 0] * 3 / 5)


def test_wrong_weights_are_refused(tmp_path):
    network = smp.Unet("resnet18", encoder_weights=None)
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="tensors that are not resnet18"):
        load_encoder(network, "resnet18", tmp_path / "w.pth")
    (tmp_path / "bad.pth").write_bytes(b"junk")
    with pytest.raises(ModelError, match="do not read"):
        load_encoder(network, "resnet18", tmp_path / "bad.pth")
