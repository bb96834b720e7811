"""A process that runs tasks for others: how it is set up, and what it has of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from tilenet.engine import counters
from tilenet.errors import ResourceError
from tilenet.memory import return_large_arrays
from tilenet.models.devices import cores
from tilenet.quiet import quiet_dask
from tilenet.watchdog import watch_reads

__all__ = ["dask_setup", "end_soon", "own_threads", "settle"]

_SOON = 5.0  # seconds, in which the run hears of it
_lock = threading.Lock()
_settled = False
_threads: int | None = None


def dask_setup(worker: Any) -> None:
    """Set up a worker process that we start (Dask's `preload`).

    It never sees Ctrl-C, which is for whoever ends it in order.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_dask()
    with _lock:
        _prepare()


def settle(threads: int) -> None:
    """Set up a worker process that somebody else has started, when it first works for us.

    Parameters
    ----------
    threads : int
        How many cores its owner lets it use: its threads, in Dask's words.
    """
    global _threads  # one process, one worker
    with _lock:
        if not _settled:
            _prepare()
            _threads = max(1, min(cores(), threads))


def own_threads() -> int | None:
    """Return how many threads this process gives a network; None if the plan says it."""
    return _threads


def end_soon(error: ResourceError) -> None:
    """End this process, in which nothing can go well any more, when its last report is out."""
    timer = threading.Timer(_SOON, _end, (error,))
    timer.daemon = True
    timer.start()


def _prepare() -> None:
    """Set up any process of a cluster: memory goes back, and no read is for ever."""
    global _settled
    _settled = True
    return_large_arrays()
    watch_reads(_end)
    counters.start()


def _end(error: ResourceError) -> None:
    sys.stderr.write(f"tilenet worker: {error}\n")
    sys.stderr.flush()
    os._exit(error.code)  # Dask starts another, and hands the work on
