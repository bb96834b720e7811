"""How well masks agree: per class from one confusion matrix. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA, ClassInfo

__all__ = ["Scores", "confusion"]


def confusion(truth: NDArray[np.uint8], pred: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Return how often class i (row) was called j (column), (K, K + 1).

    Pixels whose truth is 255 do not count; those without an answer are in the last column.

    Parameters
    ----------
    truth, pred : ndarray of one shape, uint8
        Class indices; 255 = ignore, no answer.
    classes : int
        K.
    """
    labelled = truth != NODATA
    rows = truth[labelled].astype(np.int64)
    cols = np.minimum(pred[labelled], classes).astype(np.int64)
    flat = np.bincount(rows * (classes + 1) + cols, minlength=classes * (classes + 1))
    return flat.reshape(classes, classes + 1)


@dataclass(frozen=True)
class Scores:
    """Figures from a confusion matrix.

    Parameters
    ----------
    matrix : ndarray, shape (K, K + 1)
        From `confusion`, summed.
    """

    matrix: NDArray[np.int64]

    @property
    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        square = self.matrix[:, :-1]
        hits = np.diagonal(square).astype(float)
        return hits, square.sum(axis=0) - hits, self.matrix.sum(axis=1) - hits

    @staticmethod
    def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        # A class that neither mask has is no failure and no success: NaN, left out of means.
        out = np.full(len(above), np.nan)
        np.divide(above, below, out=out, where=below > 0)
        return out

    @property
    def dice(self) -> NDArray[np.float64]:
        """2·TP / (2·TP + FP + FN) per class; NaN for a class that occurs nowhere."""
        hits, false, missed = self._parts
        return self._ratio(2 * hits, 2 * hits + false + missed)

    @property
    def iou(self) -> NDArray[np.float64]:
        """TP / (TP + FP + FN) per class."""
        hits, false, missed = self._parts
        return self._ratio(hits, hits + false + missed)

    @property
    def precision(self) -> NDArray[np.float64]:
        """TP / (TP + FP) per class."""
        hits, false, _ = self._parts
        return self._ratio(hits, hits + false)

    @property
    def recall(self) -> NDArray[np.float64]:
        """TP / (TP + FN) per class."""
        hits, _, missed = self._parts
        return self._ratio(hits, hits + missed)

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels whose class is right."""
        total = int(self.matrix.sum())
        return float(np.diagonal(self.matrix).sum()) / total if total else float("nan")

    @staticmethod
    def mean(values: NDArray[np.float64]) -> float:
        """Return the mean over the classes that occur."""
        return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")

    @property
    def object_dice(self) -> float:
        """Dice of the second of two classes, else the mean over the classes.

        The background's Dice of 0.99 would hide the foreground's. Two empty masks agree fully; NaN
        where nothing is labelled.
        """
        if len(self.dice) != 2 or not self.matrix.any():
            return self.mean(self.dice)
        return 1.0 if np.isnan(self.dice[1]) else float(self.dice[1])

    def as_dict(self, classes: Sequence[ClassInfo]) -> dict[str, Any]:
        """Return the figures as the JSON of `tilenet evaluate`."""
        figures = {
            "dice": self.dice,
            "iou": self.iou,
            "precision": self.precision,
            "recall": self.recall,
        }
        return {
            "classes": [
                {"id": c.id, "name": c.name} | {key: _number(v[c.id]) for key, v in figures.items()}
                for c in classes
            ],
            "mean_dice": _number(self.mean(self.dice)),
            "mean_iou": _number(self.mean(self.iou)),
            "accuracy": _number(self.accuracy),
            "object_dice": _number(self.object_dice),
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
