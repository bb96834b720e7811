"""The run that drives a plan's blocks to completion.

Every task is named by a run folder and its blocks; a bounded number is in flight.
"""

from __future__ import annotations

import queue
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

from tilenet.engine import spill
from tilenet.engine.admission import admitting
from tilenet.engine.cluster import FEW_BLOCKS, Executor, WorkersDied, next_done
from tilenet.engine.columns import Columns
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.meter import Meter, Spans, host_of
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import PLAN
from tilenet.engine.task import (
    STRIPS,
    Blocks,
    forward_task,
    is_lost,
    join_task,
    lose_block,
    mend_task,
)

__all__ = ["Share", "run_blocks", "run_many"]

Progress = Callable[[int], None]
"""Called with the number of pixels that were finished."""

_FORWARDS_PER_WORKER = 2
_TASK_PIXELS, _TASK_BLOCKS = 1 << 21, 64  # of many small blocks: Dask takes 2 ms for a task
_TASKS_PER_WORKER = 16  # at the least: the last ones leave the other workers idle
_MAX_JOINS = 16  # or as many as workers
_MAX_WORKERS = 1 << 16  # that are told apart: a spot fleet may see many come and go
_PAUSE = 0.5  # seconds between looks for a worker when there is none


@dataclass(frozen=True, slots=True)
class Share:
    """What one run of several, side by side in a run folder, makes of a plan.

    Parameters
    ----------
    blocks : range
        Its own blocks.
    done : set of int
        Blocks that other journals list.
    plan : str
        What its plan's file is called there: it may have another device or path than others'.
    """

    blocks: range
    done: frozenset[int] = frozenset()
    plan: str = PLAN


class _State:
    """Which blocks are forwarded and joined: one byte each. Only a share of them is ours to make.

    Of the others, some may be forwarded meanwhile by others.
    """

    NEW, FORWARDING, FORWARDED, JOINING, JOINED = range(5)

    def __init__(self, plan: Plan, folder: Path, journal: Journal, share: Share) -> None:
        self._lattice, self._own = plan.lattice, share.blocks
        self._state = bytearray(plan.lattice.blocks)
        for path in (folder / STRIPS).glob("*.own"):
            self._state[int(path.stem)] = self.FORWARDED
        for block in journal.blocks | share.done:
            if block >= 0:
                self._state[block] = self.JOINED

    def _find(self, state: int) -> Iterator[int]:
        """Yield own blocks in a state, row by row."""
        block = self._state.find(state, self._own.start, self._own.stop)
        while block >= 0:
            yield block
            block = self._state.find(state, block + 1, self._own.stop)

    def find_new(self, start: int, stop: int) -> int:
        """Return the first of some blocks that is ours to forward, -1 if none is."""
        own = self._own
        return self._state.find(self.NEW, max(start, own.start), min(stop, own.stop))

    def givers_to_others(self) -> Iterator[int]:
        """Yield the blocks to forward first, for whose strips others wait."""
        stop, lattice = self._own.stop, self._lattice
        if not self._own or stop == lattice.blocks:
            return
        row, _ = lattice.position(stop)
        first = lattice.number(lattice.rows.givers(row).start, 0)
        for block in range(max(first, self._own.start), stop):
            waited_for = any(taker >= stop for taker in lattice.takers(block))
            if waited_for and self._state[block] == self.NEW:
                self._state[block] = self.FORWARDING
                yield block

    def left_over(self, folder: Path) -> list[int]:
        """Return the blocks that wait for others' blocks only: last those whose strips are missing.

        Those may still come; else they are made again.
        """
        strips = folder / STRIPS

        def missing(block: int) -> int:
            return sum(
                not (strips / spill.strip_name(giver, block)).exists()
                and not is_lost(folder, giver)
                for giver in self._lattice.givers(block)
            )

        left = sorted(self._find(self.FORWARDED), key=missing)
        for block in left:
            self._state[block] = self.JOINING
        return left

    def forwarded(self, block: int) -> Iterator[int]:
        """Note a forward; yield the blocks that can now be joined."""
        if self._state[block] < self.FORWARDED:
            self._state[block] = self.FORWARDED
        for candidate in (block, *self._lattice.takers(block)):
            yield from self._ready(candidate)

    def lost(self, block: int) -> Iterator[int]:
        """Note a block that was given up; yield the blocks that need not wait for it any more."""
        self._state[block] = self.JOINED
        for candidate in self._lattice.takers(block):
            yield from self._ready(candidate)

    def waiting(self) -> Iterator[int]:
        """Yield the blocks that an earlier run left ready to be joined."""
        for block in self._find(self.FORWARDED):
            yield from self._ready(block)

    def _ready(self, block: int) -> Iterator[int]:
        ours = block in self._own and self._state[block] == self.FORWARDED
        if ours and all(
            self._state[giver] >= self.FORWARDED for giver in self._lattice.givers(block)
        ):
            self._state[block] = self.JOINING
            yield block


def _clean(folder: Path, plan: Plan, block: int) -> None:
    """Remove what only this block needed."""
    strips = folder / STRIPS
    for name in spill.own_names(block):
        (strips / name).unlink(missing_ok=True)
    for giver in plan.lattice.givers(block):
        (strips / spill.strip_name(giver, block)).unlink(missing_ok=True)


class _Hosts:
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


class _Tasks:
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
        if self._forwarding >= _FORWARDS_PER_WORKER * executor.workers:
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


