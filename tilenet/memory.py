"""How this process' allocator treats large arrays, and when it looks for garbage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_large_arrays", "not_collecting", "return_freed", "return_large_arrays"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGE = 4 << 20
_LARGEST, _KEPT = 32 << 20, 1 << 30  # glibc takes no higher threshold; memory kept at the most


def return_large_arrays() -> None:
    """Make glibc give freed arrays back to the system; elsewhere do nothing.

    By default every thread keeps an arena of its own and the threshold above which memory is
    returned grows to 32 MiB, so that each thread holds on to the largest block it ever had. For
    the command and its workers, which own their process; a library's caller decides for itself.
    """
    _set({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: _LARGE})


def keep_large_arrays() -> None:
    """Make glibc keep freed arrays for the next ones; elsewhere do nothing.

    For networks on torch's CPU backend, which allocates every layer's answer anew: a third of their
    time would go into getting pages from the system and giving them back. Process-wide.
    """
    _set({_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _KEPT})


def return_freed() -> None:
    """Make glibc give back the pages that lie free between what is still in use; else do nothing.

    Small arrays of many blocks would leave more and more of them.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)


@contextmanager
def not_collecting() -> Iterator[None]:
    """Look for no garbage within: of what imports make there is none, and much to look through."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _set(options: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in options.items():
        mallopt(option, value)
