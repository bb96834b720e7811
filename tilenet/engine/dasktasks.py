"""Tasks on a Dask cluster. Futures carry small reports only; all else lies in the run folder."""

from __future__ import annotations

import asyncio
import queue
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

from tilenet import __version__
from tilenet.engine import counters
from tilenet.engine.admission import Versions, choose_here, versions_here
from tilenet.engine.executor import LOOK, WorkersDied, forwards_on, next_done
from tilenet.engine.meter import Spans, host_of
from tilenet.engine.worker import end_soon, settle
from tilenet.errors import (
    ClusterError,
    DeviceError,
    ResourceError,
    TilenetError,
    UnfitError,
    convert_errors,
)
from tilenet.models.sizes import Sizes, Wanted
from tilenet.models.store import ModelFiles

__all__ = ["DaskTasks", "check_versions", "introduce"]

_SETTLE, _SOON = 60.0, 0.2  # seconds for workers to be there again; between looks
_RESUMES = "a rerun resumes"
_GPU = "GPU"  # the resource (Dask's word) of workers that run networks, if any has it


class DaskTasks:
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
    device_class : str
        What the network runs on; workers elsewhere `choose` it later.
    """

    def __init__(
        self, client: Any, patience: int, *, elsewhere: bool, grace: float, device_class: str
    ) -> None:
        self._client, self.patience, self.elsewhere = client, patience, elsewhere
        self.forwards = forwards_on(device_class)
        self._grace = grace
        self._looked = self._alive = time.monotonic()
        self._known: set[str] = set()
        self._near: dict[str, tuple[frozenset[str], asyncio.Event]] = {}
        self._marked = False  # whether networks run on workers with the resource GPU only
        self.versions: Versions = {}
        self.places: Mapping[str, str] = {}
        self._beside: dict[str, tuple[str, ...]] = {}
        self.workers, self._able = 1, False
        self._follow()

    def _follow(self) -> bool:
        """Note which workers there are; returns whether there is one for networks."""
        known = set(self._client.nthreads())
        if known != self._known:
            every = self._client.scheduler_info(n_workers=-1)["workers"]
            gpus = {a for a, one in every.items() if (one.get("resources") or {}).get(_GPU)}
            self._marked = self._marked or bool(gpus)
            able = gpus if self._marked else set(every)
            self.workers = max(1, len(able))
            self._able = bool(able)
            if not self.elsewhere:  # one machine, and Dask spreads what it is given
                able = {""} if able else set()
            self.places = {address: host_of(address) for address in sorted(able)}
            beside: dict[str, list[str]] = {}
            for address in every:
                beside.setdefault(host_of(address), []).append(address)
            self._beside = {host: tuple(found) for host, found in beside.items()}
            self._known = known
        return self._able

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        """Hand in a task; see `Executor`."""
        options: dict[str, Any] = {}
        if network and self._marked:
            # Without `near`: where those workers are gone, Dask would forget the resource too.
            options = {"resources": {_GPU: 1 / self.forwards}}
        elif near and self.elsewhere and len(self._known) > 1:
            # On one machine it gains nothing.
            options = {"workers": list(near), "allow_other_workers": True}
        # Named by what it does: Dask balances tasks by how long those of their name take.
        name = getattr(function, "func", function).__name__

        def submit(**options: Any) -> Any:
            key = f"{name}-{uuid.uuid4().hex}"
            return self._client.submit(_as_value, function, *arguments, key=key, **options)

        future, forgotten = submit(**options), None
        if "workers" in options:
            forgotten = asyncio.Event()
            self._near[future.key] = frozenset(near), forgotten
        # Fetched beside our own thread, which must neither wait for a worker that is cut off nor
        # ask for each report alone: the client asks for all at once that are done meanwhile.
        fetching = (
            self._fetch(future) if forgotten is None else self._renew(future, forgotten, submit)
        )
        return asyncio.run_coroutine_threadsafe(fetching, self._client.loop.asyncio_loop)

    async def _fetch(self, future: Any) -> Any:
        return await self._client.gather(future, asynchronous=True)

    async def _renew(self, future: Any, forgotten: asyncio.Event, submit: Callable[[], Any]) -> Any:
        """Fetch what a task gives; hand it in again, for anybody, if Dask forgets it.

        It does so with tasks that had best be done by workers that are gone, if they wait while
        nobody else is there: they are not given to those that come.
        """
        result = asyncio.ensure_future(self._fetch(future))
        notice = asyncio.ensure_future(forgotten.wait())
        try:
            await asyncio.wait({result, notice}, return_when=asyncio.FIRST_COMPLETED)
            return await (result if result.done() else self._fetch(submit()))
        finally:
            self._near.pop(future.key, None)
            result.cancel()
            notice.cancel()

    def _find_forgotten(self) -> None:
        """Look for tasks that wait for workers that are gone."""
        left = {k: one for k, (near, one) in list(self._near.items()) if not near & self._known}
        if left:
            status = self._client.sync(self._client.scheduler.get_task_status, keys=list(left))
            for key, forgotten in left.items():
                if status.get(key) == "no-worker":
                    self._client.loop.asyncio_loop.call_soon_threadsafe(forgotten.set)

    def result(self, future: Any) -> Any:
        """Return what a task gave; see `Executor`."""
        try:
            result = future.result()
        except (CancelledError, OSError) as error:  # a task's own error is a value
            raise ClusterError("a task was lost", "--scheduler", _RESUMES) from error
        except Exception as error:
            if type(error).__name__ == "KilledWorker":
                raise WorkersDied from error
            if self.elsewhere:
                check_versions(self._client)
            raise
        if isinstance(result, TilenetError):
            raise result
        return result

    def check(self) -> None:
        """Raise ClusterError if the cluster is lost."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        if now - self._looked > 2 * LOOK:  # nobody looked: workers may have gone for want of work
            self._alive = now
        self._looked = now
        try:
            alive = self._client.status == "running" and self._follow()
            if alive:
                self._find_forgotten()
        except (OSError, TimeoutError):  # the connection is being lost
            alive = False
        if alive:
            self._alive = now
        elif now - self._alive > self._grace:
            raise ClusterError("the workers or the scheduler are gone", "--scheduler", _RESUMES)

    def check_wanted(self) -> None:
        """Do nothing: nobody but the run itself could stop waiting for it."""

    def handed_out(self) -> None:
        """Do nothing: no other run waits for it."""

    def be_alone(self) -> None:
        """Wait until our own workers are there again, for what comes now may well kill them.

        One that dies while its nanny (Dask's word for who starts it) still looks on is not always
        started again.
        """
        cluster, until = self._client.cluster, time.monotonic() + _SETTLE
        nannies = list(getattr(cluster, "workers", {}).values())
        while time.monotonic() < until and not all(map(_is_settled, nannies)):
            self.check()
            time.sleep(_SOON)

    def beside(self, worker: str) -> tuple[str, ...]:
        """Return the workers on the same host; see `Executor`."""
        return self._beside.get(host_of(worker), ()) if worker and self.elsewhere else ()

    def choose(self, files: ModelFiles, wanted: Wanted) -> Sizes:
        """Let a worker choose what the network runs on; see `Executor`."""
        sizes: Sizes
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.submit(choose_here, files, wanted).add_done_callback(done.put)
        try:
            sizes, version = self.result(next_done(done, self))
        except WorkersDied as error:
            raise ResourceError(
                "workers died where they tried the network", files.weights,
                "give --tile, or workers more memory",
            ) from error  # fmt: skip
        self.versions = versions_here() | version
        self.forwards = forwards_on(sizes.setup.device_class)
        return sizes


def _is_settled(worker: Any) -> bool:
    """Return whether a nanny's worker runs; what has no process of its own always does."""
    if not hasattr(worker, "process"):
        return True
    return worker.process is not None and worker.process.status.name == "running"


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
        if isinstance(error, DeviceError) and not own.address.startswith("inproc:"):
            end_soon(error)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    for part in result if isinstance(result, tuple) else ():
        if isinstance(part, Spans):
            part.worker = own.address
            counters.count(part)
    return result


def introduce() -> str:
    """Return the version of tilenet that a worker has."""
    return __version__


def check_versions(client: Any) -> None:
    """Raise UnfitError if a worker cannot load this tilenet."""
    for address, found in sorted(client.run(introduce, on_error="return").items()):
        if isinstance(found, (OSError, TimeoutError)) or found == __version__:
            continue  # of the two errors: it is going, or gone
        if isinstance(found, Exception):
            what = f"cannot load tilenet {__version__}: {found}"
        else:
            what = f"has tilenet {found}, the run {__version__}"
        raise UnfitError(f"the worker {address} {what}", "", "install the same on all")
