"""What this machine gives a run: "auto" settled into a device, a precision, loader processes."""

from __future__ import annotations

from pathlib import Path

import torch

from tilenet.errors import ModelError, UsageError
from tilenet.models.devices import cores, usual_precision
from tilenet.training.config import TrainConfig

__all__ = ["settle"]

_WEIGHTS = (".pt", ".pth", ".safetensors")
_MOST_WORKERS = 8


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UsageError(f"no device {wanted}", "--device", "choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ModelError("no such CUDA device", f"--device {wanted}", "use --device cpu")
    return wanted


def _encoder_weights(wanted: str) -> str:
    path = Path(wanted)
    if path.is_file():
        return str(path.absolute())
    if path.suffix in _WEIGHTS or "/" in wanted:
        raise ModelError("no such file", f"--encoder-weights {wanted}", "check the path")
    return wanted


def settle(config: TrainConfig) -> TrainConfig:
    """Return the configuration with nothing left to the machine.

    Raises
    ------
    ModelError
        The device, or the file of encoder weights, is not there.
    UsageError
        No such kind of device.
    """
    device = _device(config.device)
    precision = config.precision if config.precision != "auto" else usual_precision(device)
    if (device, precision) == ("cpu", "fp16"):
        raise ModelError("a CPU does not train in fp16", "--precision fp16", "use bf16 or fp32")
    workers = config.workers if config.workers >= 0 else min(_MOST_WORKERS, cores() // 2)
    settled = {
        "device": device,
        "precision": precision,
        "workers": workers,
        "encoder_weights": _encoder_weights(config.encoder_weights),
    }
    return config.model_copy(update=settled)
