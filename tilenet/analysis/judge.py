"""Run a model over labelled images with the predict engine, and compare with their truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilenet import api
from tilenet.analysis.evaluate import Evaluation
from tilenet.config import PredictConfig
from tilenet.errors import InputError
from tilenet.training.images import ImageRef
from tilenet.training.samples import DataSet, Sample
from tilenet.training.truth import Judged, compare_samples

__all__ = ["judge_model"]


def judge_model(
    model: str, samples: Sequence[Sample], data: DataSet, folder: Path, **options: Any
) -> tuple[Evaluation, list[Judged]]:
    """Segment whole images, tiled and blended, and compare.

    Parameters
    ----------
    model : str
        As for predict.
    samples : sequence of Sample
        Of the data set, at least one.
    data : DataSet
        Its classes.
    folder : Path
        For the masks.
    **options
        Further options of predict.

    Raises
    ------
    TilenetError
        As predict does.
    """
    # Masks must have the labels' pixels, whatever resolution the model was trained at.
    settings = PredictConfig(model=model, format="cog", overwrite=True, level=0, **options)

    def predict(manifest: Path, staged: dict[Path, ImageRef], target: Path) -> dict[Path, Path]:
        result = api.predict([], target, settings.model_copy(update={"manifest": str(manifest)}))
        for failure in result.failed:
            path = staged[Path(failure.input)].path
            raise InputError(failure.error.replace(failure.input, path), path)
        return {Path(run.input): Path(run.output) for run in result.runs}

    folder.mkdir(parents=True, exist_ok=True)
    judged = compare_samples(samples, data.classes, predict, folder)
    images = tuple((one.sample.name, one.matrix) for one in judged)
    total = sum((matrix for _, matrix in images[1:]), images[0][1])
    return Evaluation(data.classes, total, images), judged
