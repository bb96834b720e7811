"""The front door of training: labelled images in, a model folder out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilenet import durable
from tilenet.analysis.judge import judge_model
from tilenet.errors import UsageError, convert_errors
from tilenet.memory import keep_large_arrays
from tilenet.training import folder as run_folder
from tilenet.training.checkpoint import BEST, LAST, RunState, read_checkpoint
from tilenet.training.config import TrainConfig, dump_toml
from tilenet.training.datasets import TrainWindows, ValWindows, WindowReader
from tilenet.training.intake import take_in
from tilenet.training.loop import Progress, Trainer
from tilenet.training.machine import settle
from tilenet.training.network import margin_of
from tilenet.training.processes import Processes, joined
from tilenet.training.report import write_report
from tilenet.training.result import write_model
from tilenet.training.sampling import Places, validation_windows
from tilenet.training.tracking import Silent, Tracker, open_tracker
from tilenet.training.work import Work, prepare_work
from tilenet.training.workers import start_workers

__all__ = ["TrainResult", "train"]

_logger = logging.getLogger(__name__)
_MOST_VAL_WINDOWS = 256


@dataclass(frozen=True)
class TrainResult:
    """A finished model folder.

    Parameters
    ----------
    output : str
        The folder.
    metrics : dict
        The content of its `metrics.json`; empty in all but the first of several processes.
    """

    output: str
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {"output": self.output} | dict(self.metrics)


def _fit(work: Work, out: Path, processes: Processes, progress: Progress) -> RunState:
    """Train, or go on training, until the loop is done."""
    config, parts = work.config, work.found.parts
    if config.device == "cpu":
        keep_large_arrays()
    margin = margin_of(work.network)
    resuming = (out / LAST).is_file()
    done = len(read_checkpoint(out / LAST)[0].history) if resuming else 0
    tracker: Tracker = Silent()
    if processes.is_main:
        tracker = open_tracker(config.track, out, config.model_dump(mode="json"), done)
    try:
        trainer = Trainer(work, out, tracker, progress)
        total = trainer.schedule.total
        if resuming:
            trainer.load()
            _logger.info("resumed at step %d of %d", trainer.state.step, total)
        places = Places(
            parts.train, work.found.train, config.foreground,
            balance=config.balance, often=config.often,
        )  # fmt: skip
        windows = validation_windows(parts.val, work.found.val, config.tile, _MOST_VAL_WINDOWS)
        trainer.fit(
            TrainWindows(
                WindowReader(parts.train, work.card), places, config,
                total * config.batch_size, margin,
            ),
            ValWindows(WindowReader(parts.val, work.card), parts.val, windows, margin),
        )  # fmt: skip
    finally:
        tracker.close()
    return trainer.state


def _summary(state: RunState, images: int, scores: Mapping[str, Any]) -> str:
    share = state.wait_seconds / max(1e-9, state.seconds)
    dice, iou, accuracy = (
        "unknown" if scores[key] is None else f"{scores[key]:.4f}"
        for key in ("object_dice", "mean_iou", "accuracy")
    )
    return (
        f"{state.step} steps in {state.seconds:.0f} s, {100 * share:.1f} % of them waiting for "
        f"data; best epoch {state.best_epoch}; over {images} validation images: "
        f"Dice {dice}, mean IoU {iou}, accuracy {accuracy}"
    )


def _finish(work: Work, state: RunState, out: Path) -> TrainResult:
    """Write the model folder, run it through the engine, write figures and report."""
    config, found = work.config, work.found
    _, tensors = read_checkpoint(out / BEST)
    write_model(out, work.arguments, work.card, tensors["network"], half=config.half_weights)
    val = found.parts.val[: config.engine_images or None]
    scores, judged = judge_model(
        str(out),
        val,
        found.data,
        out / "validation",
        bands=config.bands,
        scaling=config.scaling,
        device=config.device,
    )
    figures = scores.as_dict()
    metrics = {
        "name": work.card.name,
        "summary": _summary(state, len(val), figures),
        "parameters": sum(p.numel() for p in work.network.parameters()),
        "epochs": len(state.history),
        "best_epoch": state.best_epoch,
        "steps": state.step,
        "train_seconds": round(state.seconds, 2),
        "data_wait_seconds": round(state.wait_seconds, 2),
        "data_wait_share": round(state.wait_seconds / max(1e-9, state.seconds), 4),
        "device": config.device,
        "precision": config.precision,
        "data": found.as_dict(),
        "validation": figures,
    }
    durable.write(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_report(
        out / "report.html", metrics, state.history, judged, found.data.classes, dump_toml(config)
    )
    _logger.info("%s", metrics["summary"])
    return TrainResult(str(out), metrics)


def train(
    config: TrainConfig,
    out: Path | str,
    *,
    given: frozenset[str] = frozenset(),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a network on labelled images and write a model folder that predict runs.

    A script that calls this keeps its own work under ``if __name__ == "__main__"``: the loader
    processes import it.

    Parameters
    ----------
    config : TrainConfig
        Data, network, recipe.
    out : Path or str
        The model folder.
    given : frozenset of str
        Which options were given and must therefore agree with the run that is resumed.
    resume, overwrite : bool
        Go on with the run in `out`; replace it.
    progress : callable, optional
        See `tilenet.training.loop.Progress`.

    Returns
    -------
    TrainResult

    Raises
    ------
    BrokenDataError
        With every broken pair.
    OutputError
        `out` holds something else, another process works on it, or the run that is resumed had
        other options or other data.
    TilenetError
        See `tilenet.errors`.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite replaces it", out, "give one")
    config, out = settle(config), Path(out)
    if config.workers:
        start_workers()
    notify = progress or (lambda _done, _all, _shown: None)
    with convert_errors(out), joined(config.device) as processes:
        processes.check_batch(config.batch_size)
        if not processes.is_main:
            return _train_along(config, out, processes, given, resume=resume)
        with run_folder.locked(out):
            known = run_folder.resumed_config(out, config, given) if resume else None
            if known is None:
                run_folder.check_free(out, overwrite=overwrite)
            return _train_first(config, known, out, processes, notify)


def _train_first(
    config: TrainConfig,
    known: TrainConfig | None,
    out: Path,
    processes: Processes,
    progress: Progress,
) -> TrainResult:
    """Train in the process that writes; `known` is the configuration of the run gone on with."""
    found = take_in(known or config, out / run_folder.CACHE)
    work = prepare_work(known or config, found, out.absolute().name)
    if known is None:
        run_folder.begin(out, work.config)
    processes.wait()
    return _finish(work, _fit(work, out, processes, progress), out)


def _train_along(
    config: TrainConfig, out: Path, processes: Processes, given: frozenset[str], *, resume: bool
) -> TrainResult:
    """Train in a process that writes nothing of the result."""
    known = run_folder.resumed_config(out, config, given) if resume else None
    found = take_in(known or config, out / run_folder.CACHE)
    work = prepare_work(known or config, found, out.absolute().name)
    processes.wait()
    _fit(work, out, processes, lambda _done, _all, _shown: None)
    return TrainResult(str(out))
