"""How this process' allocator treats large arrays."""

from __future__ import annotations

import ctypes

__all__ = ["return_large_arrays"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGE = 4 << 20


def return_large_arrays() -> None:
    """Make glibc give freed arrays back to the system; elsewhere do nothing.

    By default every thread keeps an arena of its own and the threshold above which memory is
    returned grows to 32 MiB, so that each thread holds on to the largest block it ever had. For
    the command and its workers, which own their process; a library's caller decides for itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _LARGE)
