"""Where training windows are cut: by class pixels per cell, each a function of seed and index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import UsageError
from tilenet.geometry import Window
from tilenet.training.samples import Sample
from tilenet.training.survey import PartSurvey

__all__ = ["Places", "often_factors", "validation_windows"]


@dataclass(frozen=True)
class _Table:
    """Cells that hold pixels of a kind, and their cumulative share."""

    sample: NDArray[np.int32]
    row: NDArray[np.int32]
    col: NDArray[np.int32]
    share: NDArray[np.float64]


def _table(
    counts: Sequence[NDArray[np.signedinteger[Any]]], factors: NDArray[np.float64]
) -> _Table | None:
    parts = [(np.full(n.size, k), *np.unravel_index(range(n.size), n.shape), n.ravel())
             for k, n in enumerate(counts)]  # fmt: skip
    sample, row, col, pixels = (np.concatenate(column) for column in zip(*parts, strict=True))
    some = pixels > 0
    if not some.any():
        return None
    share = np.cumsum(pixels[some] * factors[sample[some]])
    return _Table(
        sample[some].astype(np.int32), row[some].astype(np.int32), col[some].astype(np.int32),
        share / share[-1],
    )  # fmt: skip


def often_factors(names: Sequence[str], often: Mapping[str, float]) -> NDArray[np.float64]:
    """Return how many times as often as by its pixels each named sample is drawn.

    Raises
    ------
    UsageError
        A pattern matches no sample.
    """
    unknown = [p for p in often if not any(fnmatchcase(name, p) for name in names)]
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} matches no image of the training part", "often", "mend the pattern"
        )
    first = [next((p for p in often if fnmatchcase(name, p)), "") for name in names]
    return np.array([often.get(pattern, 1.0) for pattern in first])


class Places:
    """Draws the centres of training windows.

    A window is centred near a pixel that is not class 0 with probability `foreground` (near one of
    every class equally often with `balance`), else near any labelled pixel.

    Parameters
    ----------
    samples : sequence of Sample
        The training part.
    survey : PartSurvey
        Its class pixels per cell.
    foreground : float
        Share of windows at the foreground.
    balance : bool
        Whether all classes are drawn equally often.
    often : mapping of str to float
        Patterns of names; how many times as often as by its pixels a sample is drawn.

    Raises
    ------
    UsageError
        A pattern matches no sample.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        survey: PartSurvey,
        foreground: float,
        *,
        balance: bool = False,
        often: Mapping[str, float] | None = None,
    ) -> None:
        self._extents = [s.extent for s in samples]
        self._sides = survey.cell_sides
        self._foreground = foreground
        factors = often_factors([s.name for s in samples], often or {})
        anywhere = _table([cells.sum(axis=2) for cells in survey.cells], factors)
        assert anywhere is not None, "the survey finds labelled pixels"
        self._anywhere = anywhere
        classes = survey.cells[0].shape[2]
        kinds: list[list[NDArray[np.signedinteger[Any]]]]
        if balance:
            kinds = [[cells[:, :, k] for cells in survey.cells] for k in range(classes)]
        else:
            kinds = [[cells[:, :, 1:].sum(axis=2) for cells in survey.cells]]
        several = [_table(counts, factors) for counts in kinds]
        self._wanted = [table for table in several if table is not None]

    def draw(self, side: int, rng: np.random.Generator) -> tuple[int, Window]:
        """Return a sample's number and a window of `side` pixels near a drawn cell.

        The window lies inside the sample's extent where that is large enough.
        """
        table = self._anywhere
        if self._wanted and rng.random() < self._foreground:
            table = self._wanted[int(rng.integers(len(self._wanted)))]
        cell = int(np.searchsorted(table.share, rng.random(), side="right"))
        cell = min(cell, len(table.share) - 1)
        number = int(table.sample[cell])
        extent, step = self._extents[number], self._sides[number]

        def start(first: int, size: int, index: int) -> int:
            centre = (index + rng.random()) * step + (rng.random() - 0.5) * side / 2
            if size <= side:
                return first - (side - size) // 2
            return first + int(np.clip(round(centre - side / 2), 0, size - side))

        row = start(extent.row, extent.height, int(table.row[cell]))
        col = start(extent.col, extent.width, int(table.col[cell]))
        return number, Window(row, col, side, side)


def _is_labelled(cells: NDArray[np.bool_], side: int, row: int, col: int, tile: int) -> bool:
    rows = slice(row // side, -(-(row + tile) // side))
    return bool(cells[rows, col // side : -(-(col + tile) // side)].any())


def validation_windows(
    samples: Sequence[Sample], survey: PartSurvey, tile: int, most: int
) -> list[tuple[int, Window]]:
    """Return windows that cover what is labelled side by side; every n-th if there are too many.

    Parameters
    ----------
    samples : sequence of Sample
        The validation part.
    survey : PartSurvey
        Its class pixels per cell.
    tile : int
        Side in pixels.
    most : int
        How many are wanted at most.
    """
    every = [
        (number, Window(sample.extent.row + row, sample.extent.col + col, tile, tile))
        for number, sample in enumerate(samples)
        for labelled in [survey.cells[number].any(axis=2)]
        for row in range(0, sample.extent.height, tile)
        for col in range(0, sample.extent.width, tile)
        if _is_labelled(labelled, survey.cell_sides[number], row, col, tile)
    ]
    return every if len(every) <= most else [every[k * len(every) // most] for k in range(most)]
