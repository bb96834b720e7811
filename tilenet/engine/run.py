"""The run that drives a plan's blocks to completion. The only importer of Dask.

Every task is named by a run folder and its blocks; a bounded number is in flight, and futures carry
small reports only. A thread pool does for a few blocks; more go through an in-process Dask cluster,
and `processes:N` or `tcp://…` through the same code on others.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

from tilenet.engine import spill
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.engine.task import STRIPS, Blocks, forward_task, join_task
from tilenet.errors import ClusterError, TilenetError, UsageError, convert_errors
from tilenet.memory import return_large_arrays
from tilenet.quiet import quiet_dask

__all__ = ["Executor", "open_executor", "run_blocks", "run_many", "worker_count"]

Progress = Callable[[int], None]
"""Called with the number of pixels that were finished."""

THREADS = 3
"""Per worker process: one computes, one reads ahead, one joins and writes."""

_FORWARDS_PER_WORKER = 2
_TASK_PIXELS, _TASK_BLOCKS = 1 << 21, 64  # of many small blocks: Dask takes 2 ms for a task
_MAX_JOINS = 16
_LOOK, _GRACE = 5.0, 30.0  # seconds between looks at the cluster; without workers at the most
_RESUMES = "a rerun resumes"
_FEW_BLOCKS = 256  # importing distributed and its cluster cost 1 s, 30 MB and 1 ms a task


class Executor(Protocol):
    """Where tasks run."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a task; returns a future with `add_done_callback`."""

    def result(self, future: Any) -> Any:
        """Return what a finished task gave, or raise what it could not do."""

    def check(self) -> None:
        """Raise ClusterError if the workers have been gone for some time."""

    @property
    def workers(self) -> int:
        """How many processes run tasks, as far as is known."""


class _Threads:
    """Tasks in this process, without Dask."""

    workers = 1

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tilenet")

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments)

    def result(self, future: Any) -> Any:
        return future.result()

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Dask:
    """Tasks on a Dask cluster."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._looked = time.monotonic()
        self._alive = self._looked
        self.workers = max(1, len(client.nthreads()))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._client.submit(_as_value, function, *arguments, pure=False)

    def result(self, future: Any) -> Any:
        try:
            result = future.result()
        except (CancelledError, OSError) as error:  # a task's own error is a value
            raise ClusterError("a task was lost", "--scheduler", _RESUMES) from error
        if isinstance(result, TilenetError):
            raise result
        return result

    def check(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        try:
            count = len(self._client.nthreads()) if self._client.status == "running" else 0
        except (OSError, TimeoutError):  # the connection is being lost
            count = 0
        if count:
            self.workers, self._alive = count, now
        elif now - self._alive > _GRACE:
            raise ClusterError("the workers or the scheduler are gone", "--scheduler", _RESUMES)


def _as_value(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task on a worker; its error travels as a value.

    Dask cannot pickle an error whose cause is GDAL's, and logs every one that is raised.
    """
    try:
        with convert_errors("a worker"):
            return function(*arguments)
    except TilenetError as error:
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _next(done: queue.SimpleQueue[Any], executor: Executor) -> Any:
    """Wait for a future; raises if whoever should finish it is gone."""
    while True:
        executor.check()
        try:
            return done.get(timeout=_LOOK)
        except queue.Empty:
            continue


def _parse(scheduler: str) -> tuple[str, int]:
    kind, _, count = scheduler.partition(":")
    if kind in ("local", "processes"):
        number = int(count) if count.isdigit() else 0 if ":" in scheduler else 1
        if number < 1 or (kind == "local" and ":" in scheduler):
            raise UsageError(f"no scheduler {scheduler}", "--scheduler", "write processes:N")
        return kind, number
    if kind in ("tcp", "tls") and len(count) > 2 and count.startswith("//"):
        return "address", 0
    raise UsageError(
        f"no scheduler {scheduler}", "--scheduler", "choose local, processes:N, tcp://… or tls://…"
    )


