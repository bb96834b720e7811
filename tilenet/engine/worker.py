"""What Dask loads first in a worker process that we start (`preload`)."""

from __future__ import annotations

import signal
from typing import Any

from tilenet.memory import return_large_arrays
from tilenet.quiet import quiet_dask

__all__ = ["dask_setup"]


def dask_setup(worker: Any) -> None:
    """Set up a worker process: it never sees Ctrl-C, which is for whoever ends it in order."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_dask()
    return_large_arrays()
