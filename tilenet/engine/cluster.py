"""Where tasks run: a thread pool for a few, else a Dask cluster. The only importer of Dask.

Futures carry small reports only; all else lies in the run folder. More than a few blocks go through
an in-process cluster, and all other schedulers through the same code on others.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tilenet import __version__, durable
from tilenet.engine import counters
from tilenet.engine.admission import Versions, choose_here
from tilenet.engine.meter import Spans
from tilenet.engine.scheduler import (
    JobQueue,
    Scheduler,
    parse_scheduler,
    read_job_queue,
    read_scheduler_file,
)
from tilenet.engine.worker import settle
from tilenet.errors import (
    ClusterError,
    ModelError,
    TilenetError,
    UnfitError,
    UsageError,
    convert_errors,
)
from tilenet.models.session import Setup, has_cuda
from tilenet.models.store import ModelFiles
from tilenet.quiet import quiet_dask

__all__ = [
    "FEW_BLOCKS",
    "Executor",
    "WorkersDied",
    "check_device",
    "is_elsewhere",
    "next_done",
    "open_executor",
    "worker_count",
]

_logger = logging.getLogger(__name__)

THREADS = 3
"""Per worker process: one computes, one reads ahead, one joins and writes."""

FEW_BLOCKS = 256
"""So many need no cluster: importing distributed costs 1 s, its cluster 30 MB and 1 ms a task."""

# A process that dies takes all its tasks with it. One under which two have died is suspect, is
# tried alone when all else is done, and given up when it has taken so many more with it. Where
# workers come and go, Dask's own limit counts: a task is suspect after four deaths, not two.
_DEATHS, _PATIENCE = 2, 2
_HERE = ("local", "processes", "cuda", "slurm", "pbs")  # whose scheduler is on this machine
_LOOK, _GRACE = 5.0, 30.0  # seconds between looks at the cluster; without workers at the most
_WAIT, _FILE_WAIT = 60.0, 15.0  # for the first worker; for a scheduler's file
_RESUMES = "a rerun resumes"
_GPU = "GPU"  # the resource (Dask's word) of workers that run networks, if any has it
_GPU_SHARE = 0.5  # that a task takes: while one computes, the next reads


class WorkersDied(Exception):
    """The processes that took a task died, one after the other."""


class Executor(Protocol):
    """Where tasks run."""

    patience: int
    """How often a task that loses its workers, alone among them, is tried before it is given up."""

    @property
    def elsewhere(self) -> bool:
        """Whether workers may be on other machines."""

    @property
    def versions(self) -> Versions:
        """What workers must be of; {} if all run one installation."""

    @property
    def places(self) -> Mapping[str, str]:
        """The workers that run networks, as far as is known, and the host of each."""

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        """Start a task; returns a future with `add_done_callback`.

        Parameters
        ----------
        function : callable
            The task.
        arguments : object
            What it takes.
        network : bool
            Whether it runs the network, for which not all workers may be made.
        near : tuple of str
            Workers that had best do it.
        """

    def result(self, future: Any) -> Any:
        """Return what a finished task gave, or raise what it could not do."""

    def check(self) -> None:
        """Raise ClusterError if the workers have been gone for some time."""

    def handed_out(self) -> None:
        """Note that a run has started its last forward."""

    def choose(self, files: ModelFiles, wanted: dict[str, Any]) -> Setup:
        """Let a worker choose what a network runs on."""

    @property
    def workers(self) -> int:
        """How many processes run networks, as far as is known."""


class _Threads:
    """Tasks in this process, without Dask."""

    workers, patience, elsewhere = 1, 1, False

    def __init__(self) -> None:
        self.versions: Versions = {}
        self.places: Mapping[str, str] = {"": ""}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tilenet")

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        del network, near
        return self._pool.submit(function, *arguments)

    def result(self, future: Any) -> Any:
        return future.result()

    def check(self) -> None:
        pass

    def handed_out(self) -> None:
        pass

    def choose(self, files: ModelFiles, wanted: dict[str, Any]) -> Setup:
        return choose_here(files, wanted)[0]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Dask:
    """Tasks on a Dask cluster.

    Parameters
    ----------
    client : distributed.Client
        Connected to it.
    patience : int
        See `Executor`.
    elsewhere : bool
        See `Executor`.
    grace : float
        Seconds without workers until it counts as lost.
    """

    def __init__(self, client: Any, patience: int, *, elsewhere: bool, grace: float) -> None:
        self._client, self.patience, self.elsewhere = client, patience, elsewhere
        self._grace = grace
        self._looked = self._alive = time.monotonic()
        self._known: set[str] = set()
        self._marked = False  # whether networks run on workers with the resource GPU only
        self.versions: Versions = {}
        self.places: Mapping[str, str] = {}
        self.workers = 1
        self._follow()

    def _follow(self) -> bool:
        """Note which workers there are; returns whether there is one for networks."""
        known = set(self._client.nthreads())
        if known != self._known:
            every = self._client.scheduler_info(n_workers=-1)["workers"]
            gpus = {a for a, one in every.items() if (one.get("resources") or {}).get(_GPU)}
            self._marked = self._marked or bool(gpus)
            able = gpus if self._marked else set(every)
            self.places = {address: every[address]["host"] for address in sorted(able)}
            self._known = known
            self.workers = max(1, len(self.places))
        return bool(self.places)

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        options: dict[str, Any] = {}
        if network and self._marked:
            # Without `near`: where those workers are gone, Dask would forget the resource too.
            options = {"resources": {_GPU: _GPU_SHARE}}
        elif near and len(self._known) > 1:
            options = {"workers": list(near), "allow_other_workers": True}
        # Named by what it does: Dask balances tasks by how long those of their name take.
        name = getattr(function, "func", function).__name__  # of a partial: what it calls
        key = f"{name}-{uuid.uuid4().hex}"
        future = self._client.submit(_as_value, function, *arguments, key=key, **options)
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
            if self.elsewhere:
                _check_versions(self._client)
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
            alive = self._client.status == "running" and self._follow()
        except (OSError, TimeoutError):  # the connection is being lost
            alive = False
        if alive:
            self._alive = now
        elif now - self._alive > self._grace:
            raise ClusterError("the workers or the scheduler are gone", "--scheduler", _RESUMES)

    def handed_out(self) -> None:
        pass

    def choose(self, files: ModelFiles, wanted: dict[str, Any]) -> Setup:
        setup: Setup
        setup, self.versions = self.result(self.submit(choose_here, files, wanted))
        return setup


def _as_value(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task on a worker; its error travels as a value.

    Dask cannot pickle an error whose cause is GDAL's, and logs every one that is raised.
    """
    import distributed

    own = distributed.get_worker()
    if not own.address.startswith("inproc:"):
        settle(own.state.nthreads)
    try:
        with convert_errors("a worker"):
            result = function(*arguments)
    except TilenetError as error:
        if isinstance(error, UnfitError):
            name = f"the worker {own.address} on {socket.gethostname()}"
            return UnfitError(f"{name} {error.what}", error.where, error.do)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    for part in result if isinstance(result, tuple) else ():
        if isinstance(part, Spans):
            part.worker = own.address
            counters.count(part)
    return result


