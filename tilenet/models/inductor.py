"""Inductor, PyTorch's own compiler: kernels made for a network, once for each shape of its input.

It keeps them where other processes find them again: in ``torchinductor_USER`` in the folder for
temporary files, or in the one that ``TORCHINDUCTOR_CACHE_DIR`` names. What it cannot compile whole
is an error: a part that ran otherwise would be slow, and nobody would know.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tilenet.errors import ModelError

__all__ = ["CompiledNetwork", "check_compiler"]

_logger = logging.getLogger(__name__)

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "compile_threads": 1,  # no processes of its own, which might outlive a run that is stopped
    "deterministic": True,  # no kernel that adds up is chosen by a race that may end otherwise
    "triton.cudagraphs": False,  # the answers of two lanes would share their memory
}
_MOST_SHAPES = 1 << 10  # of the networks of one architecture; Dynamo's own limit is 8
_DO = "use --backend torch"
_NO_FAULT = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What is none of the network's: a full disk, for one."""


def check_compiler(device: str) -> None:
    """Raise ModelError unless this machine has what inductor needs to compile for a device."""
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            what = "inductor needs a C++ compiler, and finds none (g++, or what CXX names)"
            raise ModelError(what, "--backend", _DO) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise ModelError("inductor needs Triton on CUDA, and finds none", "--backend", _DO)


class CompiledNetwork:
    """A network that is compiled for each shape of its input when it first meets it.

    Parameters
    ----------
    network : torch.nn.Module
        In eval mode, on its device.
    name : str
        For messages.
    """

    def __init__(self, network: torch.nn.Module, name: str) -> None:
        # A toolkit for CUDA without a device is no news.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self._run = torch.compile(
            network, fullgraph=True, dynamic=False, backend="inductor", options=_OPTIONS
        )
        self._name = name
        self.compiling = 0.0  # seconds so far
        self._known: set[torch.Size] = set()
        self._lock = threading.Lock()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the network's answer.

        Raises
        ------
        ModelError
            It cannot be compiled.
        """
        if inputs.shape in self._known:
            answer: torch.Tensor = self._run(inputs)
            return answer
        with self._lock:  # of two lanes, one compiles
            start = time.perf_counter()
            answer = self._compiled(inputs)
            seconds = time.perf_counter() - start
            if inputs.shape not in self._known:  # else the other lane has told of it
                self.compiling += seconds
                self._known.add(inputs.shape)
                _logger.info(
                    "compiling %s for %d×%d with inductor: %.0f s",
                    self._name, *inputs.shape[-2:], seconds,
                )  # fmt: skip
            return answer

    def _compiled(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the answer to an input of a shape that may be new."""
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        limits = {"recompile_limit": _MOST_SHAPES, "accumulated_recompile_limit": _MOST_SHAPES}
        try:
            with config.patch(limits):
                answer: torch.Tensor = self._run(inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, _NO_FAULT):
                raise inner from error
            [first, *_] = (inner or error).args or ("",)
            first = str(first).strip().partition("\n")[0]
            raise ModelError(f"inductor cannot compile it: {first}", self._name, _DO) from error
        return answer
