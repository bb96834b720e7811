"""The front door of training: `train` makes a model folder, `evaluate` judges masks and models."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilenet import api, durable
from tilenet.analysis.evaluate import Evaluation, evaluate_pairs, find_pairs
from tilenet.config import PredictConfig
from tilenet.errors import InputError, ModelError, UsageError, convert_errors
from tilenet.models.card import ModelCard
from tilenet.models.session import cores, cpu_flags
from tilenet.models.store import find_model
from tilenet.training import folder as run_folder
from tilenet.training.checkpoint import RunState, read_checkpoint
from tilenet.training.config import TrainConfig, dump_toml
from tilenet.training.datasets import TrainWindows, ValWindows, WindowReader
from tilenet.training.loop import Progress, Trainer, TrainingPlan
from tilenet.training.losses import auto_class_weights
from tilenet.training.network import (
    context_of,
    divisor_of,
    margin_of,
    network_config,
    new_network,
)
from tilenet.training.report import write_report
from tilenet.training.result import draft_card, write_model
from tilenet.training.samples import DataSet, Problem, Sample
from tilenet.training.sampling import Places, validation_windows
from tilenet.training.survey import BrokenDataError, PartSurvey, check_data, survey_part
from tilenet.training.tracking import open_tracker
from tilenet.training.truth import Judged, compare_samples

__all__ = ["TrainResult", "evaluate", "evaluate_model", "train"]

_logger = logging.getLogger(__name__)
_FEWEST_STEPS, _MOST_STEPS = 20, 1000
_MOST_VAL_WINDOWS = 256


@dataclass(frozen=True)
class TrainResult:
    """A finished model folder.

    Parameters
    ----------
    output : str
        The folder.
    metrics : dict
        The content of its `metrics.json`.
    """

    output: str
    metrics: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {"output": self.output} | self.metrics


@dataclass(frozen=True)
class _Prepared:
    """A checked data set and what its pixels are."""

    data: DataSet
    train: PartSurvey
    val: PartSurvey


def _resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration with device, precision, workers and weights' file settled."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("no CUDA device on this machine", "--device", "use --device cpu")
    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"no device {device}", "--device", "choose auto, cpu or cuda")
    precision = config.precision
    if precision == "auto" and device == "cpu":
        precision = "bf16" if cpu_flags() & {"amx_bf16", "bf16"} else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    weights = config.encoder_weights
    if Path(weights).is_file():
        weights = str(Path(weights).absolute())
    elif Path(weights).suffix in (".pt", ".pth", ".safetensors") or "/" in weights:
        raise ModelError("no such file", f"--encoder-weights {weights}", "check the path")
    settled = {
        "device": device,
        "precision": precision,
        "workers": config.workers if config.workers >= 0 else min(8, cores() // 2),
        "encoder_weights": weights,
    }
    return config.model_copy(update=settled)


def _prepare(config: TrainConfig, out: Path) -> _Prepared:
    """Check and survey the data; say what was found.

    Raises
    ------
    BrokenDataError
        Broken pairs, or nothing to learn.
    """
    data = check_data(config, out / "cache")
    count = len(data.classes)
    train = survey_part(data.train, count, config.data)
    if not train.class_pixels[1:].any():
        what = "no foreground at all in the training part"
        raise BrokenDataError([Problem(what, str(config.data))], config.data)
    val = survey_part(data.val, count, config.data)
    _logger.info("data: %s", data.layout)
    for line in data.palette:
        _logger.info("palette: %s", line)
    _logger.info("split %s", data.split)
    for name, part in (("train", train), ("validation", val)):
        total = max(1, int(part.class_pixels.sum()))
        shares = ", ".join(
            f"{c.name} {100 * n / total:.2f} %"
            for c, n in zip(data.classes, part.class_pixels, strict=True)
        )
        _logger.info(
            "%s: %d images, %.1f Mpx, %.1f %% without label; %s",
            name, part.images, part.pixels / 1e6, 100 * part.ignored / max(1, part.pixels), shares,
        )  # fmt: skip
    _logger.info(
        "training part: mean %s, std %s of %s", train.mean.round(3).tolist(),
        train.std.round(3).tolist(), data.dtype,
    )  # fmt: skip
    return _Prepared(data, train, val)


def _steps(config: TrainConfig, pixels: int) -> int:
    """Return the steps of an epoch: as many windows as cover the training part."""
    windows = pixels / config.tile**2
    return min(_MOST_STEPS, max(_FEWEST_STEPS, round(windows / config.batch_size)))


def _class_weights(config: TrainConfig, survey: PartSurvey) -> list[float] | None:
    count = len(survey.class_pixels)
    if config.class_weights == "auto":
        return auto_class_weights(survey.class_pixels.tolist())
    if config.class_weights == "none":
        return None
    if len(config.class_weights) != count:
        raise UsageError(
            f"{len(config.class_weights)} weights for {count} classes",
            "--class-weights",
            "give all",
        )
    return list(config.class_weights)


@dataclass(frozen=True)
class _Work:
    """A network ready to be trained on prepared data."""

    config: TrainConfig
    prepared: _Prepared
    network: torch.nn.Module
    arguments: dict[str, Any]
    card: ModelCard

    @property
    def data(self) -> DataSet:
        return self.prepared.data


def _build(config: TrainConfig, prepared: _Prepared, name: str) -> _Work:
    data = prepared.data
    classes = len(data.classes)
    activation = config.activation
    if activation == "auto":
        activation = "sigmoid" if classes == 2 else "softmax"
    if activation == "sigmoid" and classes != 2:
        raise UsageError(
            f"sigmoid needs two classes, these are {classes}", "--activation", "use softmax"
        )
    channels = 1 if activation == "sigmoid" else classes
    arguments = network_config(config, data.bands, channels)
    network = new_network(config, arguments)
    divisor, margin = divisor_of(network), margin_of(network)
    if config.tile % divisor:
        raise UsageError(
            f"a tile of {config.tile} is no multiple of {divisor}", "--tile",
            f"try {-(-config.tile // divisor) * divisor}",
        )  # fmt: skip
    shape: dict[str, Any] = {"divisor": divisor, "context": context_of(network)}
    if any(margin):
        shape["margin"] = list(margin)
    card = draft_card(config, data, prepared.train, activation, shape, name)
    return _Work(config, prepared, network, arguments, card)


def _fit(work: _Work, out: Path, progress: Progress) -> Trainer:
    """Train, or go on training, until the loop is done."""
    config, data = work.config, work.data
    margin = margin_of(work.network)
    plan = TrainingPlan(
        config,
        int(work.arguments["classes"]),
        len(data.classes),
        config.steps,
        _class_weights(config, work.prepared.train),
        out,
    )
    last = out / "checkpoints" / "last.pt"
    done = read_checkpoint(last)[0] if last.is_file() else RunState()
    parameters = config.model_dump(mode="json")
    tracker = open_tracker(config.track, out, parameters, len(done.history))
    trainer = Trainer(plan, work.network, tracker, progress)
    if last.is_file():
        trainer.load(last)
        _logger.info("resumed at step %d of %d", trainer.state.step, plan.total)
    places = Places(data.train, work.prepared.train, config.foreground, balance=config.balance)
    train = TrainWindows(
        WindowReader(data.train, work.card), places, config, plan.total * config.batch_size, margin
    )
    windows = validation_windows(data.val, config.tile, _MOST_VAL_WINDOWS)
    val = ValWindows(WindowReader(data.val, work.card), data.val, windows, margin)
    try:
        trainer.fit(train, val)
    finally:
        tracker.close()
    return trainer


def _judge(
    samples: tuple[Sample, ...] | list[Sample],
    data: DataSet,
    model: str,
    folder: Path,
    **options: Any,
) -> tuple[Evaluation, list[Judged]]:
    """Run a model through the predict engine over whole images and compare with their truth."""
    settings = PredictConfig(model=model, format="cog", overwrite=True, **options)

    def predict(images: list[Path], target: Path) -> None:
        result = api.predict(images, target, settings) if len(images) > 1 else api.predict(
            images, target / f"{images[0].stem}.tif", settings
        )  # fmt: skip
        if result.failed:
            raise InputError(result.failed[0].error, result.failed[0].input)

    folder.mkdir(parents=True, exist_ok=True)
    judged = compare_samples(samples, data.classes, predict, folder)
    images = tuple((one.sample.name, one.matrix) for one in judged)
    total = sum((matrix for _, matrix in images[1:]), images[0][1])
    return Evaluation(data.classes, total, images), judged


def _figures(part: PartSurvey) -> dict[str, Any]:
    return {
        "images": part.images,
        "pixels": part.pixels,
        "class_pixels": part.class_pixels.tolist(),
        "ignored": part.ignored,
    }


def _summary(work: _Work, trainer: Trainer, scores: dict[str, Any]) -> str:
    state = trainer.state
    share = state.wait_seconds / max(1e-9, state.seconds)
    return (
        f"{state.step} steps in {state.seconds:.0f} s, {100 * share:.1f} % of them waiting "
        f"for data; "
        f"best epoch {state.best_epoch}; over {len(work.data.val)} validation images: "
        f"Dice {scores['object_dice']:.4f}, mean IoU {scores['mean_iou']:.4f}, "
        f"accuracy {scores['accuracy']:.4f}"
    )


def _finish(work: _Work, trainer: Trainer, out: Path) -> TrainResult:
    """Write the model folder, run it through the engine, write figures and report."""
    config, data, state = work.config, work.data, trainer.state
    _, tensors = read_checkpoint(out / "checkpoints" / "best.pt")
    write_model(out, work.arguments, work.card, tensors["network"])
    most = config.engine_images or len(data.val)
    scores, judged = _judge(
        data.val[:most], data, str(out), out / "validation",
        bands=config.bands, device=config.device,
    )  # fmt: skip
    figures = scores.as_dict()
    summary = _summary(work, trainer, figures)
    parameters = sum(p.numel() for p in work.network.parameters())
    metrics = {
        "name": out.name,
        "summary": summary,
        "parameters": parameters,
        "epochs": len(state.history),
        "best_epoch": state.best_epoch,
        "steps": state.step,
        "train_seconds": round(state.seconds, 2),
        "data_wait_seconds": round(state.wait_seconds, 2),
        "data_wait_share": round(state.wait_seconds / max(1e-9, state.seconds), 4),
        "device": config.device,
        "precision": config.precision,
        "data": {
            "layout": data.layout,
            "split": data.split,
            "palette": list(data.palette),
            "mean": work.prepared.train.mean.tolist(),
            "std": work.prepared.train.std.tolist(),
            "train": _figures(work.prepared.train),
            "val": _figures(work.prepared.val),
            "held_out": [sample.name for sample in data.val],
        },
        "validation": figures,
    }
    durable.write(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_report(
        out / "report.html", metrics, state.history, judged, data.classes, dump_toml(config)
    )
    _logger.info("%s", summary)
    return TrainResult(str(out), metrics)


def train(
    config: TrainConfig,
    out: Path,
    *,
    given: frozenset[str] = frozenset(),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a network on labelled images and write a model folder that predict runs.

    Parameters
    ----------
    config : TrainConfig
        Data, network, recipe.
    out : Path
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
    TilenetError
        See `tilenet.errors`.
    """
    config = _resolve(config)
    notify = progress or (lambda _done, _all, _shown: None)
    with convert_errors(out), run_folder.locked(out):
        known = run_folder.resumed_config(out, config, given) if resume else None
        if known is None:
            run_folder.check_free(out, overwrite=overwrite)
        config = known or config
        try:
            prepared = _prepare(config, out)
            if not config.steps:
                steps = _steps(config, prepared.train.pixels)
                config = config.model_copy(update={"steps": steps})
            work = _build(config, prepared, out.absolute().name)
            if known is None:
                run_folder.begin(out, config)
            start = time.perf_counter()
            trainer = _fit(work, out, notify)
            _logger.info("trained for %.0f s", time.perf_counter() - start)
            return _finish(work, trainer, out)
        finally:
            run_folder.tidy(out)