def _blocks_per_task(plan: Plan, workers: int) -> int:
    lattice = plan.lattice
    tasks = max(FEW_BLOCKS, _TASKS_PER_WORKER * workers)
    many = min(lattice.blocks // tasks, _TASK_PIXELS // lattice.core(0).pixels)
    return max(1, min(_TASK_BLOCKS, many))


def run_blocks(
    plan: Plan,
    folder: Path,
    journal: Journal,
    executor: Executor,
    progress: Progress,
    share: Share | None = None,
) -> Meter:
    """Forward and join every block, or those of a share, that no journal lists.

    Parameters
    ----------
    plan : Plan
        The run.
    folder : Path
        Its run folder, with plan, store and strips folder in place.
    journal : Journal
        Grows as blocks are done.
    executor : Executor
        Where the tasks run.
    progress : callable
        Called with finished pixels.
    share : Share, optional
        What is ours to make.

    Returns
    -------
    Meter
        Seconds, tiles and memory.
    """
    share = share or Share(range(plan.lattice.blocks))
    with admitting(folder, plan.model, executor.versions, elsewhere=executor.elsewhere) as token:
        tasks = _Tasks(executor, (str((folder / share.plan).absolute()), token))
        together = _blocks_per_task(plan, executor.workers)
        run = _Run(plan, folder, tasks, _State(plan, folder, journal, share), together)
        while run.go_on(executor):
            records = run.collect()
            journal.append(records)
            for record in records:
                _clean(folder, plan, record.block)
                progress(plan.lattice.core(record.block).pixels)
    return run.meter


class _Run:
    """What is handed out, and what came of it."""

    def __init__(
        self, plan: Plan, folder: Path, tasks: _Tasks, state: _State, together: int
    ) -> None:
        self._plan, self._folder, self._tasks, self._state = plan, folder, tasks, state
        lattice = plan.lattice
        self._columns = Columns(lattice.rows.blocks, lattice.cols.blocks, state.find_new)
        self._hosts = _Hosts(lattice.blocks)
        self._together = together
        self._first = batched(state.givers_to_others(), self._together)
        self._handing_out = True
        self.meter = Meter()
        self._join(state.waiting())

    def go_on(self, executor: Executor) -> bool:
        """Start what there is room for; return whether anything is under way or still to be done.

        Last come the joins of blocks that wait for others' blocks only.
        """
        while self._handing_out and (worker := self._tasks.free()) is not None:
            blocks = next(self._first, ()) or self._columns.take(
                worker, executor.places, self._together
            )
            if blocks:
                self._tasks.submit(forward_task, blocks, worker=worker)
            else:
                self._handing_out = False
                executor.handed_out()
        if not self._handing_out and not self._tasks.left:
            self._join(self._state.left_over(self._folder))
        return self._handing_out or self._tasks.left

    def _join(self, blocks: Iterable[int]) -> None:
        """Join blocks, best where they were forwarded."""
        for some in batched(blocks, self._together):
            self._tasks.submit(join_task, some, worker=self._hosts.of(some[0]))

    def collect(self) -> list[BlockRecord]:
        """Wait for tasks, start the joins that can now be, and return the blocks that are done."""
        records: list[BlockRecord] = []
        ready: list[int] = []
        for function, blocks, found in self._tasks.finished():
            if function is lose_block:
                records.append(lose_block(self._folder, self._plan, blocks[0]))
                ready += self._state.lost(blocks[0])
                continue
            result, spans = found
            self.meter.add(spans)
            if function is forward_task:
                self._hosts.forwarded(blocks, spans.worker)
                ready += [one for block in blocks for one in self._state.forwarded(block)]
                continue
            self.meter.strip_bytes_moved += self._hosts.moved(spans)
            records += result
            done = {record.block for record in result}
            lost = tuple(block for block in blocks if block not in done)
            if lost:  # strips of theirs, and that worker does not run the network
                self._tasks.submit(mend_task, lost)
        self._join(ready)
        return records


def run_many(
    executor: Executor,
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    split: Callable[..., Iterable[tuple[Any, ...]]],
    lose: Callable[..., Any],
) -> Iterator[Any]:
    """Run one task per tuple of arguments, a bounded number at a time; yield results as they come.

    Parameters
    ----------
    executor : Executor
        Where the tasks run.
    function : callable
        The task.
    arguments : iterable of tuple
        Read as tasks finish.
    split : callable
        From the arguments of a task under which workers died to those of its smallest parts, which
        are tried one by one when all else is done.
    lose : callable
        From the arguments of such a part, under which they die again, to what counts as its result.
    """
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: dict[Any, tuple[Any, ...]] = {}
    suspects: list[tuple[Any, ...]] = []
    left = iter(arguments)
    while True:
        while len(running) < _FORWARDS_PER_WORKER * executor.workers:
            values = next(left, None)
            if values is None:
                break
            future = executor.submit(function, *values)
            running[future] = values
            future.add_done_callback(done.put)
        if not running:
            break
        future = next_done(done, executor)
        values = running.pop(future)
        try:
            yield executor.result(future)
        except WorkersDied:
            suspects += split(*values)
    for values in suspects:
        executor.be_alone()
        executor.submit(function, *values).add_done_callback(done.put)
        try:
            yield executor.result(next_done(done, executor))
        except WorkersDied:
            yield lose(*values)
