"""The state of a run on disk: whole or not there, read back without running code."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from tilenet import durable
from tilenet.errors import OutputError

__all__ = ["BEST", "LAST", "RunState", "read_checkpoint", "sweep", "write_checkpoint"]

BEST, LAST = "checkpoints/best.pt", "checkpoints/last.pt"
"""Names of checkpoints in the folder of a run."""

_SCHEMA = 1


@dataclass(slots=True)
class RunState:
    """Where a run stands, besides its tensors.

    Parameters
    ----------
    data : str
        Fingerprint of the data set.
    step : int
        Optimiser steps done.
    best_dice, best_epoch : float, int
        Of validation; the epoch counts from 1, 0 is none.
    stale : int
        Epochs since the best.
    factor : float
        What the plateau schedule has made of the rate.
    loss_sum : float
        Of the epoch's steps so far.
    history : list of dict
        One row per epoch.
    seconds, wait_seconds : float
        Spent in training steps, and of it waiting for data.
    """

    data: str = ""
    step: int = 0
    best_dice: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    factor: float = 1.0
    loss_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    wait_seconds: float = 0.0


class _Patient:
    """A file that takes all, and keeps the first error for later.

    Torch's writer, once it has met one, ends the whole process when it is collected.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def write_checkpoint(path: Path, state: RunState, tensors: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader, or the next run, sees all of it or the one before.

    Parameters
    ----------
    path : Path
        Final name; its directory exists.
    state : RunState
        Numbers.
    tensors : dict
        State dicts of network, average, optimiser, scaler.
    """
    temp = durable.temporary(path)
    try:
        with temp.open("wb") as file:
            patient = _Patient(file)
            content = {"schema": _SCHEMA, "state": asdict(state)} | tensors
            torch.save(content, cast("BinaryIO", patient))
            if patient.error is not None:
                raise patient.error
            file.flush()
            os.fsync(file.fileno())
        durable.rename(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """Remove what a run that was killed while it wrote a checkpoint has left; no other may write.

    Parameters
    ----------
    out : Path
        The folder of the run.
    """
    for name in (BEST, LAST):
        for left in (out / name).parent.glob(f".{Path(name).name}.*.tmp"):
            left.unlink()


def read_checkpoint(path: Path) -> tuple[RunState, dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Raises
    ------
    OutputError
        It is damaged, or of another version.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        schema, state = found.pop("schema"), RunState(**found.pop("state"))
    except Exception as error:
        # torch.load raises whatever a damaged archive makes it meet.
        raise OutputError(
            f"the checkpoint does not read: {error}", path, "train again with --overwrite"
        ) from error
    if schema != _SCHEMA:
        raise OutputError("the checkpoint is of another version", path, "train with --overwrite")
    return state, found
