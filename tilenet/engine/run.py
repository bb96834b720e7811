"""The run that drives a plan's blocks to completion.

Every task is named by a run folder and its blocks; a bounded number is in flight.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from tilenet.engine.admission import admitting
from tilenet.engine.columns import Columns
from tilenet.engine.executor import FEW_BLOCKS, Executor, WorkersDied, next_done
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.lost import lose_block
from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import STRIPS
from tilenet.engine.state import Share, State
from tilenet.engine.task import forward_task, join_task, mend_task
from tilenet.engine.tasks import Hosts, Tasks

__all__ = ["run_blocks", "run_many"]

Progress = Callable[[int], None]
"""Called with the number of pixels that were finished."""

_TASK_PIXELS, _TASK_BLOCKS = 1 << 21, 64  # of many small blocks: Dask takes 2 ms for a task
_TASKS_PER_WORKER = 16  # at the least: the last ones leave the other workers idle


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
        tasks = Tasks(executor, (str((folder / share.plan).absolute()), token))
        together = _blocks_per_task(plan, executor.workers)
        run = _Run(plan, folder, tasks, State(plan, folder, journal, share), together)
        while run.go_on(executor):
            records = run.collect()
            journal.append(records)
            run.clean(records)
            for record in records:
                progress(plan.lattice.core(record.block).pixels)
    return run.meter


class _Run:
    """What is handed out, and what came of it."""

    def __init__(self, plan: Plan, folder: Path, tasks: Tasks, state: State, together: int) -> None:
        self._plan, self._folder, self._tasks, self._state = plan, folder, tasks, state
        lattice = plan.lattice
        self._columns = Columns(lattice.rows.blocks, lattice.cols.blocks, state.find_new)
        self._hosts = Hosts(lattice.blocks)
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

    def clean(self, records: Iterable[BlockRecord]) -> None:
        """Remove the files that nobody needs any more, now that these blocks are in the journal."""
        for name in self._state.joined([record.block for record in records]):
            (self._folder / STRIPS / name).unlink(missing_ok=True)


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
        while len(running) < executor.forwards * executor.workers:
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
