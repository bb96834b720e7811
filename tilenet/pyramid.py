"""The next coarser level of a mask: 2×2 majority."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA

__all__ = ["halve"]

_ROWS = 64  # output rows at a time, so that the temporaries stay in the cache


def halve(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mask at half the size, (⌈h/2⌉, ⌈w/2⌉).

    The most frequent of the four pixels wins; ties go to the first in scan order; no answer (255)
    wins only if all four have none. A missing row or column at an odd border is the last one
    repeated.

    Parameters
    ----------
    mask : ndarray, shape (h, w), uint8
        Classes, 255 = no answer. Its first pixel has even coordinates in the raster.
    """
    height, width = mask.shape
    out = np.empty((-(-height // 2), -(-width // 2)), np.uint8)
    for start in range(0, out.shape[0], _ROWS):
        rows = mask[2 * start : 2 * (start + _ROWS)]
        out[start : start + _ROWS] = _halve(rows)
    return out


def _halve(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = mask.shape
    if height % 2 or width % 2:
        mask = np.pad(mask, ((0, height % 2), (0, width % 2)), mode="edge")
    # Neighbours in a row as one 16-bit number: whole-array operations on contiguous memory.
    pairs = np.ascontiguousarray(mask).view("<u2")
    upper, lower = pairs[0::2], pairs[1::2]
    out = upper.astype(np.uint8)  # the low byte: the first of the four
    mixed = np.flatnonzero((upper != lower) | ((upper >> 8) != out))
    if mixed.size:
        above, below = upper.ravel()[mixed], lower.ravel()[mixed]
        four = [(pair >> shift).astype(np.uint8) for pair in (above, below) for shift in (0, 8)]
        out.ravel()[mixed] = _majority(*four)
    return out


def _majority(
    a: NDArray[np.uint8], b: NDArray[np.uint8], c: NDArray[np.uint8], d: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    # Candidates from last to first, each kept if it has as many votes as the best so far.
    best, votes = d, _votes(d, a, b, c)
    for one, *others in ((c, a, b, d), (b, a, c, d), (a, b, c, d)):
        mine = _votes(one, *others)
        better = mine >= votes
        best = np.where(better, one, best)
        votes = np.where(better, mine, votes)
    return best


def _votes(
    one: NDArray[np.uint8], x: NDArray[np.uint8], y: NDArray[np.uint8], z: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Count who agrees with `one`; no answer has no vote."""
    votes = (one == x).view(np.uint8) + (one == y).view(np.uint8) + (one == z).view(np.uint8)
    counted: NDArray[np.uint8] = (votes + np.uint8(1)) * (one != NODATA).view(np.uint8)
    return counted
