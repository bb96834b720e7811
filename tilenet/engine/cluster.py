"""Where tasks run: a thread pool for a few, else a Dask cluster. The only importer of Dask.

Futures carry small reports only; all else lies in the run folder. More than a few blocks go through
an in-process cluster, and `processes:N` or `tcp://…` through the same code on others.
"""

from __future__ import annotations

import asyncio
import queue
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Protocol
from urllib.parse import urlsplit

from tilenet.engine.worker import prepare
from tilenet.errors import ClusterError, TilenetError, UsageError, convert_errors
from tilenet.quiet import quiet_dask

__all__ = ["FEW_BLOCKS", "Executor", "WorkersDied", "next_done", "open_executor", "worker_count"]

THREADS = 3
"""Per worker process: one computes, one reads ahead, one joins and writes."""

FEW_BLOCKS = 256
"""So many need no cluster: importing distributed costs 1 s, its cluster 30 MB and 1 ms a task."""

# A process that dies takes all its tasks with it. One under which two have died is suspect, is
# tried alone when all else is done, and given up when it has taken so many more with it.
_DEATHS, _PATIENCE = 2, 2
_LOOK, _GRACE = 5.0, 30.0  # seconds between looks at the cluster; without workers at the most
_RESUMES = "a rerun resumes"


class WorkersDied(Exception):
    """The processes that took a task died, one after the other."""


class Executor(Protocol):
    """Where tasks run."""

    patience: int
    """How often a task that loses its workers, alone among them, is tried before it is given up."""

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

    workers, patience = 1, 1

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

    def __init__(self, client: Any, patience: int) -> None:
        self._client, self.patience = client, patience
        self._looked = time.monotonic()
        self._alive = self._looked
        self.workers = max(1, len(client.nthreads()))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # Named by what it does: Dask balances tasks by how long those of their name take.
        name = getattr(function, "func", function).__name__  # of a partial: what it calls
        key = f"{name}-{uuid.uuid4().hex}"
        future = self._client.submit(_as_value, function, *arguments, key=key)
        # Fetched beside our own thread, which must neither wait for a worker that is cut off nor
        # ask for each report alone: the client asks for all at once that are done meanwhile.
        return asyncio.run_coroutine_threadsafe(self._fetch(future), self._client.loop.asyncio_loop)

    async def _fetch(self, future: Any) -> Any:
        return await self._client.gather(future, asynchronous=True)

    def result(self, future: Any) -> Any:
        try:
            result = future.result()
        except (CancelledError, OSError) as error:  # a task's own error is a value
            raise ClusterError("a task was lost", "--scheduler", _RESUMES) from error
        except Exception as error:
            if type(error).__name__ == "KilledWorker":
                raise WorkersDied from error
            raise
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


def next_done(done: queue.SimpleQueue[Any], executor: Executor) -> Any:
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


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name: whose address it is, is the network's say
        return False


def _check_keys(scheduler: str) -> None:
    """Raise UsageError if a ``tls://`` scheduler is named and Dask knows no keys to show it."""
    import distributed

    if not scheduler.startswith("tls:"):
        return
    shown = distributed.Security().get_connection_args("client")
    if shown["ssl_context"] is None:
        raise UsageError(
            "no certificate to show to a tls:// scheduler", scheduler,
            "set distributed.comm.tls.ca-file, client.cert and client.key in Dask's configuration",
        )  # fmt: skip


def _local_cluster(kind: str, number: int) -> Any:
    """Start a cluster of our own; None for one that somebody else has started."""
    import distributed

    options: dict[str, Any] = {
        "threads_per_worker": THREADS, "memory_limit": 0,
        # Dask's own counters, on loopback only and on whatever port is free.
        "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0",
    }  # fmt: skip
    if kind == "local":
        return distributed.LocalCluster(n_workers=1, processes=False, protocol="inproc", **options)
    if kind == "processes":
        return distributed.LocalCluster(
            n_workers=number, host="127.0.0.1", preload=["tilenet.engine.worker"],
            scheduler_kwargs={"allowed_failures": _DEATHS - 1}, **options,
        )  # fmt: skip
    return None


@contextmanager
def open_executor(scheduler: str, tasks: int, *, insecure: bool = False) -> Iterator[Executor]:
    """Open what runs the tasks.

    Parameters
    ----------
    scheduler : str
        "local", "processes:N", "tcp://host:port" or "tls://host:port".
    tasks : int
        How many there will be; few are not worth a cluster.
    insecure : bool
        Take a ``tcp://`` scheduler beyond this machine.

    Raises
    ------
    UsageError
        The scheduler is not known, or not safe.
    ClusterError
        It does not answer.
    """
    kind, number = _parse(scheduler)
    if scheduler.startswith("tcp:") and not insecure and not _is_loopback(scheduler):
        raise UsageError(
            "anybody who reaches a tcp:// scheduler can run code on it and on us", scheduler,
            "use tls://, or --insecure-cluster on a network you trust",
        )  # fmt: skip
    if kind == "local" and tasks <= FEW_BLOCKS:
        threads = _Threads()
        try:
            yield threads
        finally:
            threads.close()
        return
    import distributed

    quiet_dask()
    _check_keys(scheduler)
    try:
        cluster = _local_cluster(kind, number)
        client = distributed.Client(cluster or scheduler, timeout=15, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"no answer: {error}", scheduler, "is the scheduler running?") from error
    try:
        client.wait_for_workers(1, timeout=60)
        if kind == "address":
            client.run(prepare)
        yield _Dask(client, _PATIENCE if kind == "processes" else 1)
    except TimeoutError as error:
        raise ClusterError("no worker has come", scheduler, "start dask worker") from error
    finally:
        client.close()
        if cluster is not None:
            cluster.close()