def _introduce() -> str:
    return __version__


def _check_versions(client: Any) -> None:
    """Raise UnfitError if a worker cannot load this tilenet."""
    for address, found in sorted(client.run(_introduce, on_error="return").items()):
        if isinstance(found, (OSError, TimeoutError)) or found == __version__:
            continue  # of the two errors: it is going, or gone
        if isinstance(found, Exception):
            what = f"cannot load tilenet {__version__}: {found}"
        else:
            what = f"has tilenet {found}, the run {__version__}"
        raise UnfitError(f"the worker {address} {what}", "", "install the same on all")


def next_done(done: queue.SimpleQueue[Any], executor: Executor) -> Any:
    """Wait for a future; raises if whoever should finish it is gone."""
    while True:
        executor.check()
        try:
            return done.get(timeout=_LOOK)
        except queue.Empty:
            continue


def is_elsewhere(scheduler: str) -> bool:
    """Return whether a scheduler's workers may be on other machines.

    Raises
    ------
    UsageError
        The scheduler is not known.
    """
    return parse_scheduler(scheduler).elsewhere


def worker_count(scheduler: str) -> int:
    """Return how many processes of this machine a scheduler starts (1 if it is elsewhere).

    Raises
    ------
    UsageError
        The scheduler is not known, or what it needs is not installed.
    ModelError
        It needs a GPU, and there is none.
    """
    found = parse_scheduler(scheduler)
    return _gpus() if found.kind == "cuda" else found.number


