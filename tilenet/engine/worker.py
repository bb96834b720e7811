"""What Dask loads first in a worker process that we start (`preload`)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tilenet.errors import ResourceError
from tilenet.memory import return_large_arrays
from tilenet.quiet import quiet_dask
from tilenet.watchdog import watch_reads

__all__ = ["dask_setup", "prepare"]


def dask_setup(worker: Any) -> None:
    """Set up a worker process: it never sees Ctrl-C, which is for whoever ends it in order."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_dask()
    prepare()


def prepare() -> None:
    """Set up any process that runs tasks for others: memory goes back, and no read is for ever."""
    return_large_arrays()
    watch_reads(_end)


def _end(error: ResourceError) -> None:
    sys.stderr.write(f"tilenet worker: {error}\n")
    sys.stderr.flush()
    os._exit(error.code)  # Dask starts another, and hands the work on
