"""From a config or a model folder to a torch module. Only here (and in the losses) SMP comes in."""

from __future__ import annotations

import inspect
import re
from typing import Any

import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from tilenet.errors import ModelError
from tilenet.models.classic import ClassicUNet
from tilenet.models.store import ModelFiles

__all__ = ["architectures", "build_network", "create_network", "pretrained_encoder"]

_CLASSIC = "classicunet"
_FETCHING = {
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}
"""Arguments that make timm load files or use the network."""


def architectures() -> list[str]:
    """Return the names that SMP gives its architectures on a command line."""
    return sorted(smp.MODEL_ARCHITECTURES_MAPPING)


def pretrained_encoder(
    encoder: str, bands: int, weights: str, depth: int
) -> dict[str, torch.Tensor]:
    """Return an encoder's weights from a hub; the only place where training uses the network.

    Raises
    ------
    Exception
        Whatever SMP, timm and the hub's client meet.
    """
    part = smp.encoders.get_encoder(encoder, in_channels=bands, depth=depth, weights=weights)
    state: dict[str, torch.Tensor] = part.state_dict()
    return state


def create_network(config: dict[str, Any], where: str) -> torch.nn.Module:
    """Build a network with fresh weights, without touching the network.

    Parameters
    ----------
    config : dict
        A `config.json`: `_model_class` and the arguments of its constructor.
    where : str
        For messages.

    Raises
    ------
    ModelError
        The architecture is unknown, or does not take these arguments.
    """
    name = str(config["_model_class"]).lower()
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    if name == _CLASSIC:
        arguments = {k: v for k, v in arguments.items() if not k.startswith("encoder")}
        kind: Any = ClassicUNet
    else:
        kind = smp.MODEL_ARCHITECTURES_MAPPING.get(name)
        # A config that says "imagenet" would otherwise fetch weights that are replaced at once.
        arguments["encoder_weights"] = None
    encoder = str(config.get("encoder_name", ""))
    if not re.fullmatch(r"[\w.+-]*", encoder):  # timm would look into a folder or a hub
        raise ModelError(f"no encoder {encoder}", where, "name one of SMP's or timm's")
    fetching = sorted(_FETCHING & set(arguments))
    if fetching:
        raise ModelError(f"config.json asks to load more: {fetching[0]}", where, "remove that key")
    if kind is None:
        raise ModelError(f"SMP has no {config['_model_class']}", where, "check config.json")
    known = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        arguments = {k: v for k, v in arguments.items() if k in known}
    try:
        network: torch.nn.Module = kind(**arguments)
    except Exception as error:
        # SMP and timm raise whatever their constructors meet.
        raise ModelError(f"it cannot be built: {error}", where, "check its options") from error
    return network


def build_network(files: ModelFiles) -> torch.nn.Module:
    """Build a network and load its weights, strictly, without touching the network.

    Parameters
    ----------
    files : ModelFiles
        A model of kind "smp".

    Returns
    -------
    torch.nn.Module
        In eval mode, float32: (N, C, H, W) normalised → (N, K, H, W) logits.

    Raises
    ------
    ModelError
        The architecture is unknown or the weights do not fit it.
    """
    where = str(files.weights.parent)
    network = create_network(files.config, where)
    try:
        state = safetensors.torch.load_file(files.weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"weights cannot be read: {error}", where, "save it again") from error
    if not all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()):
        raise ModelError("the weights hold NaN or infinity", where, "train or save it again")
    have, want = set(state), set(network.state_dict())
    differing = sorted(have ^ want) or [
        k for k, v in network.state_dict().items() if v.shape != state[k].shape
    ]
    if differing:
        raise ModelError(
            f"weights and architecture differ in {len(differing)} keys: {', '.join(differing[:3])}",
            where,
            "check config.json",
        )
    network.load_state_dict(state)
    if getattr(network, "classification_head", None) is not None:
        # SMP's `aux_params`: labels of whole images.
        network.classification_head = None  # type: ignore[assignment]  # as SMP has it without
    network.eval()
    return network
