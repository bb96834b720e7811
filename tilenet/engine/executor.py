"""What runs tasks: an interface. `tilenet.engine.cluster` opens one."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tilenet.engine.admission import Versions
from tilenet.models.session import LANES
from tilenet.models.sizes import Sizes, Wanted
from tilenet.models.store import ModelFiles

__all__ = [
    "FEW_BLOCKS",
    "LOOK",
    "Executor",
    "WorkersDied",
    "forwards_on",
    "next_done",
    "threads_on",
]

FEW_BLOCKS = 256
"""So many need no cluster: importing distributed costs 1 s, its cluster 30 MB and 1 ms a task."""

LOOK = 5.0
"""Seconds between looks at whether anybody is left to finish a task."""


def forwards_on(device_class: str) -> int:
    """Return how many forwards a worker process has in flight: while one computes, the next reads.

    On a GPU as many as there are lanes compute, and two read.
    """
    return 2 if device_class == "cpu" else LANES + 2


def threads_on(device_class: str) -> int:
    """Return a worker process's threads: one for each forward, and one that joins and writes."""
    return forwards_on(device_class) + 1


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
        """The workers that run networks, as far as is known, and the host of each.

        One without a name, if all are on this machine.
        """

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

    def check_wanted(self) -> None:
        """Raise if nobody waits for this run any more; it needs no workers just now."""

    def handed_out(self) -> None:
        """Note that a run has started its last forward."""

    def be_alone(self) -> None:
        """Return when no other run has tasks here, nor will have before this one has ended."""

    def beside(self, worker: str) -> tuple[str, ...]:
        """Return the workers on the host of one, for networks or not; () if that is not known."""

    def choose(self, files: ModelFiles, wanted: Wanted) -> Sizes:
        """Let a worker choose what a network runs on."""

    @property
    def workers(self) -> int:
        """How many processes run networks, as far as is known."""

    @property
    def forwards(self) -> int:
        """How many forwards each of them has in flight (see `forwards_on`)."""


def next_done(done: queue.SimpleQueue[Any], executor: Executor) -> Any:
    """Wait for a future; raises if whoever should finish it is gone."""
    while True:
        executor.check()
        try:
            return done.get(timeout=LOOK)
        except queue.Empty:
            continue
