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
                "TensorBoard is not installed", "--track", "pip install tilenet[train]"
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
    """A run in the tracking server that MLflow is set to, or in a database in the run's folder."""

    def __init__(self, out: Path, parameters: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise UsageError(
                "MLflow is not installed", "--track", "pip install tilenet[track]"
            ) from error
        folder = out.absolute()
        chosen = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        self._client = mlflow.MlflowClient(chosen or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name("tilenet")
        number = experiment.experiment_id if experiment else self._client.create_experiment(
            "tilenet", None if chosen else (folder / "mlruns").as_uri()
        )  # fmt: skip
        self._run: str = self._client.create_run(number, run_name=folder.name).info.run_id
        for key, value in parameters.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, row: Mapping[str, Any]) -> None:
        """Write every number as a metric."""
        for key, value in row.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._run, key, float(value), step=int(row["epoch"]))

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


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
        return _MlFlow(out, parameters)
    return Silent()
