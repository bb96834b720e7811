"""What this machine has to compute with: processors, their arithmetic, CUDA devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from tilenet.controlgroups import cpu_limit

__all__ = ["Precision", "cores", "cpu_flags", "cpu_precisions", "has_cuda", "usual_precision"]

Precision = Literal["fp32", "bf16", "fp16"]


def cores() -> int:
    """Return how many processors this process may use, by its affinity and its control groups."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    own = len(os.sched_getaffinity(0))
    return min(own, cpu_limit() or own)


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device."""
    # Asking torch costs seconds; without a driver there is nothing to ask.
    if not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl")):
        return False
    import torch

    return bool(torch.cuda.is_available())


def usual_precision(device: str) -> Precision:
    """Return the fastest arithmetic that a device has in hardware."""
    if device == "cpu":
        return "bf16" if cpu_flags() & {"amx_bf16", "bf16"} else "fp32"
    import torch

    with torch.cuda.device(device):  # torch answers for the current one
        # Emulated, as before Ampere, bf16 is much slower than fp16.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def cpu_precisions() -> set[str]:
    """Return the arithmetic that the processor has in hardware."""
    has_bf16 = cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"}
    return {"fp32", "bf16"} if has_bf16 else {"fp32"}


def cpu_flags() -> set[str]:
    """Return the processor's features in Linux' words; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
