"""Loader processes: forked from a server that never had threads and has imported what they need.

A fork of the training process itself could hang, since that has threads; a fresh interpreter for
every worker would take seconds to import torch. The server imports once, while data are checked.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

__all__ = ["end_with_parent", "start_workers", "worker_context"]


def worker_context() -> ForkServerContext:
    """Return how loader processes are made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tilenet.training.datasets"])
    return context


def end_with_parent(_worker: int = 0) -> None:
    """Let this loader process end when training does, killed or not.

    torch's own watch looks at the process' parent, which is the server; and the server stays while
    a worker does.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "a loader process has one"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start_workers() -> None:
    """Begin to import what loader processes need, and return at once."""
    worker_context()
    forkserver.ensure_running()
