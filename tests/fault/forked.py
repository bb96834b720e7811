"""Commands in forked children: every case its own process, without starting Python every time.

The parent has imported what commands need but runs nothing itself, so that it stays without
threads; files are made in children too. A child may allocate so much more than its parent and
take so long; both are measured.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import Ended

MEMORY = 1 << 30
"""What a child may map beyond its parent, in bytes."""
SECONDS = 10.0
NOBODY = 65534
_MAX_KEPT = 1 << 20  # of what a child prints


@dataclass(frozen=True)
class Forked(Ended):
    """How a child ended; `code` is -N for signal N, -999 if it hung; `grown` is resident bytes."""

    grown: int = 0


@dataclass(frozen=True)
class Forker:
    """Runs functions in children.

    Parameters
    ----------
    base : int
        Resident bytes of a child that does nothing.
    """

    base: int = 0

    @classmethod
    def ready(cls) -> Forker:
        """Import what commands import, and measure an idle child."""
        from tilenet.strangers import forget_drivers

        forget_drivers()  # as the command does
        import rasterio.io
        import torch
        import zarr

        import tilenet.api
        import tilenet.cli
        import tilenet.evaluate_api
        import tilenet.info
        import tilenet.models.build
        import tilenet.models.openvino_backend
        import tilenet.models.torch_backend
        import tilenet.train_api  # noqa: F401 - before it forks

        del rasterio, torch, zarr
        # OpenBLAS keeps an idle thread, and starts it again in a child by its own fork handler.
        warnings.filterwarnings("ignore", "This process", DeprecationWarning)
        return cls(cls().call(lambda: 0).grown)

    def command(self, arguments: list[str], folder: Path, *, nobody: bool = False) -> Forked:
        """Run the command line in `folder`, perhaps as a user who may nothing."""
        from tilenet.cli import run

        def command() -> int:
            os.chdir(folder)
            if nobody:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            return run(arguments)

        return self.call(command)

    def call(self, function: Callable[[], Any], seconds: float = SECONDS) -> Forked:
        """Run a function; its code is what it returns, or 1 and a traceback on stderr."""
        sys.stdout.flush()
        out, err = os.memfd_create("out"), os.memfd_create("err")
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_child(function, out, err)
        code, used = _wait(child, start + seconds)
        texts = [_kept(fd) for fd in (out, err)]
        grown = used.ru_maxrss * 1024 - self.base
        return Forked(code, texts[0], texts[1], time.monotonic() - start, grown)


def _be_child(function: Callable[[], Any], out: int, err: int) -> None:
    code = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = int(function() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, end: float) -> tuple[int, resource.struct_rusage]:
    pidfd = os.pidfd_open(child)
    ready, _, _ = select.select([pidfd], [], [], max(0.0, end - time.monotonic()))
    os.close(pidfd)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status) if ready else -999, used


def _kept(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read(_MAX_KEPT).decode(errors="replace")
