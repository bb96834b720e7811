"""What runs a few tasks: threads of this process, behind the interface of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tilenet.engine.admission import Versions, choose_here
from tilenet.engine.executor import forwards_on, threads_on
from tilenet.models.sizes import Sizes, Wanted
from tilenet.models.store import ModelFiles

__all__ = ["Threads"]


class Threads:
    """Tasks in this process, without Dask (see `tilenet.engine.executor.Executor`).

    Parameters
    ----------
    device_class : str
        What the network runs on.
    """

    workers, patience, elsewhere = 1, 1, False

    def __init__(self, device_class: str) -> None:
        self.versions: Versions = {}
        self.places: Mapping[str, str] = {"": ""}
        self.forwards = forwards_on(device_class)
        self._pool = ThreadPoolExecutor(threads_on(device_class), thread_name_prefix="tilenet")

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        network: bool = True,
        near: tuple[str, ...] = (),
    ) -> Any:
        """Start a task; there is one place for all of them."""
        del network, near
        return self._pool.submit(function, *arguments)

    def result(self, future: Any) -> Any:
        """Return what a finished task gave."""
        return future.result()

    def check(self) -> None:
        """Do nothing: threads do not go away."""

    def check_wanted(self) -> None:
        """Do nothing: the run is."""

    def handed_out(self) -> None:
        """Do nothing: what is next needs no room to be made."""

    def be_alone(self) -> None:
        """Do nothing: no thread dies of a task, so none is tried alone."""

    def beside(self, worker: str) -> tuple[str, ...]:
        """Return nobody: there is one place."""
        del worker
        return ()

    def choose(self, files: ModelFiles, wanted: Wanted) -> Sizes:
        """Choose what a network runs on here."""
        return choose_here(files, wanted)[0]

    def close(self) -> None:
        """Wait for what is running, and start no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
