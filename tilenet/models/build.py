"""From a model folder to a torch module. The only importer of segmentation-models-pytorch."""

from __future__ import annotations

import inspect

import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from tilenet.errors import ModelError
from tilenet.models.store import ModelFiles

__all__ = ["build_network"]


def build_network(files: ModelFiles) -> torch.nn.Module:
    """Build an SMP network and load its weights, strictly, without touching the network.

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
    config = {k: v for k, v in files.config.items() if not k.startswith("_")}
    kind = smp.MODEL_ARCHITECTURES_MAPPING.get(str(files.config["_model_class"]).lower())
    if kind is None:
        raise ModelError(f"SMP has no {files.config['_model_class']}", where, "check config.json")
    # A config that says "imagenet" would otherwise fetch weights that are replaced at once.
    config["encoder_weights"] = None
    known = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        config = {k: v for k, v in config.items() if k in known}
    try:
        network = kind(**config)
    except Exception as error:
        # SMP and timm raise whatever their constructors meet.
        raise ModelError(f"SMP cannot build it: {error}", where, "check config.json") from error
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
    network.eval()
    return network  # type: ignore[no-any-return]