def evaluate(pred: Path, truth: Path) -> Evaluation:
    """Compare a mask, or a folder of masks, with the truth.

    Parameters
    ----------
    pred : Path
        Zarr store or raster of class indices, 255 = no answer; or a folder of these.
    truth : Path
        Raster of the same size; or a folder with equal stems.

    Raises
    ------
    InputError
        A file does not read, has no partner, or another size.
    """
    return evaluate_pairs(find_pairs(pred, truth))


def evaluate_model(model: str, config: TrainConfig, **options: Any) -> Evaluation:
    """Run a model over every labelled image of a data set and compare.

    Parameters
    ----------
    model : str
        As for predict.
    config : TrainConfig
        Names the data set; only its data options count.
    **options
        Further options of predict.

    Raises
    ------
    ModelError
        The model's classes are not the data set's.
    TilenetError
        As `train` and `predict` do.
    """
    files = find_model(model, None, {})
    with tempfile.TemporaryDirectory(prefix="tilenet-") as temp:
        work = Path(temp)
        data = check_data(config, work / "cache")
        classes = files.card.class_infos()
        if len(classes) != len(data.classes):
            raise ModelError(
                f"the model has {len(classes)} classes, the data {len(data.classes)}",
                model,
                "map the data's values with --palette",
            )
        samples = sorted((*data.train, *data.val), key=lambda sample: sample.name)
        scores, _ = _judge(samples, data, model, work / "masks", bands=config.bands, **options)
    return Evaluation(classes, scores.matrix, scores.images)
