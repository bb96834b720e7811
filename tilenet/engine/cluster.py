"""What runs tasks, opened: threads for a few, else a Dask cluster.

More than a few blocks go through an in-process cluster, and all other schedulers through the same
code on others. This, `tilenet.engine.dasktasks` and `tilenet.engine.launch` are the only importers
of Dask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tilenet import durable
from tilenet.engine.dasktasks import DaskTasks, check_versions, introduce
from tilenet.engine.executor import FEW_BLOCKS, Executor, threads_on
from tilenet.engine.launch import HERE, start
from tilenet.engine.scheduler import parse_scheduler
from tilenet.engine.threads import Threads
from tilenet.errors import ClusterError, UsageError
from tilenet.quiet import quiet_dask

__all__ = ["open_executor"]

_logger = logging.getLogger(__name__)

# A suspect task is tried alone when all else is done, and given up when it has taken so many more
# workers with it.
_PATIENCE = 2


@contextmanager
def open_executor(
    scheduler: str,
    tasks: int,
    *,
    device_class: str = "cpu",
    insecure: bool = False,
    report: Path | None = None,
) -> Iterator[Executor]:
    """Open what runs the tasks.

    Parameters
    ----------
    scheduler : str
        See `tilenet.engine.scheduler.parse_scheduler`.
    tasks : int
        How many there will be; few are not worth a cluster.
    device_class : str
        What the network runs on, where it is known.
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
        with closing(Threads(device_class)) as threads:
            yield threads
        return
    with ExitStack() as stack:
        try:
            target, wait, grace = start(
                found, stack, threads=threads_on(device_class), insecure=insecure
            )
            client = _connect(target, stack, report)
            quiet_dask()  # Dask sets levels of its own as it is imported
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"no answer: {error}", scheduler, "is the scheduler running?"
            ) from error
        try:
            _wait_for_workers(client, wait, elsewhere=found.elsewhere)
        except TimeoutError as error:
            raise ClusterError("no worker has come", scheduler, "start dask worker") from error
        if found.elsewhere:
            check_versions(client)
        _say_counters(client, here=found.kind in HERE)
        if report is not None:
            stack.enter_context(_reporting(client, report))
        patience = _PATIENCE if found.kind in ("processes", "cuda") else 1
        yield DaskTasks(
            client, patience, elsewhere=found.elsewhere, grace=grace, device_class=device_class
        )


def _connect(target: Any, stack: ExitStack, report: Path | None) -> Any:
    """Return a client of a cluster, or of an address; both are closed with the stack."""
    import distributed

    if not isinstance(target, str):
        stack.callback(target.close)
    client = distributed.Client(target, timeout=15, set_as_default=report is not None)
    stack.callback(client.close)
    return client


def _wait_for_workers(client: Any, seconds: float, *, elsewhere: bool) -> None:
    # An adaptive cluster without work has no workers.
    work = client.submit(introduce, pure=False) if elsewhere else None
    client.wait_for_workers(1, timeout=seconds)
    del work


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
