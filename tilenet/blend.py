"""Blending windows and exact weighted sums.

Windows are normalised per axis in advance (v = w / Σw over all tiles at a pixel), so their outer
products sum to 1 at every pixel and nothing is divided later. A tile adds
``trunc(p · (v_y·2¹⁵ ⊗ v_x·2¹⁵))`` as int32: integers commute, so the sums are the same bytes for
any order, block size, number of workers, resume or retry. They never overflow: Σ ≤ 2³⁰ (1 + 2⁻²²).

Pure numpy: no files, no GPU, no Dask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.lattice import Axis

__all__ = [
    "Activation",
    "Blend",
    "Decision",
    "Sums",
    "axis_weights",
    "decide",
    "has_threshold",
    "quantise",
]

ONE = 1 << 30
"""The integer that stands for a probability of 1."""

AXIS_ONE = np.float32(1 << 15)
"""The scale of one axis' weights; the product of two is `ONE`."""

LIMIT_BITS = 10
"""Unbounded scores are clamped to ±2**LIMIT_BITS and weigh 2**-LIMIT_BITS as much."""

_STRIP_PIXELS = 1 << 15  # worked on at a time: as float32 they stay in a core's second-level cache

Activation = Literal["softmax", "sigmoid", "none"]


class Blend(StrEnum):
    """How overlapping tiles are weighted."""

    GAUSSIAN = "gaussian"
    HANN = "hann"
    LINEAR = "linear"
    CROP = "crop"


def _raw_window(blend: Blend, side: int, overlap: int) -> NDArray[np.float64]:
    """Return one axis' window before normalising: (side,), multiples of 2⁻²⁰, at least one.

    exp and sin differ in their last bits between processors; rounding makes the windows the same
    everywhere.
    """
    centre = np.arange(side) - (side - 1) / 2
    if blend is Blend.GAUSSIAN:
        window = np.exp(-0.5 * (centre / (side / 8)) ** 2)
    elif blend is Blend.HANN:
        window = np.cos(np.pi * centre / side) ** 2
    else:
        window = np.minimum(1.0, (side / 2 + 0.5 - np.abs(centre)) / (overlap + 1))
    return np.maximum(np.rint(window * 2.0**20), 1.0) / 2.0**20


