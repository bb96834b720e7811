"""Dask clusters: which are meant, how they are started or found, and whether they are safe."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tilenet.engine.scheduler import (
    JobQueue,
    Scheduler,
    parse_scheduler,
    read_job_queue,
    read_scheduler_file,
)
from tilenet.errors import ClusterError, ModelError, UsageError
from tilenet.models.devices import has_cuda

__all__ = ["HERE", "check_device", "is_elsewhere", "start", "worker_count"]

_DEATHS = 2
"""A process that dies takes all its tasks with it: one under which so many have died is suspect.

Where workers come and go, Dask's own limit counts: four deaths."""

HERE = ("local", "processes", "cuda", "slurm", "pbs")
"""Whose scheduler is on this machine."""

_GRACE = 30.0  # seconds without workers at the most
_WAIT, _FILE_WAIT = 60.0, 15.0  # for the first worker; for a scheduler's file
_NEVER = "1000d"
_JOBS_TOO = {"config_name", "interface", "protocol", "security"}  # keywords of cluster and job
_ROLES = ("client", "scheduler", "worker")


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


def is_elsewhere(scheduler: str) -> bool:
    """Return whether a scheduler's workers may be on other machines.

    Raises
    ------
    UsageError
        The scheduler is not known.
    """
    return parse_scheduler(scheduler).elsewhere


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


def _local_cluster(found: Scheduler, threads: int) -> Any:
    """Start a cluster of our own on this machine."""
    import distributed

    options: dict[str, Any] = {
        "threads_per_worker": threads, "memory_limit": 0,
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


@contextmanager
def _keys(folder: Path) -> Iterator[Any]:
    """Make keys for one run, in files that its jobs can read; yields Dask's security."""
    import distributed

    try:
        made = distributed.Security.temporary()
    except ImportError as error:
        raise _extra("cryptography", "hpc") from error
    with tempfile.TemporaryDirectory(prefix=".tilenet-keys-", dir=folder) as place:
        paths = {}
        for name, text in made.get_tls_config_for_role("worker").items():
            if isinstance(text, str) and "\n" in text:
                paths[name] = str(Path(place) / name)
                Path(place, name).write_text(text)
        roles = {f"tls_{role}_{part}": paths[part] for role in _ROLES for part in ("key", "cert")}
        yield distributed.Security(require_encryption=True, tls_ca_file=paths["ca_file"], **roles)


def _job_cluster(found: Scheduler, stack: ExitStack, *, insecure: bool) -> tuple[Any, JobQueue]:
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
    keywords = dict(job_queue.cluster)
    options = {"dashboard_address": "127.0.0.1:0"} | keywords.get("scheduler_options", {})
    keywords["scheduler_options"] = options
    folder = keywords.pop("shared_temp_directory", path.absolute().parent)
    if not insecure:
        security = distributed.Security()
        if security.get_connection_args("scheduler").get("ssl_context") is None:
            security = stack.enter_context(_keys(Path(folder).expanduser()))
        keywords |= {"protocol": "tls://", "security": security}
    try:
        # First a job alone: of a cluster that cannot be made, the remains complain.
        own = inspect.signature(dask_jobqueue.JobQueueCluster).parameters.keys() - _JOBS_TOO
        kind.job_cls("", name="", **{key: keywords[key] for key in keywords.keys() - own})
        cluster = kind(**keywords)
    except (TypeError, ValueError) as error:
        what = str(error).rpartition("__init__() ")[2]
        raise UsageError(f"{kind.__name__}: {what}", path, "correct [cluster]") from error
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


def start(
    found: Scheduler, stack: ExitStack, *, threads: int, insecure: bool
) -> tuple[Any, float, float]:
    """Start or find a cluster; each process that is started here has so many threads.

    Returns
    -------
    target : object
        It, or its address.
    wait, grace : float
        Seconds to wait for its first worker, and to be without any later.
    """
    if found.kind in ("slurm", "pbs"):
        cluster, job_queue = _job_cluster(found, stack, insecure=insecure)
        return cluster, job_queue.wait, job_queue.wait
    target: Any = found.place
    if found.kind == "file":
        target = read_scheduler_file(Path(found.place), _FILE_WAIT)
    elif found.kind == "k8s":
        target = _kubernetes_cluster(found)
    elif not found.elsewhere:
        import dask
        import distributed  # noqa: F401 - its defaults would else go where `set` ends

        # Dask looks some time after a worker died, and ends it for good if it is not there just
        # then, be it that it died once more and is being started again.
        stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": _NEVER}))
        target = _local_cluster(found, threads)
    if found.elsewhere:
        address = target if isinstance(target, str) else target.scheduler_address
        _check_safe(address, insecure=insecure)
    return target, _WAIT, _GRACE
