"""The network that is trained: built, given an encoder's weights, described for predict."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilenet.errors import ModelError, UsageError
from tilenet.models.build import architectures, create_network
from tilenet.models.classic import CLASSIC
from tilenet.training.config import TrainConfig

__all__ = [
    "context_of", "divisor_of", "keep_depthwise_in_float32", "load_encoder", "margin_of",
    "network_config", "new_network",
]  # fmt: skip

_GLOBAL = re.compile(
    r"squeezeexc|^se(module|layer|block)|effectivese|scse|adaptive(avg|max)pool|global|attention"
    r"|groupnorm|instancenorm|^pab|nonlocal",
    re.IGNORECASE,
)
_HUB_ERRORS = (OSError, RuntimeError, ValueError, KeyError, ImportError)


def network_config(config: TrainConfig, bands: int, channels: int) -> dict[str, Any]:
    """Return the `config.json` of the network: its class and arguments.

    Raises
    ------
    UsageError
        No such architecture.
    """
    common = {"in_channels": bands, "classes": channels}
    if config.arch in CLASSIC:
        return {"_model_class": "ClassicUNet"} | common | CLASSIC[config.arch] | config.options
    if config.arch.lower() not in architectures():
        known = ", ".join([*architectures(), *CLASSIC])
        raise UsageError(f"no architecture {config.arch}", "--arch", f"there are {known}")
    encoder = {"encoder_name": config.encoder, "encoder_weights": None}
    return {"_model_class": config.arch.lower()} | encoder | common | config.options


def new_network(config: TrainConfig, arguments: dict[str, Any]) -> nn.Module:
    """Build the network with the seed's weights and, if asked for, an encoder's.

    Raises
    ------
    ModelError
        It cannot be built, or the encoder's weights cannot be had or do not fit.
    """
    torch.manual_seed(config.seed)
    network = create_network(arguments, f"--arch {config.arch} --encoder {config.encoder}")
    if config.arch in CLASSIC or config.encoder_weights == "none":
        return network
    if Path(config.encoder_weights).is_file():
        load_encoder(network, config.encoder, Path(config.encoder_weights))
    else:
        _load_from_hub(network, config, arguments)
    return network


def _load_from_hub(network: nn.Module, config: TrainConfig, arguments: dict[str, Any]) -> None:
    from tilenet.models.build import pretrained_encoder

    where = f"--encoder-weights {config.encoder_weights}"
    try:
        state = pretrained_encoder(
            config.encoder, arguments["in_channels"], config.encoder_weights,
            int(arguments.get("encoder_depth", 5)),
        )  # fmt: skip
        network.encoder.load_state_dict(state)  # type: ignore[union-attr]  # a module
    except _HUB_ERRORS as error:
        raise ModelError(
            f"{config.encoder}'s weights cannot be had: {error}", where,
            "check the name and the network, or give a FILE, or none",
        ) from error  # fmt: skip


def _by_name(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the encoder's tensors if names match, with or without timm's or SMP's prefix."""
    for prefix in ("", "model.", "encoder.", "encoder.model.", "module."):
        for strip in ("", "model."):
            named = {key: f"{prefix}{key.removeprefix(strip)}" for key in wanted}
            found = {key: state[name] for key, name in named.items() if name in state}
            if len(found) == len(wanted):
                return found
    return None


def _by_order(
    state: dict[str, Tensor], encoder: str, wanted: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return the encoder's tensors from a full classifier's whose tensors are in timm's order."""
    import timm

    name = encoder.removeprefix("tu-")
    if not timm.is_model(name):
        return None
    classifier = timm.create_model(name, pretrained=False).state_dict()
    given = list(state.values())
    if [t.shape for t in given] != [t.shape for t in classifier.values()]:
        return None
    return _by_name(dict(zip(classifier, given, strict=True)), wanted)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        import safetensors.torch

        return safetensors.torch.load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError("no dict of tensors")
    return found


def _fit_bands(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spread a first convolution for three bands over another number, at the same total."""
    fitted = {}
    for key, tensor in found.items():
        shape = wanted[key].shape
        if tensor.ndim == 4 and tensor.shape[1] == 3 != shape[1] and tensor.shape[0] == shape[0]:
            index = torch.arange(shape[1]) % 3
            tensor = tensor[:, index] * (3 / shape[1])
        fitted[key] = tensor
    return fitted


def load_encoder(network: nn.Module, encoder: str, path: Path) -> None:
    """Fill a network's encoder from a file: by name, or by order from timm's full classifier.

    Raises
    ------
    ModelError
        The file does not read, or its tensors are not this encoder's.
    """
    if not isinstance(getattr(network, "encoder", None), nn.Module):
        raise ModelError("the network has no encoder", path, "use --encoder-weights none")
    try:
        state = _read_state(path)
    except Exception as error:
        # torch.load raises whatever a damaged or malicious archive makes it meet.
        raise ModelError(f"the weights do not read: {error}", path, "check the file") from error
    part: nn.Module = network.encoder  # type: ignore[assignment]  # a module
    wanted = part.state_dict()
    found = _by_name(state, wanted) or _by_order(state, encoder, wanted)
    if found is None:
        raise ModelError(
            f"{len(state)} tensors that are not {encoder}'s", path, "choose the right --encoder"
        )
    fitted = _fit_bands(found, wanted)
    wrong = [key for key, tensor in fitted.items() if tensor.shape != wanted[key].shape]
    if wrong:
        raise ModelError(f"{wrong[0]} has another shape", path, "choose the right --encoder")
    part.load_state_dict(fitted)


def divisor_of(network: nn.Module) -> int:
    """Return what tile sides and origins must be multiples of."""
    own = getattr(network, "divisor", None)
    if isinstance(own, int):
        return own
    stride = getattr(getattr(network, "encoder", None), "output_stride", 32)
    return stride if isinstance(stride, int) else 32


def margin_of(network: nn.Module) -> tuple[int, int]:
    """Return the pixels that the network sees before and after what it answers."""
    own = getattr(network, "margin", (0, 0))
    return (int(own[0]), int(own[1]))


def context_of(network: nn.Module) -> str:
    """Return "global" if a module pools or attends over the whole tile, else "local"."""
    for name, module in network.named_modules():
        wrapped = getattr(module, "attention", module)
        if isinstance(wrapped, nn.Identity):
            continue  # a place for attention or squeeze and excitation that is left empty
        if _GLOBAL.search(type(module).__name__) or re.search(r"(^|\.)_?se(_|\.|$)", name):
            return "global"
    return "local"


def keep_depthwise_in_float32(network: nn.Module) -> None:
    """Take the depthwise convolutions out of autocast, in place.

    On a CPU their backward pass is about five times faster in float32 than in bfloat16, while the
    other layers gain from bfloat16.
    """

    def in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return forward(x.float())

        return run

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            # Of this one module, not of its class.
            module.forward = in_float32(module.forward)  # type: ignore[method-assign,assignment]
