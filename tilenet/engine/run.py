"""The run that drives a plan's blocks to completion.

Every task is named by a run folder and its blocks; a bounded number is in flight.
"""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

from tilenet.engine import spill
from tilenet.engine.cluster import FEW_BLOCKS, Executor, WorkersDied, next_done
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.engine.task import STRIPS, Blocks, forward_task, join_task, lose_block

__all__ = ["run_blocks", "run_many"]

Progress = Callable[[int], None]
"""Called with the number of pixels that were finished."""

_FORWARDS_PER_WORKER = 2
_TASK_PIXELS, _TASK_BLOCKS = 1 << 21, 64  # of many small blocks: Dask takes 2 ms for a task
_MAX_JOINS = 16


class _State:
    """Which blocks are forwarded and joined: one byte each."""

    NEW, FORWARDED, JOINING, JOINED = range(4)

    def __init__(self, plan: Plan, folder: Path, journal: Journal) -> None:
        self._lattice = plan.lattice
        self._state = bytearray(plan.lattice.blocks)
        for path in (folder / STRIPS).glob("*.own"):
            self._state[int(path.stem)] = self.FORWARDED
        for block in journal.blocks:
            if block >= 0:
                self._state[block] = self.JOINED

    def new_blocks(self) -> Iterator[int]:
        """Yield the blocks to forward, row by row."""
        block = self._state.find(self.NEW)
        while block >= 0:
            yield block
            block = self._state.find(self.NEW, block + 1)

    def forwarded(self, block: int) -> Iterator[int]:
        """Note a forward; yield the blocks that can now be joined."""
        if self._state[block] == self.NEW:
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
        block = self._state.find(self.FORWARDED)
        while block >= 0:
            yield from self._ready(block)
            block = self._state.find(self.FORWARDED, block + 1)

    def _ready(self, block: int) -> Iterator[int]:
        if self._state[block] == self.FORWARDED and all(
            self._state[giver] != self.NEW for giver in self._lattice.givers(block)
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


@dataclass(frozen=True, slots=True)
class _Task:
    function: Callable[..., Any]
    blocks: Blocks
    tries: int


class _Tasks:
    """The tasks of one run that are in flight."""

    def __init__(self, executor: Executor, key: tuple[str, str]) -> None:
        self._executor, self._key = executor, key
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[Any, _Task] = {}
        self._suspects: list[_Task] = []

    def submit(self, function: Callable[..., Any], blocks: Blocks, *, tries: int = 0) -> None:
        future = self._executor.submit(function, *self._key, blocks)
        self._running[future] = _Task(function, blocks, tries)
        future.add_done_callback(self._done.put)

    def room(self) -> bool:
        """Whether another forward may start: joins that pile up hold it back."""
        joins = sum(task.function is join_task for task in self._running.values())
        forwards = len(self._running) - joins
        return joins <= _MAX_JOINS and forwards < _FORWARDS_PER_WORKER * self._executor.workers

    def finished(self) -> Iterator[tuple[Callable[..., Any], Any]]:
        """Wait for a task; yield it and all others that are done, with their results.

        A block that is given up comes with `lose_block`, and its number for a result.
        """
        if not self._running and self._suspects:
            suspect = self._suspects.pop()
            if suspect.tries == self._executor.patience:
                yield lose_block, suspect.blocks[0]
                return
            self._executor.be_alone()
            self.submit(suspect.function, suspect.blocks, tries=suspect.tries + 1)
        if self._running:
            futures = [next_done(self._done, self._executor)]
            while not self._done.empty():
                futures.append(self._done.get())
            for future in futures:
                task = self._running.pop(future)
                try:
                    result = self._executor.result(future)
                except WorkersDied:
                    self._suspects += [replace(task, blocks=(block,)) for block in task.blocks]
                    continue
                yield task.function, result

    @property
    def left(self) -> bool:
        """Whether any task is in flight or must be tried again."""
        return bool(self._running or self._suspects)


def _blocks_per_task(plan: Plan) -> int:
    lattice = plan.lattice
    many = min(lattice.blocks // FEW_BLOCKS, _TASK_PIXELS // lattice.core(0).pixels)
    return max(1, min(_TASK_BLOCKS, many))


def run_blocks(
    plan: Plan, folder: Path, journal: Journal, executor: Executor, progress: Progress
) -> Meter:
    """Forward and join every block that the journal does not list.

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

    Returns
    -------
    Meter
        Seconds, tiles and memory.
    """
    meter, state = Meter(), _State(plan, folder, journal)
    tasks = _Tasks(executor, (str(folder.resolve()), secrets.token_hex(8)))
    share = _blocks_per_task(plan)
    for blocks in batched(state.waiting(), share):
        tasks.submit(join_task, blocks)
    new, left = batched(state.new_blocks(), share), True
    while left or tasks.left:
        while left and tasks.room():
            blocks = next(new, ())
            left = bool(blocks)
            if left:
                tasks.submit(forward_task, blocks)
            else:
                executor.handed_out()
        records, ready = _collect(tasks, state, meter, lambda b: lose_block(folder, plan, b))
        for blocks in batched(ready, share):
            tasks.submit(join_task, blocks)
        journal.append(records)
        for record in records:
            _clean(folder, plan, record.block)
            progress(plan.lattice.core(record.block).pixels)
    return meter


def _collect(
    tasks: _Tasks, state: _State, meter: Meter, lose: Callable[[int], BlockRecord]
) -> tuple[list[BlockRecord], list[int]]:
    """Wait for tasks; return what is joined, and the blocks that can now be."""
    records: list[BlockRecord] = []
    ready: list[int] = []
    for function, found in tasks.finished():
        if function is lose_block:
            records.append(lose(found))
            ready += state.lost(found)
            continue
        result, spans = found
        meter.add(spans)
        if function is join_task:
            records += result
        else:
            ready += [joined for block in result for joined in state.forwarded(block)]
    return records, ready


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
