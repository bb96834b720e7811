"""How fast a run learns at each step, and how long its average of the weights remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilenet.training.config import TrainConfig

__all__ = ["PLATEAU_EPOCHS", "Schedule"]

PLATEAU_EPOCHS = 5
"""Epochs without a better validation after which the plateau schedule lowers the rate."""

_FACTOR, _LOWEST = 0.5, 1e-3
_COSINE_END = 0.01
_LONGEST_MEMORY = 500.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate over the steps of a run.

    Parameters
    ----------
    config : TrainConfig
        Highest rate, warm-up, kind of schedule; `steps` is settled.
    """

    config: TrainConfig

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.config.steps

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.steps * self.config.epochs

    def rate(self, step: int, factor: float) -> float:
        """Return the learning rate of a step: warm-up, then the schedule.

        Parameters
        ----------
        step : int
            From 0.
        factor : float
            What plateaus have made of the rate (see `lowered`).
        """
        config = self.config
        warm = round(config.warmup * self.total)
        if step < warm:
            return config.lr * (step + 1) / warm
        if config.schedule == "cosine":
            share = (step - warm) / max(1, self.total - warm)
            return config.lr * max(_COSINE_END, 0.5 * (1 + math.cos(math.pi * share)))
        return config.lr * factor

    def lowered(self, factor: float, stale: int) -> float:
        """Return the factor after `stale` epochs without a better validation."""
        if self.config.schedule == "plateau" and stale and stale % PLATEAU_EPOCHS == 0:
            return max(_LOWEST, factor * _FACTOR)
        return factor

    @property
    def memory(self) -> float:
        """How much of the averaged weights a step keeps; short runs need a shorter memory."""
        return 1 - 1 / max(1.0, min(_LONGEST_MEMORY, self.total * self.config.ema))
