"""Several runs that take turns: the next one's forwards begin when the last has started all of its.

While one run's last blocks are joined, and its mask is exported, compared and renamed, the next one
is planned and forwarded. Each run is driven by a thread of its own; signals stay the main thread's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, cast

from tilenet.engine.executor import Executor
from tilenet.engine.meter import Spans
from tilenet.errors import ResourceError

__all__ = ["Work", "take_turns"]

Work = Callable[[Executor], Any]
"""A run: drives its tasks on an executor and returns what became of it."""

_OPEN = 2
"""Runs that are open at a time: the one that starts forwards, and the one that ends."""

_PATIENCE = 8.0  # seconds that a stop waits for the threads that drive runs
_LOOK = 0.2


class _Stopped(BaseException):
    """Nobody waits for this run any more; it resumes. No Exception, so that nobody notes it."""


@dataclass(eq=False)
class _Run:
    """A run and, for its tasks, the executor that all share."""

    work: Work
    shared: Executor
    stop: threading.Event
    events: queue.SimpleQueue[tuple[_Run, str, Any]]
    note: Callable[[Spans], None]
    exclusive: bool = False
    """Whether no other run is open, nor will be until this one has ended."""

    crowded: bool = False
    """Whether another was open at any time."""

    has_turn: bool = True
    waits: bool = False
    permit: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread = field(init=False)

    def begin(self) -> None:
        # A thread that is stuck in the system does not keep the process from ending.
        self.thread = threading.Thread(target=self._drive, name="tilenet-run", daemon=True)
        self.thread.start()

    def _drive(self) -> None:
        try:
            self.events.put((self, "returned", self.work(cast(Executor, self))))
        except BaseException as error:  # the main thread's to judge
            self.events.put((self, "raised", error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)

    def result(self, future: Any) -> Any:
        found = self.shared.result(future)
        self.note(found[1])
        return found

    def check(self) -> None:
        self.check_wanted()
        self.shared.check()

    def check_wanted(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def handed_out(self) -> None:
        self.events.put((self, "handed out", None))

    def be_alone(self) -> None:
        self.events.put((self, "wants to be alone", None))
        while not self.permit.wait(_LOOK):
            self.check()
        self.shared.be_alone()


def take_turns(
    executor: Executor, works: deque[Work], note: Callable[[Spans], None]
) -> Generator[tuple[Work, Any]]:
    """Drive runs; yield each with what it returned, or the error that it raised.

    A run that fails for want of room or memory while another is open is driven again when that one
    has ended: alone, it has what it would have had by itself.

    Parameters
    ----------
    executor : Executor
        Where their tasks run.
    works : deque of Work
        Taken from the left; may grow while runs are driven, by any thread.
    note : callable
        Called with what each task measured, by one thread at a time.
    """
    stop, lock = threading.Event(), threading.Lock()
    events: queue.SimpleQueue[tuple[_Run, str, Any]] = queue.SimpleQueue()
    runs: list[_Run] = []
    again: deque[Work] = deque()

    def noting(spans: Spans) -> None:
        with lock:
            note(spans)

    try:
        while works or again or runs:
            while _may_begin(works, again, runs):
                exclusive = bool(again)
                work = again.popleft() if again else works.popleft()
                runs.append(_Run(work, executor, stop, events, noting, exclusive))
                for run in runs:
                    run.crowded |= len(runs) > 1
                runs[-1].begin()
            _grant(runs)
            run, what, found = events.get()
            run.has_turn = False
            if what == "wants to be alone":
                run.waits = True
            elif what != "handed out":
                runs.remove(run)
                if run.crowded and isinstance(found, ResourceError):
                    again.append(run.work)
                else:
                    yield run.work, found
    finally:
        stop.set()
        until = time.monotonic() + _PATIENCE
        for run in runs:
            run.thread.join(max(0.0, until - time.monotonic()))


def _may_begin(works: deque[Work], again: deque[Work], runs: list[_Run]) -> bool:
    if again:
        return not runs
    busy = any(run.has_turn or run.waits or run.exclusive for run in runs)
    return bool(works) and len(runs) < _OPEN and not busy


def _grant(runs: list[_Run]) -> None:
    """Let one run be alone when all that are open wait for that, and so have no tasks."""
    if runs and all(run.waits or run.exclusive for run in runs):
        # The one that is alone already, if there is one, may ask again.
        run = next((run for run in runs if run.exclusive), runs[0])
        if run.waits:
            run.exclusive, run.waits = True, False
            run.permit.set()