@lru_cache(maxsize=1024)
def _weights(
    blend: Blend, side: int, overlap: int, neighbours: tuple[int, ...]
) -> NDArray[np.float64]:
    here = neighbours.index(0)
    if blend is Blend.CROP:
        # Every pixel comes from the tile whose centre is nearest: cuts at mid-overlap.
        cuts = [(a + b + side) // 2 for a, b in pairwise(neighbours)]
        start = cuts[here - 1] if here > 0 else 0
        stop = cuts[here] if here < len(cuts) else side
        weights = np.zeros(side)
        weights[start:stop] = 1.0
    else:
        raw = _raw_window(blend, side, overlap)
        total = np.zeros(side)
        for offset in neighbours:
            first, last = max(0, offset), min(side, offset + side)
            total[first:last] += raw[first - offset : last - offset]
        weights = raw / total
    weights.flags.writeable = False
    return weights


def axis_weights(axis: Axis, tile: int, blend: Blend) -> NDArray[np.float64]:
    """Return the normalised weights of one tile along one axis.

    Parameters
    ----------
    axis : Axis
        The tiles along the axis.
    tile : int
        Number of the tile.
    blend : Blend
        Kind of window.

    Returns
    -------
    ndarray, shape (side,), float64
        At every pixel the weights of all tiles that cover it sum to 1.
    """
    return _weights(blend, axis.side, axis.tile - axis.stride, axis.neighbours(tile))


@dataclass(frozen=True, slots=True)
class Decision:
    """How sums become classes and probabilities.

    Parameters
    ----------
    activation : {"softmax", "sigmoid", "none"}
        What the scores went through; "none" means unbounded.
    threshold : float
        For one channel: class 1 where the score reaches it. For sigmoid with several channels:
        class 1 + argmax where the maximum reaches it, else class 0. Not used otherwise.
    exact : bool
        The weights are 0 and 1 only (crop), so the sums carry no truncation of their own.
    """

    activation: Activation
    threshold: float
    exact: bool

    @property
    def bits(self) -> int:
        """By how many bits unbounded scores are scaled down."""
        return LIMIT_BITS if self.activation == "none" else 0

    @property
    def level(self) -> int:
        """The threshold as a sum.

        Up to 25 truncations and the weights' float32 rounding can leave a sum of exact scores
        2⁻²³ short of the threshold; that much is granted unless the weights are 0 and 1.
        """
        # Scores are float32 and truncated, so the threshold is treated the same way.
        level = math.floor(float(np.float32(self.threshold)) * (ONE >> self.bits))
        if not self.exact:
            granted = level - (ONE >> 23)
            # A tiny threshold is still one: no evidence at all never reaches it.
            bounded = self.activation != "none" and level > 0
            level = max(granted, 1) if bounded else granted
        return min(max(level, -(1 << 31)), (1 << 31) - 1)

    def thresholded(self, channels: int) -> bool:
        """Whether the threshold is used."""
        return has_threshold(self.activation, channels)


def has_threshold(activation: Activation, channels: int) -> bool:
    """Return whether scores of so many channels are held against a threshold."""
    return channels == 1 or activation == "sigmoid"


def _strip_rows(width: int) -> int:
    """Return how many rows of so many pixels are worked on at a time."""
    return max(1, _STRIP_PIXELS // max(1, width))


class Sums:
    """Weighted int32 sums over a rectangle, (K, height, width).

    Tiles may come in any order. Row of tiles by row of tiles, from left to right, is the fastest:
    what no tile has reached yet is then never cleared, only written.

    Parameters
    ----------
    channels, height, width : int
        Shape of the sums.
    decision : Decision
        Says whether scores are bounded.
    """

    def __init__(self, channels: int, height: int, width: int, decision: Decision) -> None:
        self._sums = np.empty((channels, height, width), np.int32)
        self._reached = np.zeros(height, np.intp)  # columns of each row that hold sums
        self._decision = decision
        self.nonfinite = 0

    def emptied(self, channels: int, height: int, width: int, decision: Decision) -> Sums:
        """Return empty sums in the memory of these, which are then no longer good, if they fit."""
        if self._sums.shape != (channels, height, width):
            return Sums(channels, height, width, decision)
        self._reached[:] = 0
        self._decision, self.nonfinite = decision, 0
        return self

    def add(
        self,
        scores: NDArray[np.float32],
        row: int,
        col: int,
        weights: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> None:
        """Add one tile.

        Parameters
        ----------
        scores : ndarray, shape (K, h, w), float32
            The tile's scores; non-finite ones count as 0.
        row, col : int
            Where the tile's first pixel lies in the sums; what lies outside is cut off.
        weights : pair of ndarray
            The tile's weights along rows (h,) and columns (w,).
        """
        height = min(scores.shape[1], self._sums.shape[1] - row)
        width = min(scores.shape[2], self._sums.shape[2] - col)
        scale = AXIS_ONE / (1 << self._decision.bits)
        rows = (weights[0] * float(scale)).astype(np.float32)[:height, None]
        cols = (weights[1] * float(AXIS_ONE)).astype(np.float32)[None, :width]
        active = np.flatnonzero(rows)  # crop leaves whole rows untouched
        if not active.size:
            return
        first, last = row + int(active[0]), row + int(active[-1])
        weight, plane = np.empty((2, _strip_rows(width), width), np.float32)
        for start, stop in self._strips(first, last + 1, width):
            self._clear(slice(start, stop), col)
            known = min(int(self._reached[start]) - col, width)
            here, n = slice(start - row, stop - row), stop - start
            np.multiply(rows[here], cols, out=weight[:n])
            targets = self._sums[:, start:stop, col : col + width]
            for sums, score in zip(targets, scores[:, here, :width], strict=True):
                np.multiply(self._bounded(score), weight[:n], out=plane[:n])
                # Both truncate towards zero.
                if known:
                    sums[:, :known] += plane[:n, :known].astype(np.int32)
                sums[:, known:] = plane[:n, known:]
            self._reached[start:stop] = max(int(self._reached[start]), col + width)

    def _strips(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield a few rows at a time that tiles have reached up to the same column."""
        step = _strip_rows(width)
        ends = [*(np.flatnonzero(np.diff(self._reached[start:stop])) + start + 1).tolist(), stop]
        for end in ends:
            for first in range(start, end, step):
                yield first, min(first + step, end)
            start = end

    def _clear(self, rows: slice, stop: int) -> None:
        """Make the sums of rows 0 from where tiles have reached to a column."""
        reached = int(self._reached[rows.start])
        if reached < stop:
            self._sums[:, rows, reached:stop] = 0
            self._reached[rows] = stop

    def _sums_of(self, rows: slice) -> NDArray[np.int32]:
        """Return rows of sums, (K, h, width), a view; where no tile came they are 0."""
        _, height, width = self._sums.shape
        for start, stop in self._strips(*rows.indices(height)[:2], width):
            self._clear(slice(start, stop), width)
        return self._sums[:, rows]

    def _bounded(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return scores without what is not finite, which is counted, and within the limits."""
        bits = self._decision.bits
        limit = np.float32(1 << bits) if bits else np.finfo(np.float32).max
        if -limit <= scores.min() and scores.max() <= limit:  # never so for NaN
            return scores
        bad = ~np.isfinite(scores)
        self.nonfinite += int(np.count_nonzero(bad))
        return np.clip(np.where(bad, np.float32(0), scores), -limit, limit)

    def take(self, rows: slice, cols: slice) -> NDArray[np.int32]:
        """Return a rectangle of sums, (K, h, w), good until the sums change."""
        return self._sums_of(rows)[:, :, cols]

    def decide(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return the classes of a rectangle, (h, w)."""
        return decide(self._sums_of(rows)[:, :, cols], self._decision)

    def quantise(self, rows: slice, cols: slice) -> NDArray[np.uint8]:
        """Return the probabilities of a rectangle as bytes, (K, h, w)."""
        return quantise(self._sums_of(rows)[:, :, cols], self._decision)

    def shift(self, rows: int) -> None:
        """Drop the first `rows` rows, and move the others up."""
        kept = max(0, self._sums.shape[1] - rows)
        self._sums[:, :kept] = self._sums[:, rows:]
        self._reached[:kept] = self._reached[rows:]
        self._reached[kept:] = 0


def decide(sums: NDArray[np.int32], decision: Decision) -> NDArray[np.uint8]:
    """Return the class of every pixel: the largest sum, the lowest class on ties.

    A running maximum over a few rows at a time, so that they stay in the cache; numpy's argmax over
    the first axis is many times slower.

    Parameters
    ----------
    sums : ndarray, shape (K, h, w), int32
        Weighted sums.
    decision : Decision
        Activation and threshold.

    Returns
    -------
    ndarray, shape (h, w), uint8
    """
    channels, height, width = sums.shape
    if channels == 1:
        one: NDArray[np.uint8] = (sums[0] >= decision.level).view(np.uint8)
        return one
    if channels == 2 and not decision.thresholded(channels):
        two: NDArray[np.uint8] = (sums[1] > sums[0]).view(np.uint8)
        return two
    out = np.zeros((height, width), np.uint8)
    step = max(1, _strip_rows(width) // 2)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        best = sums[0, rows].copy()
        index = out[rows]
        for k in range(1, channels):
            # Later winners have larger numbers, so a maximum keeps the last one.
            np.maximum(index, (sums[k, rows] > best).view(np.uint8) * np.uint8(k), out=index)
            np.maximum(best, sums[k, rows], out=best)
        if decision.thresholded(channels):
            index += np.uint8(1)
            index *= (best >= decision.level).view(np.uint8)
    return out


def quantise(sums: NDArray[np.int32], decision: Decision) -> NDArray[np.uint8]:
    """Return round(255 · probability), clipped to 0…255, in integers.

    Parameters
    ----------
    sums : ndarray, shape (K, h, w), int32
        Weighted sums.
    decision : Decision
        Says how the sums are scaled.

    Returns
    -------
    ndarray, shape (K, h, w), uint8
    """
    one = ONE >> decision.bits
    out = np.empty(sums.shape, np.uint8)
    step = _strip_rows(sums.shape[2])
    for start in range(0, sums.shape[1], step):
        rows = slice(start, start + step)
        wide = sums[:, rows].astype(np.int64) * 255 + one // 2
        out[:, rows] = np.clip(wide // one, 0, 255)
    return out


assert NODATA == 255, "classes 0 to 254 and no answer share one byte"