def check_device(scheduler: str, device: str) -> None:
    """Raise UsageError if a device is asked for that is not every worker's own."""
    found = parse_scheduler(scheduler)
    if (found.elsewhere or found.kind == "cuda") and ":" in device:
        raise UsageError("workers use their own device", "--device", "write --device cuda")
    if found.kind == "cuda" and device not in ("auto", "cuda"):
        raise UsageError(f"cuda workers do not use {device}", "--device", "leave it out")


def _extra(package: str, extra: str) -> UsageError:
    return UsageError(
        f"{package} is not installed", "--scheduler", f"pip install 'tilenet[{extra}]'"
    )


def _gpus() -> int:
    """Return how many GPUs a worker each could have."""
    if not has_cuda():
        raise ModelError("no CUDA device on this machine", "--scheduler", "use --scheduler local")
    try:
        from dask_cuda.utils import get_n_gpus
    except ImportError as error:
        raise _extra("dask-cuda", "cuda") from error
    return int(get_n_gpus())


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name: whose address it is, is the network's say
        return False


def _check_safe(address: str, *, insecure: bool) -> None:
    """Raise UsageError for a scheduler to which anybody can send code, or we cannot speak."""
    import distributed

    if address.startswith("tcp:") and not insecure and not _is_loopback(address):
        raise UsageError(
            "anybody who reaches a tcp:// scheduler can run code on it and on us", address,
            "use tls://, or --insecure-cluster on a network you trust",
        )  # fmt: skip
    if address.startswith("tls:"):
        security = distributed.Security()  # from Dask's configuration and environment
        if security.get_connection_args("client").get("ssl_context") is None:
            raise UsageError(
                "there are no certificates for tls://", address,
                "name them in Dask's configuration: distributed.comm.tls, ca-file and client",
            )  # fmt: skip


def _local_cluster(found: Scheduler) -> Any:
    """Start a cluster of our own on this machine."""
    import distributed

    options: dict[str, Any] = {
        "threads_per_worker": THREADS, "memory_limit": 0,
        # Dask's own counters, on loopback only and on whatever port is free.
        "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0",
    }  # fmt: skip
    if found.kind == "local":
        return distributed.LocalCluster(n_workers=1, processes=False, protocol="inproc", **options)
    options |= {
        "host": "127.0.0.1", "preload": ["tilenet.engine.worker"],
        "scheduler_kwargs": {"allowed_failures": _DEATHS - 1},
    }  # fmt: skip
    if found.kind == "processes":
        return distributed.LocalCluster(n_workers=found.number, **options)
    from dask_cuda import LocalCUDACluster

    # Its memory limit is for arrays that Dask holds; ours are ours.
    return LocalCUDACluster(n_workers=_gpus(), protocol="tcp", device_memory_limit=0, **options)


def _job_cluster(found: Scheduler, *, insecure: bool) -> tuple[Any, JobQueue]:
    """Start a scheduler here whose workers are a batch system's jobs."""
    path = Path(found.place)
    job_queue = read_job_queue(path)
    try:
        import dask_jobqueue
    except ImportError as error:
        raise _extra("dask-jobqueue", "hpc") from error
    import distributed

    kind: Any = {"slurm": dask_jobqueue.SLURMCluster, "pbs": dask_jobqueue.PBSCluster}[found.kind]
    command = kind.job_cls.submit_command.partition(" ")[0]
    if shutil.which(command) is None:
        raise UsageError(f"{command} is not there", "--scheduler", f"submit where {found.kind} is")
    keywords: dict[str, Any] = {"shared_temp_directory": str(path.absolute().parent)}
    keywords |= job_queue.cluster
    options = {"dashboard_address": "127.0.0.1:0"} | keywords.get("scheduler_options", {})
    keywords["scheduler_options"] = options
    if not insecure:
        own = distributed.Security()
        ready = own.get_connection_args("scheduler").get("ssl_context") is not None
        keywords |= {"protocol": "tls://", "security": own if ready else True}
    try:
        cluster = kind(**keywords)
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(
            f"{kind.__name__}: {str(error).partition('job_kwargs=')[0]}", path, "correct [cluster]"
        ) from error
    if job_queue.jobs is not None:
        cluster.scale(jobs=job_queue.jobs)
    elif job_queue.adaptive is not None:
        fewest, most = job_queue.adaptive
        cluster.adapt(minimum_jobs=fewest, maximum_jobs=most)
    return cluster, job_queue


