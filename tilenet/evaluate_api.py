"""The front door of evaluation: masks against truth, or a model against labelled images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tilenet.analysis.evaluate import Evaluation, evaluate_pairs, find_pairs
from tilenet.analysis.judge import judge_model
from tilenet.errors import ModelError, convert_errors
from tilenet.models.store import find_model
from tilenet.training.check import check_data
from tilenet.training.config import TrainConfig

__all__ = ["evaluate", "evaluate_model"]


def evaluate(pred: Path, truth: Path) -> Evaluation:
    """Compare a mask, or a folder of masks, with the truth.

    Parameters
    ----------
    pred : Path
        Zarr store or raster of class indices, 255 = no answer; or a folder of these.
    truth : Path
        Raster of the same size, and in the same place if both say where; or a folder with equal
        stems.

    Raises
    ------
    InputError
        A file does not read, has no partner, or another size or place.
    """
    with convert_errors(pred):
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
        As `check_data` and `predict` do.
    """
    files = find_model(model, None, {})
    with convert_errors(config.data), tempfile.TemporaryDirectory(prefix="tilenet-") as temp:
        work = Path(temp)
        data = check_data(config, work / "cache")
        classes = files.card.class_infos()
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
