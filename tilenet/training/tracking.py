"""Where the course of a run is written: metrics.csv always, TensorBoard or MLflow if asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tilenet import durable
from tilenet.errors import UsageError
from tilenet.training.config import Track

__all__ = ["Silent", "Tracker", "open_tracker", "write_history"]


class Tracker(Protocol):
    """Takes one row of figures per epoch."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Write an epoch's figures."""

    def close(self) -> None:
        """Finish."""


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.csv whole, so that a resumed run leaves no row twice."""
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    durable.write(path, text.getvalue().encode())


class Silent:
    """Leaves it to metrics.csv."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Nothing is open."""


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "TensorBoard is not installed", "--track", "pip install tensorboard"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write every number as a scalar."""
        for key, value in row.items():
            if isinstance(value, int | float) and key != "epoch":
                self._writer.add_scalar(key, value, row["epoch"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class _MlFlow:
    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise UsageError("MLflow is not installed", "--track", "pip install mlflow") from error
        self._mlflow = mlflow
        if not mlflow.get_tracking_uri().startswith(("http", "databricks")):
            mlflow.set_tracking_uri(folder.absolute().as_uri())
        mlflow.start_run(run_name=folder.parent.name)
        mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})

    def log(self, row: Mapping[str, Any]) -> None:
        """Write every number as a metric."""
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        self._mlflow.log_metrics(numbers, step=int(row["epoch"]))

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def open_tracker(track: Track, out: Path, parameters: Mapping[str, Any], done: int) -> Tracker:
    """Open a tracker.

    Parameters
    ----------
    track : Track
        Which.
    out : Path
        The run's folder.
    parameters : mapping
        The configuration.
    done : int
        Epochs that are done already.

    Raises
    ------
    UsageError
        It is not installed.
    """
    if track is Track.TENSORBOARD:
        return _TensorBoard(out / "tensorboard", done)
    if track is Track.MLFLOW:
        return _MlFlow(out / "mlruns", parameters)
    return Silent()
