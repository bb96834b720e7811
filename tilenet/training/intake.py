"""A data set taken in: checked, split, surveyed, and what was found said in words."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tilenet.training.check import check_data
from tilenet.training.config import TrainConfig
from tilenet.training.samples import BrokenDataError, DataSet, Parts, Problem
from tilenet.training.split import split_samples
from tilenet.training.survey import PartSurvey, survey_part

__all__ = ["Intake", "take_in"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intake:
    """A data set and what its pixels are.

    Parameters
    ----------
    data : DataSet
        Checked.
    parts : Parts
        Its two parts.
    train, val : PartSurvey
        Their pixels.
    """

    data: DataSet
    parts: Parts
    train: PartSurvey
    val: PartSurvey

    @property
    def fingerprint(self) -> str:
        """Hash of what was found: another one means that a resumed run would not be the same."""
        document = [
            [[s.name, *astuple(s.extent)] for s in (*self.parts.train, *self.parts.val)],
            [[part.class_pixels.tolist(), part.mean.tolist(), part.std.tolist()]
             for part in (self.train, self.val)],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return what was found for `metrics.json`."""
        return {
            "layout": self.data.layout,
            "split": self.parts.words,
            "palette": list(self.data.palette),
            "mean": self.train.mean.tolist(),
            "std": self.train.std.tolist(),
            "train": _figures(self.train),
            "val": _figures(self.val),
            "held_out": [sample.name for sample in self.parts.val],
        }


def _figures(part: PartSurvey) -> dict[str, Any]:
    return {
        "images": part.images,
        "pixels": part.pixels,
        "class_pixels": part.class_pixels.tolist(),
        "ignored": part.ignored,
    }


def take_in(config: TrainConfig, cache: Path) -> Intake:
    """Check, split and survey a data set.

    Parameters
    ----------
    config : TrainConfig
        What and how.
    cache : Path
        Folder for what is made again at will.

    Raises
    ------
    BrokenDataError
        Broken pairs, or nothing to learn from or to validate on.
    InputError
        No layout is recognised, or a part would be empty.
    """
    data = check_data(config, cache)
    parts = split_samples(data.samples, config)
    count = len(data.classes)
    train = survey_part(parts.train, count)
    val = survey_part(parts.val, count)
    lacking = []
    if not train.class_pixels[1:].any():
        lacking.append("no foreground at all in the training part")
    if not val.class_pixels.any():
        lacking.append("no labelled pixel in the validation part")
    if lacking:
        raise BrokenDataError([Problem(what, str(config.data)) for what in lacking])
    found = Intake(data, parts, train, val)
    _say(found)
    return found


def _say(found: Intake) -> None:
    """Log layout, palette, split, counts, class histogram, mean and deviation."""
    data = found.data
    _logger.info("data: %s", data.layout)
    for line in data.palette:
        _logger.info("palette: %s", line)
    _logger.info("split %s", found.parts.words)
    for name, part in (("train", found.train), ("validation", found.val)):
        total = max(1, int(part.class_pixels.sum()))
        shares = ", ".join(
            f"{c.name} {100 * n / total:.2f} %"
            for c, n in zip(data.classes, part.class_pixels, strict=True)
        )
        _logger.info(
            "%s: %d images, %.1f Mpx, %.1f %% without label; %s",
            name, part.images, part.pixels / 1e6, 100 * part.ignored / max(1, part.pixels), shares,
        )  # fmt: skip
    absent = [
        c.name for c, n in zip(data.classes, found.train.class_pixels, strict=True) if n == 0
    ]  # fmt: skip
    if absent:
        _logger.warning("no pixel to learn %s from", ", ".join(absent))
    _logger.info(
        "training part: mean %s, std %s of %s",
        found.train.mean.round(3).tolist(), found.train.std.round(3).tolist(), data.dtype,
    )  # fmt: skip
