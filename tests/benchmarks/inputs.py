"""Inputs of the benchmarks: real pictures mirrored, and the networks that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import rasterio
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rasterio.windows import Window

from tilenet.sources import open_raster

SLIDE = Path(__file__).parents[2] / "examples" / "images" / "CMU-1-Small-Region.svs"
PATCH = 2048


def picture() -> NDArray[np.uint8]:
    """Return a real picture, (3, 4096, 4096), whose borders continue it when it is repeated."""
    from tilenet.geometry import Window as Box

    pixels, _ = open_raster(SLIDE).read(Box(0, 0, PATCH, PATCH), np.zeros(3))
    pixels = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
    return np.concatenate([pixels, pixels[:, :, ::-1]], axis=2)


def raster(folder: Path, side: int, compress: str) -> Path:
    """Write a tiled GeoTIFF of the picture, repeated, and return its path."""
    path = folder / f"{compress}-{side}.tif"
    if path.exists():
        return path
    pixels, step = picture(), 2 * PATCH
    profile = {
        "driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8",
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": compress,
        "bigtiff": "if_safer",
    }  # fmt: skip
    if compress == "jpeg":
        profile["photometric"] = "ycbcr"
    temp = path.with_suffix(".part")
    with rasterio.open(temp, "w", **profile) as dataset:
        for row in range(0, side, step):
            for col in range(0, side, step):
                height, width = min(step, side - row), min(step, side - col)
                window = Window(col, row, width, height)
                dataset.write(pixels[:, :height, :width], window=window)
    temp.rename(path)
    return path


def _card(path: Path, classes: int) -> None:
    card = {
        "schema": 1, "name": path.stem,
        "classes": [{"id": k, "name": f"class {k}"} for k in range(classes)],
        "bands": 3, "value_range": [0, 255], "mean": [0.5], "std": [0.25],
        "activation": "softmax", "divisor": 32, "context": "local",
    }  # fmt: skip
    path.write_text(json.dumps(card))


def null_network(folder: Path, classes: int) -> Path:
    """Write a network of one 1×1 convolution: what remains is the engine's own cost."""
    path = folder / f"null{classes}.onnx"
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(classes, 3, 1, 1)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        "null",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w_"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes, "h", "w_"])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    _card(path.with_suffix(".json"), classes)
    return path


def resnet_unet(folder: Path, encoder: str = "resnet18") -> Path:
    """Write `smp.Unet(encoder)` with seeded random weights and two classes."""
    path = folder / f"unet-{encoder}"
    if not (path / "tilenet.json").exists():
        import segmentation_models_pytorch as smp
        import torch

        torch.manual_seed(0)
        smp.Unet(encoder, encoder_weights=None, classes=2).save_pretrained(path)
        _card(path / "tilenet.json", 2)
    return path
