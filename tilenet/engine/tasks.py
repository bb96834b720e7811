"""The tasks of a run that are in flight, and which worker did what."""

from __future__ import annotations

import queue
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilenet.engine.executor import Executor, WorkersDied, next_done
from tilenet.engine.lost import lose_block
from tilenet.engine.meter import Spans, host_of
from tilenet.engine.task import Blocks, forward_task, join_task

__all__ = ["Hosts", "Tasks"]

_MAX_JOINS = 16  # or as many as workers
_MAX_WORKERS = 1 << 16  # that are told apart: a spot fleet may see many come and go
_PAUSE = 0.5  # seconds between looks for a worker when there is none


class Hosts:
    """Which worker forwarded a block, and whose strips travelled."""

    def __init__(self, blocks: int) -> None:
        self._number = array("H", bytes(2 * blocks))  # 0: an earlier run, or a lone process
        self._numbers, self._workers = {"": 0}, [""]

    def forwarded(self, blocks: Blocks, worker: str) -> None:
        """Note who forwarded blocks."""
        if worker not in self._numbers and len(self._workers) < _MAX_WORKERS:
            self._numbers[worker] = len(self._workers)
            self._workers.append(worker)
        for block in blocks:
            self._number[block] = self._numbers.get(worker, 0)

    def of(self, block: int) -> str:
        """Return the worker that forwarded a block, "" if that is not known."""
        return self._workers[self._number[block]]

    def moved(self, spans: Spans) -> int:
        """Return how many of the bytes that a join read another host had written."""
        here = host_of(spans.worker)
        return sum(
            size
            for block, size in spans.strip_reads
            if (writer := self.of(block)) and host_of(writer) != here
        )


@dataclass(frozen=True, slots=True)
class _Task:
    function: Callable[..., Any]
    blocks: Blocks
    tries: int
    worker: str


class Tasks:
    """The tasks of one run that are in flight."""

    def __init__(self, executor: Executor, key: tuple[str, str]) -> None:
        self._executor, self._key = executor, key
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[Any, _Task] = {}
        self._suspects: list[_Task] = []
        self._forwards: Counter[str] = Counter()
        self._forwarding = self._joins = 0

    def submit(
        self, function: Callable[..., Any], blocks: Blocks, *, tries: int = 0, worker: str = ""
    ) -> None:
        """Start a task, best on a worker; a join best on any worker of that one's host."""
        joins = function is not forward_task
        near = self._executor.beside(worker) if joins else (worker,)
        future = self._executor.submit(
            function, *self._key, blocks, network=function is not join_task, near=near
        )
        self._running[future] = _Task(function, blocks, tries, worker)
        if joins:
            self._joins += 1
        else:
            self._forwards[worker] += 1
            self._forwarding += 1
        future.add_done_callback(self._done.put)

    def _ended(self, future: Any) -> _Task:
        task = self._running.pop(future)
        if task.function is not forward_task:
            self._joins -= 1
        else:
            self._forwards[task.worker] -= 1
            self._forwarding -= 1
        return task

    def free(self) -> str | None:
        """Return the worker that may start another forward; None if there is no room.

        Joins that pile up hold it back.
        """
        executor = self._executor
        if self._joins > max(_MAX_JOINS, executor.workers):
            return None
        if self._forwarding >= executor.forwards * executor.workers:
            return None
        return min(executor.places, key=self._forwards.__getitem__, default=None)

    def finished(self) -> Iterator[tuple[Callable[..., Any], Blocks, Any]]:
        """Wait for a task; yield it and all others that are done: function, blocks and result.

        A block that is given up comes with `lose_block`, and without a result.
        """
        if not self._running and self._suspects:
            suspect = self._suspects.pop()
            if suspect.tries == self._executor.patience:
                yield lose_block, suspect.blocks, None
                return
            self._executor.be_alone()
            self.submit(suspect.function, suspect.blocks, tries=suspect.tries + 1)
        if not self._running:
            self._executor.check()  # for there is nobody who could do anything
            time.sleep(_PAUSE)
        else:
            futures = [next_done(self._done, self._executor)]
            while not self._done.empty():
                futures.append(self._done.get())
            for future in futures:
                task = self._ended(future)
                try:
                    result = self._executor.result(future)
                except WorkersDied:
                    self._suspects += [replace(task, blocks=(block,)) for block in task.blocks]
                    continue
                yield task.function, task.blocks, result

    @property
    def left(self) -> bool:
        """Whether any task is in flight or must be tried again."""
        return bool(self._running or self._suspects)