def _kubernetes_cluster(found: Scheduler) -> Any:
    """Connect to a cluster that Dask's operator runs."""
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise _extra("dask-kubernetes", "k8s") from error
    namespace, _, name = found.place.rpartition("/")
    try:
        return KubeCluster.from_name(name, namespace=namespace or None, quiet=True)
    except Exception as error:
        # Its own, the Kubernetes client's, httpx's and the system's errors alike.
        raise ClusterError(
            f"no such cluster: {error}", f"k8s:{found.place}", "check the name and your kubeconfig"
        ) from error


@contextmanager
def open_executor(
    scheduler: str, tasks: int, *, insecure: bool = False, report: Path | None = None
) -> Iterator[Executor]:
    """Open what runs the tasks.

    Parameters
    ----------
    scheduler : str
        See `tilenet.engine.scheduler.parse_scheduler`.
    tasks : int
        How many there will be; few are not worth a cluster.
    insecure : bool
        Take a ``tcp://`` scheduler beyond this machine.
    report : Path, optional
        Where Dask's performance report goes.

    Raises
    ------
    UsageError
        The scheduler is not known, or not safe, or what it needs is not installed.
    ClusterError
        It does not answer.
    """
    found = parse_scheduler(scheduler)
    if report is not None and not report.parent.is_dir():
        raise UsageError("no such folder", "--dask-report", "choose another place")
    if found.kind == "local" and tasks <= FEW_BLOCKS and report is None:
        threads = _Threads()
        try:
            yield threads
        finally:
            threads.close()
        return
    import distributed

    quiet_dask()
    with ExitStack() as stack:
        try:
            target, wait, grace = _target(found, insecure=insecure)
            if not isinstance(target, str):
                stack.callback(target.close)
            client = distributed.Client(target, timeout=15, set_as_default=report is not None)
            stack.callback(client.close)
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"no answer: {error}", scheduler, "is the scheduler running?"
            ) from error
        try:
            client.wait_for_workers(1, timeout=wait)
        except TimeoutError as error:
            raise ClusterError("no worker has come", scheduler, "start dask worker") from error
        if found.elsewhere:
            _check_versions(client)
        _say_counters(client, here=found.kind in _HERE)
        if report is not None:
            stack.enter_context(_reporting(client, report))
        patience = _PATIENCE if found.kind in ("processes", "cuda") else 1
        yield _Dask(client, patience, elsewhere=found.elsewhere, grace=grace)


def _target(found: Scheduler, *, insecure: bool) -> tuple[Any, float, float]:
    """Start or find a cluster.

    Returns
    -------
    target : object
        It, or its address.
    wait, grace : float
        Seconds to wait for its first worker, and to be without any later.
    """
    if found.kind in ("slurm", "pbs"):
        cluster, job_queue = _job_cluster(found, insecure=insecure)
        return cluster, job_queue.wait, job_queue.wait
    target: Any = found.place
    if found.kind == "file":
        target = read_scheduler_file(Path(found.place), _FILE_WAIT)
    elif found.kind == "k8s":
        target = _kubernetes_cluster(found)
    elif not found.elsewhere:
        target = _local_cluster(found)
    if found.elsewhere:
        address = target if isinstance(target, str) else target.scheduler_address
        _check_safe(address, insecure=insecure)
    return target, _WAIT, _GRACE


def _say_counters(client: Any, *, here: bool) -> None:
    """Say where Dask's scheduler shows its counters; each worker does so at its own port."""
    info = client.scheduler_info(n_workers=1)
    port = info["services"].get("dashboard")
    host = "127.0.0.1" if here else urlsplit(info["address"]).hostname
    if port:
        _logger.info("counters: http://%s:%d/metrics", host, port)


@contextmanager
def _reporting(client: Any, path: Path) -> Iterator[None]:
    """Write Dask's performance report when the run is through."""
    import distributed

    try:
        client.run_on_scheduler(version, "bokeh")
    except ImportError as error:
        raise UsageError(
            "the scheduler has no bokeh", "--dask-report", "pip install 'tilenet[monitor]' there"
        ) from error
    temp = durable.temporary(path)
    report = distributed.performance_report(str(temp))
    report.__enter__()
    yield  # of a run that fails there is none
    try:
        report.__exit__(None, None, None)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
