"""The end of a read that does not end: a dead network file system, a codec that loops.

A thread that is stuck in the system cannot be stopped, so its process is: the command says why and
exits, a worker process just ends and its work goes elsewhere. Only they ask for it: a program that
uses the library keeps its process.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tilenet.errors import ResourceError

__all__ = ["watch_reads", "watched"]

_LOOK = 0.5  # seconds between looks

_lock = threading.Lock()
_numbers = itertools.count()
_reads: dict[int, tuple[float, float, str]] = {}  # number: when it began, when it is late, what
_act: Callable[[ResourceError], None] | None = None


def watch_reads(act: Callable[[ResourceError], None]) -> None:
    """Call `act`, once, from another thread, when a read is late; it ends the process.

    Parameters
    ----------
    act : callable
        Takes the error that says which read.
    """
    global _act  # one process, one way to end it
    with _lock:
        started, _act = _act is not None, act
    if not started:
        threading.Thread(target=_watch, name="tilenet-watchdog", daemon=True).start()


@contextmanager
def watched(what: str, seconds: float) -> Iterator[None]:
    """Count the time within as one read of `what`, which is late after so many seconds."""
    now, number = time.monotonic(), next(_numbers)
    with _lock:
        _reads[number] = (now, now + seconds, what)
    try:
        yield
    finally:
        with _lock:
            del _reads[number]


def _watch() -> None:
    looked = time.monotonic()
    while True:
        time.sleep(_LOOK)
        now = time.monotonic()
        stopped, looked = now - looked - _LOOK, now
        with _lock:
            if stopped > _LOOK:  # this process was, by Ctrl-Z or a freezer: that is no disk's fault
                for number, (began, limit, what) in _reads.items():
                    _reads[number] = (began + stopped, limit + stopped, what)
            late = [(began, what) for began, limit, what in _reads.values() if limit < now]
        if late and _act is not None:
            began, what = min(late)
            _act(
                ResourceError(
                    f"a read has not ended for {now - began:.0f} s",
                    what,
                    "look after the disk or the network; a rerun resumes (--read-timeout)",
                )
            )
            return
