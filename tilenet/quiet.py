"""Silence one known warning of a library without disturbing other threads' filters."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ignoring"]

# `catch_warnings` swaps process-wide state, so two threads inside it restore each other's filters.
_LOCK = threading.RLock()


@contextmanager
def ignoring(category: type[Warning], message: str = "") -> Iterator[None]:
    """Ignore warnings of `category` whose text begins with `message`; keep the body short."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
