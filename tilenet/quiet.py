"""Silence what libraries say of things that are no news: here, without touching other threads."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["asking_once", "ignoring", "quiet_dask", "quiet_gdal", "without_module"]

# These swap process-wide state: two threads inside would restore what the other has set.
_LOCK = threading.RLock()


@contextmanager
def ignoring(category: type[Warning], message: str = "") -> Iterator[None]:
    """Ignore warnings of `category` whose text begins with `message`; keep the body short."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """Let an import of `name` fail within, as if it was not installed."""
    with _LOCK:
        before = {name: sys.modules[name]} if name in sys.modules else {}
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say so
        try:
            yield
        finally:
            del sys.modules[name]
            sys.modules.update(before)


@contextmanager
def asking_once() -> Iterator[None]:
    """Let libraries within share one answer to which plugins are installed.

    Each that is imported asks anew, and reads a file of every package for it.
    """
    from importlib import metadata  # --help does without it

    with _LOCK:
        ask = metadata.entry_points
        answer = cache(ask)
        metadata.entry_points = lambda **wanted: answer().select(**wanted)
        try:
            yield
        finally:
            metadata.entry_points = ask


@contextmanager
def quiet_gdal() -> Iterator[None]:
    """Let a GDAL that is loaded within remark nothing on stderr; its errors are raised anyway.

    Each complains of what `tilenet.strangers` has it leave out and it does not have. It asks once,
    at its first remark, where these go.
    """
    with _LOCK:
        asked = "CPL_LOG" in os.environ
        os.environ.setdefault("CPL_LOG", os.devnull)
        try:
            yield
        finally:
            if not asked:
                del os.environ["CPL_LOG"]


def quiet_dask() -> None:
    """Keep Dask's log to itself in this process: what it has to say ends up in our errors.

    A worker's thread that waits for the device, for instance, is no event loop's fault.
    """
    for name in ("distributed", "distributed.client"):  # Dask gives the second a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