def worker_count(scheduler: str) -> int:
    """Return how many processes of this machine a scheduler starts (1 if it is elsewhere).

    Raises
    ------
    UsageError
        The scheduler is not known.
    """
    kind, number = _parse(scheduler)
    return number if kind == "processes" else 1


@contextmanager
def open_executor(scheduler: str, tasks: int) -> Iterator[Executor]:
    """Open what runs the tasks.

    Parameters
    ----------
    scheduler : str
        "local", "processes:N", "tcp://host:port" or "tls://host:port".
    tasks : int
        How many there will be; few are not worth a cluster.

    Raises
    ------
    UsageError
        The scheduler is not known.
    ClusterError
        It does not answer.
    """
    kind, number = _parse(scheduler)
    if kind == "local" and tasks <= _FEW_BLOCKS:
        threads = _Threads()
        try:
            yield threads
        finally:
            threads.close()
        return
    import distributed

    quiet_dask()
    options: dict[str, Any] = {
        "threads_per_worker": THREADS, "memory_limit": 0,
        # Dask's own counters, on loopback only and on whatever port is free.
        "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0",
    }  # fmt: skip
    try:
        if kind == "local":
            cluster = distributed.LocalCluster(
                n_workers=1, processes=False, protocol="inproc", **options
            )
        elif kind == "processes":
            cluster = distributed.LocalCluster(
                n_workers=number, host="127.0.0.1", preload=["tilenet.engine.worker"], **options
            )
        else:
            cluster = None
        client = distributed.Client(cluster or scheduler, timeout=15, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"no answer: {error}", scheduler, "is the scheduler running?") from error
    try:
        client.wait_for_workers(1, timeout=60)
        if kind == "address":
            client.run(return_large_arrays)
        yield _Dask(client)
    except TimeoutError as error:
        raise ClusterError("no worker has come", scheduler, "start dask worker") from error
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


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


class _Tasks:
    """The tasks of one run that are in flight."""

    def __init__(self, executor: Executor, key: tuple[str, str]) -> None:
        self._executor, self._key = executor, key
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[Any, Callable[..., Any]] = {}

    def submit(self, function: Callable[..., Any], blocks: Blocks) -> None:
        future = self._executor.submit(function, *self._key, blocks)
        self._running[future] = function
        future.add_done_callback(self._done.put)

    def room(self) -> bool:
        """Whether another forward may start: joins that pile up hold it back."""
        joins = sum(function is join_task for function in self._running.values())
        forwards = len(self._running) - joins
        return joins <= _MAX_JOINS and forwards < _FORWARDS_PER_WORKER * self._executor.workers

    def finished(self) -> Iterator[tuple[Callable[..., Any], Any]]:
        """Wait for a task; yield it and all others that are done, with their results."""
        if self._running:
            futures = [_next(self._done, self._executor)]
            while not self._done.empty():
                futures.append(self._done.get())
            for future in futures:
                yield self._running.pop(future), self._executor.result(future)


def _blocks_per_task(plan: Plan) -> int:
    lattice = plan.lattice
    many = min(lattice.blocks // _FEW_BLOCKS, _TASK_PIXELS // lattice.core(0).pixels)
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
    while True:
        while left and tasks.room():
            blocks = next(new, ())
            left = bool(blocks)
            if left:
                tasks.submit(forward_task, blocks)
        finished = list(tasks.finished())
        if not finished:
            return meter
        records: list[BlockRecord] = []
        ready: list[int] = []
        for function, (result, spans) in finished:
            meter.add(spans)
            if function is join_task:
                records += result
            else:
                ready += [joined for block in result for joined in state.forwarded(block)]
        for blocks in batched(ready, share):
            tasks.submit(join_task, blocks)
        journal.append(records)
        for record in records:
            _clean(folder, plan, record.block)
            progress(plan.lattice.core(record.block).pixels)


def run_many(
    executor: Executor, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
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
    """
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running, left = 0, iter(arguments)
    while True:
        while running < _FORWARDS_PER_WORKER * executor.workers:
            values = next(left, None)
            if values is None:
                break
            executor.submit(function, *values).add_done_callback(done.put)
            running += 1
        if not running:
            return
        yield executor.result(_next(done, executor))
        running -= 1
