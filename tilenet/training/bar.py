"""Progress of training on stderr: a bar on a terminal; in a log the epochs' lines are enough."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

__all__ = ["TrainingBar"]


class TrainingBar:
    """Shows epoch, steps, the time that is left, loss and validation Dice."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def __call__(self, done: int, total: int, shown: dict[str, float]) -> None:
        """Show `done` of `total` steps and some figures."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(total=total, unit="step", file=sys.stderr, initial=done - 1)
        figures = {key: f"{value:.4f}" for key, value in shown.items() if key != "epoch"}
        self._bar.set_description(f"epoch {shown['epoch']:.0f}", refresh=False)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
