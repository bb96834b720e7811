"""Look at every pixel of a part once: how many of each class and where, mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.errors import TilenetError
from tilenet.sources.gdal import environment
from tilenet.training.images import open_image
from tilenet.training.parallel import in_parallel
from tilenet.training.pieces import pieces
from tilenet.training.samples import BrokenDataError, Problem, Sample

__all__ = ["PartSurvey", "survey_part"]

_FINEST, _COARSEST, _CELLS = 32, 128, 64


@dataclass(frozen=True)
class PartSurvey:
    """What the pixels of one part are.

    Parameters
    ----------
    images, pixels : int
        Samples and their pixels.
    class_pixels : ndarray, shape (K,)
        Per class.
    ignored : int
        Pixels without a label.
    mean, std : ndarray, shape (C,)
        Of the valid pixels, in raw units.
    cells : tuple of ndarray, shape (rows, cols, K)
        Per sample, class pixels per cell.
    cell_sides : tuple of int
        Per sample, a cell's side in pixels.
    """

    images: int
    pixels: int
    class_pixels: NDArray[np.int64]
    ignored: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    cells: tuple[NDArray[np.int32], ...]
    cell_sides: tuple[int, ...]


@dataclass
class _Seen:
    """What one sample's pixels are; sums over the valid ones, per band."""

    cells: NDArray[np.int32]
    side: int
    ignored: int
    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    def add_pixels(self, pixels: NDArray[np.generic]) -> None:
        """Add valid pixels, (C, n)."""
        flat = pixels.astype(np.float64)
        self.count += flat.shape[1]
        self.total += flat.sum(axis=1)
        self.squares += (flat * flat).sum(axis=1)

    def add_label(self, label: NDArray[np.uint8], row: int, col: int) -> None:
        """Add classes, (h, w), whose first pixel is (row, col) of the sample."""
        rows, cols, classes = self.cells.shape
        row_cells = (np.arange(row, row + label.shape[0]) // self.side)[:, None]
        col_cells = (np.arange(col, col + label.shape[1]) // self.side)[None]
        index = (row_cells * cols + col_cells) * classes + label
        labelled = label != NODATA
        self.ignored += label.size - int(labelled.sum())
        counts = np.bincount(index[labelled], minlength=rows * cols * classes)
        self.cells += counts.reshape(self.cells.shape).astype(np.int32)


def _see(sample: Sample, classes: int) -> _Seen | Problem:
    extent = sample.extent
    # Fine enough that a window near a cell shows what it holds, coarse enough to stay small.
    side = -(-max(extent.height, extent.width) // _CELLS)
    side = min(_COARSEST, max(_FINEST, side))
    shape = (-(-extent.height // side), -(-extent.width // side), classes)
    try:
        image = open_image(sample.image)
        seen = _Seen(np.zeros(shape, np.int32), side, 0, 0, *np.zeros((2, image.bands)))
        for piece in pieces(extent):
            with environment():
                pixels, valid = image.read(piece)
            label = sample.label.read(piece)[0]
            if valid is not None:
                label = np.where(valid, label, np.uint8(NODATA))
            seen.add_pixels(pixels.reshape(len(pixels), -1) if valid is None else pixels[:, valid])
            seen.add_label(label, piece.row - extent.row, piece.col - extent.col)
        image.close()
    except TilenetError as error:
        return Problem(error.what, error.where)
    return seen


def survey_part(samples: Sequence[Sample], classes: int) -> PartSurvey:
    """Read every pixel of a part once.

    Parameters
    ----------
    samples : sequence of Sample
        The part, checked.
    classes : int
        K.

    Raises
    ------
    BrokenDataError
        Pixels that do not read.
    """
    done = in_parallel(lambda sample: _see(sample, classes), samples)
    problems = [seen for seen in done if isinstance(seen, Problem)]
    if problems:
        raise BrokenDataError(problems)
    seen = [one for one in done if isinstance(one, _Seen)]
    count = max(1, sum(one.count for one in seen))
    mean = np.sum([one.total for one in seen], axis=0) / count
    square = np.sum([one.squares for one in seen], axis=0) / count
    return PartSurvey(
        images=len(seen),
        pixels=sum(s.extent.pixels for s in samples),
        class_pixels=np.sum([one.cells.sum(axis=(0, 1), dtype=np.int64) for one in seen], axis=0),
        ignored=sum(one.ignored for one in seen),
        mean=mean,
        std=np.sqrt(np.maximum(square - mean * mean, 0)),
        cells=tuple(one.cells for one in seen),
        cell_sides=tuple(one.side for one in seen),
    )
