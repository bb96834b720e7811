"""The front door of evaluation: masks against truth, or a model against labelled images."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from tilenet.analysis.evaluate import Evaluation, evaluate_pairs, find_pairs
from tilenet.analysis.judge import judge_model
from tilenet.classes import ClassInfo
from tilenet.errors import ModelError, UsageError, convert_errors
from tilenet.models.store import find_model
from tilenet.training.check import check_data
from tilenet.training.config import TrainConfig
from tilenet.training.samples import DataSet

__all__ = ["evaluate", "evaluate_model"]

_logger = logging.getLogger(__name__)


def evaluate(pred: Path | str, truth: Path | str, palette: Path | str | None = None) -> Evaluation:
    """Compare a mask, or a folder of masks, with the truth.

    Parameters
    ----------
    pred : Path or str
        Zarr store or raster of class indices, 255 = no answer; or a folder of these.
    truth : Path or str
        Raster of the same size, and in the same place if both say where; or a folder with equal
        stems.
    palette : Path or str, optional
        A palette file for the truth, as for train.

    Raises
    ------
    InputError
        A file does not read, has no partner, or another size or place.
    UsageError
        The palette does not read.
    """
    with convert_errors(pred):
        pairs = find_pairs(Path(pred), Path(truth))
        return evaluate_pairs(pairs, None if palette is None else Path(palette))


def _as_classes(
    config: TrainConfig, classes: tuple[ClassInfo, ...], model: str, cache: Path
) -> DataSet:
    """Return the data with what it says of its classes read as the model's."""
    if config.palette is None:
        config = config.model_copy(update={"classes": tuple(c.name for c in classes)})
    try:
        data = check_data(config, cache)
    except UsageError as error:
        if error.where != "--classes":
            raise
        raise ModelError(
            f"the model's classes are not the data's: {error.what}", model,
            "map the data's values with --palette",
        ) from error  # fmt: skip
    for line in data.palette:
        _logger.info("palette: %s", line)
    return data


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
        As `check_data` and `predict` do.
    """
    files = find_model(model, None, {})
    with convert_errors(config.data), tempfile.TemporaryDirectory(prefix="tilenet-") as temp:
        work = Path(temp)
        classes = files.card.class_infos()
        data = _as_classes(config, classes, model, work / "cache")
        if len(classes) != len(data.classes):
            raise ModelError(
                f"the model has {len(classes)} classes, the data {len(data.classes)}",
                model,
                "map the data's values with --palette",
            )
        found, _ = judge_model(
            model,
            data.samples,
            data,
            work / "masks",
            bands=config.bands,
            scaling=config.scaling,
            **options,
        )
    return Evaluation(classes, found.matrix, found.images)
