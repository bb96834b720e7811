"""The result folder: a model that predict runs with no other flag, and how it came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from tilenet import durable
from tilenet.blend import Activation
from tilenet.models.card import ModelCard, parse_card
from tilenet.training.config import TrainConfig
from tilenet.training.samples import DataSet
from tilenet.training.survey import PartSurvey

__all__ = ["draft_card", "value_range", "write_model"]


def value_range(dtype: str) -> tuple[float, float]:
    """Return the pixels' whole range for unsigned integers, else (0, 1): raw units."""
    if dtype in ("uint8", "uint16"):
        return (0.0, float(np.iinfo(dtype).max))
    return (0.0, 1.0)


def draft_card(
    config: TrainConfig,
    data: DataSet,
    survey: PartSurvey,
    activation: Activation,
    shape: dict[str, Any],
    name: str,
) -> ModelCard:
    """Return the card of the model that is trained.

    Parameters
    ----------
    config : TrainConfig
        Mean and standard deviation, where they are given; further keys.
    data : DataSet
        Classes, bands, dtype.
    survey : PartSurvey
        Of the training part: mean and standard deviation otherwise.
    activation : {"sigmoid", "softmax"}
        Of the scores.
    shape : dict
        `divisor`, `context` and perhaps `margin` of the network.
    name : str
        The model's.
    """
    lo, hi = value_range(data.dtype)
    mean = config.mean or tuple(float(f"{v:.8g}") for v in (survey.mean - lo) / (hi - lo))
    # A constant band has no deviation; whatever it is divided by, it stays 0.
    std = config.std or tuple(float(f"{v:.8g}") or 1.0 for v in survey.std / (hi - lo))
    document = {
        "schema": 1,
        "name": name,
        "classes": [{"id": c.id, "name": c.name, "color": list(c.color)} for c in data.classes],
        "bands": data.bands,
        "value_range": [lo, hi],
        "mean": list(mean),
        "std": list(std),
        "activation": activation,
        "threshold": 0.5,
        "tile": config.tile,
        "overlap": config.tile // 4,
    }
    document |= data.resolution | shape | config.card
    return parse_card(json.dumps(document).encode(), "tilenet.json", {})


def write_model(
    folder: Path,
    network: dict[str, Any],
    card: ModelCard,
    weights: dict[str, Tensor],
    *,
    half: bool = False,
) -> None:
    """Write a model folder; the weights come last, so that it is whole or no model.

    Parameters
    ----------
    folder : Path
        Exists.
    network : dict
        `config.json`.
    card : ModelCard
        `tilenet.json`.
    weights : dict of str to Tensor
        Float32, on any device.
    half : bool
        Write them as float16; predict computes as it does with the others.
    """
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    if half:
        contiguous = {k: t.half() if t.is_floating_point() else t for k, t in contiguous.items()}
    document = card.model_dump(mode="json", by_alias=True, exclude_none=True)
    durable.write(folder / "config.json", (json.dumps(network, indent=2) + "\n").encode())
    durable.write(folder / "tilenet.json", (json.dumps(document, indent=2) + "\n").encode())
    durable.write(folder / "model.safetensors", safetensors.torch.save(contiguous))
