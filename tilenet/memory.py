"""Memory of this process: what it may have and has had, its allocator, and garbage."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tilenet.controlgroups import control_groups

__all__ = [
    "forget_peak",
    "keep_large_arrays",
    "memory_limit",
    "not_collecting",
    "peak_rss",
    "return_freed",
    "return_large_arrays",
]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_LARGE = 4 << 20
_KEPT = 1 << 30  # free bytes at the heap's end, at the most


def peak_rss() -> int:
    """Return the most memory this process has held, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Make `peak_rss` begin anew (proc(5), clear_refs); elsewhere than on Linux do nothing."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_limit(root: Path = Path("/")) -> int:
    """Return how many bytes this process may have: the machine's, or its container's or job's.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limits += [soft] if soft != resource.RLIM_INFINITY else []
    for folder in control_groups("memory", root):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # the last: version 1
            with suppress(OSError, ValueError):  # "max": there is none
                limits.append(int((folder / name).read_text()))
    return min(limits)


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
    time would go into getting pages from the system and giving them back. No array has pages of its
    own then, however large: the threshold for that goes up to 32 MiB only. Process-wide.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _KEPT})


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
