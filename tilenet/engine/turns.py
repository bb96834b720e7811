"""Several runs that take turns: the next one's forwards begin when the last has started all of its.

While one run's last blocks are joined, and its mask is exported, compared and renamed, the next one
is planned and forwarded. Each run is driven by a thread of its own; signals stay the main thread's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tilenet.engine.admission import Versions
from tilenet.engine.cluster import Executor, WorkersDied
from tilenet.engine.meter import Spans
from tilenet.errors import ResourceError
from tilenet.models.session import Setup
from tilenet.models.store import ModelFiles

__all__ = ["Work", "take_turns"]

Work = Callable[[Executor], Any]
"""A run: drives its tasks on an executor and returns what became of it."""

_OPEN = 2
"""Runs that are open at a time: the one that starts forwards, and the one that ends."""

_PATIENCE = 8.0  # seconds that a stop waits for the threads that drive runs


class _Stopped(BaseException):
    """Nobody waits for this run any more; it resumes. No Exception, so that nobody notes it."""


class _Crowded(BaseException):
    """Workers died under a task while two runs had tasks there: which is to blame is not known.

    No Exception, as above.
    """


@dataclass(eq=False)
class _Run:
    """A run and, for its tasks, the executor that all share."""

    work: Work
    shared: Executor
    stop: threading.Event
    events: queue.SimpleQueue[tuple[_Run, str, Any]]
    note: Callable[[Spans], None]
    exclusive: bool
    alone: bool = True
    has_turn: bool = True
    patience: int = field(init=False)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.patience = self.shared.patience

    def begin(self) -> None:
        # A thread that is stuck in the system does not keep the process from ending.
        self.thread = threading.Thread(target=self._drive, name="tilenet-run", daemon=True)
        self.thread.start()

    def _drive(self) -> None:
        try:
            self.events.put((self, "returned", self.work(self)))
        except BaseException as error:  # the main thread's to judge
            self.events.put((self, "raised", error))

    @property
    def elsewhere(self) -> bool:
        return self.shared.elsewhere

    @property
    def versions(self) -> Versions:
        return self.shared.versions

    @property
    def places(self) -> Mapping[str, str]:
        return self.shared.places

    @property
    def workers(self) -> int:
        return self.shared.workers

    def beside(self, worker: str) -> tuple[str, ...]:
        return self.shared.beside(worker)

    def choose(self, files: ModelFiles, wanted: dict[str, Any]) -> Setup:
        return self.shared.choose(files, wanted)

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        return self.shared.submit(function, *arguments, network=network, near=near)

    def result(self, future: Any) -> Any:
        try:
            found = self.shared.result(future)
        except WorkersDied as error:
            if self.alone:
                raise
            raise _Crowded from error
        self.note(found[1])
        return found

    def check(self) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.shared.check()

    def handed_out(self) -> None:
        self.events.put((self, "handed out", None))


def take_turns(
    executor: Executor, works: deque[Work], note: Callable[[Spans], None]
) -> Generator[tuple[Work, Any]]:
    """Drive runs; yield each with what it returned, or the error that it raised.

    A run that fails for want of room or memory, or under which workers die, while another is open
    is driven again when that one has ended: alone, it has what it would have had by itself.

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
                    run.alone = len(runs) == 1 and run.alone
                runs[-1].begin()
            run, what, found = events.get()
            run.has_turn = False
            if what == "handed out":
                continue
            runs.remove(run)
            if not run.alone and isinstance(found, (_Crowded, ResourceError)):
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
    busy = any(run.has_turn or run.exclusive for run in runs)
    return bool(works) and len(runs) < _OPEN and not busy
