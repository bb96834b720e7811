"""What `--scheduler` names: parsed and checked, without Dask."""

from __future__ import annotations

import json
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tilenet.errors import ClusterError, UsageError
from tilenet.strangers import exists, is_file

__all__ = [
    "JobQueue",
    "Kind",
    "Scheduler",
    "parse_scheduler",
    "read_job_queue",
    "read_scheduler_file",
]

Kind = Literal["local", "processes", "cuda", "address", "file", "slurm", "pbs", "k8s"]

_CHOICES = (
    "choose local, processes:N, cuda, tcp://…, tls://…, file:PATH, slurm:FILE, pbs:FILE or k8s:NAME"
)
_PLACES: dict[str, Kind] = {"file": "file", "slurm": "slurm", "pbs": "pbs", "k8s": "k8s"}
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Who runs the tasks.

    Parameters
    ----------
    kind : str
        Of which kind.
    number : int
        Processes that this machine starts; 1 if they are elsewhere.
    place : str
        An address, a file, or a cluster's name.
    """

    kind: Kind
    number: int = 1
    place: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether workers may be on other machines, with other devices and other paths."""
        return self.kind not in ("local", "processes", "cuda")


class JobQueue(BaseModel):
    """What a file of `slurm:` or `pbs:` says.

    Parameters
    ----------
    jobs : int or None
        How many jobs.
    adaptive : tuple of int or None
        The fewest and the most jobs, as there is work.
    wait : float
        Seconds without any worker until the run gives up.
    cluster : dict
        Keywords of dask-jobqueue's cluster.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs: Annotated[int, Field(ge=1)] | None = None
    adaptive: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    wait: Annotated[float, Field(gt=0)] = 3600.0
    cluster: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> JobQueue:
        if (self.jobs is None) == (self.adaptive is None):
            raise ValueError("jobs: give either jobs or adaptive")
        if self.adaptive is not None and self.adaptive[0] > self.adaptive[1]:
            raise ValueError("adaptive: the fewest jobs come first")
        return self


def parse_scheduler(text: str) -> Scheduler:
    """Return what `--scheduler` means.

    Raises
    ------
    UsageError
        It is of no known kind.
    """
    kind, colon, place = text.partition(":")
    if text in ("local", "cuda"):
        return Scheduler("local" if text == "local" else "cuda")
    if kind == "processes":
        if not place.isascii() or not place.isdigit() or int(place) < 1:
            raise UsageError(f"no scheduler {text}", "--scheduler", "write processes:N")
        return Scheduler("processes", int(place))
    if kind in ("tcp", "tls") and len(place) > 2 and place.startswith("//"):
        return Scheduler("address", place=text)
    if kind in _PLACES and colon and place and place.isprintable():
        return Scheduler(_PLACES[kind], place=place)
    raise UsageError(f"no scheduler {text}", "--scheduler", _CHOICES)


def read_job_queue(path: Path) -> JobQueue:
    """Read the file of `slurm:` or `pbs:`.

    Raises
    ------
    UsageError
        It is not there, or says something else.
    """
    try:
        found = tomllib.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"does not read: {error}", path, "see Clusters in the README") from error
    try:
        return JobQueue.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{key}: {message}" if key else message, path, "see Clusters in the README"
        ) from error


def read_scheduler_file(path: Path, seconds: float) -> str:
    """Return the address in Dask's scheduler file, waiting for it as for a scheduler that starts.

    Raises
    ------
    ClusterError
        It does not come.
    UsageError
        It is something else.
    """
    end = time.monotonic() + seconds
    while not exists(path):
        if time.monotonic() > end:
            raise ClusterError("no scheduler file", path, "is the scheduler running?")
        time.sleep(0.1)
    try:
        found = json.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"does not read: {error}", path, "give what dask scheduler --scheduler-file wrote"
        ) from error
    address = found.get("address") if isinstance(found, dict) else None
    if not isinstance(address, str) or not address.startswith(("tcp://", "tls://")):
        raise UsageError(
            "no scheduler's file", path, "give what dask scheduler --scheduler-file wrote"
        )
    return address


def _text(path: Path) -> str:
    if not is_file(path) or path.stat().st_size > _MAX_BYTES:
        raise ValueError("no such file, or too large")
    return path.read_text()
