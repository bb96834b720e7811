"""Run a finished model through the predict engine over whole images; compare with the labels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from tilenet.classes import NODATA, ClassInfo
from tilenet.geometry import Window
from tilenet.quiet import ignoring
from tilenet.sources.gdal import environment
from tilenet.training.images import ImageRef, open_image
from tilenet.training.labels import read_keys
from tilenet.training.metrics import confusion
from tilenet.training.pieces import pieces
from tilenet.training.samples import Sample

__all__ = ["Judged", "compare_samples", "staged_images"]

Predict = Callable[[list[Path], Path], None]
"""Writes one `STEM.tif` mask per image into a folder."""


@dataclass(frozen=True)
class Judged:
    """One sample's confusion, and where its mask lies.

    Parameters
    ----------
    sample : Sample
        Image and truth.
    matrix : ndarray, shape (K, K + 1)
        From `tilenet.training.metrics.confusion`.
    mask : Path
        GeoTIFF of class indices of the whole image.
    """

    sample: Sample
    matrix: NDArray[np.int64]
    mask: Path


def _export_page(ref: ImageRef, target: Path) -> None:
    """Write one page of a stack as a file that predict opens."""
    image = open_image(ref)
    profile = {
        "driver": "GTiff", "height": image.height, "width": image.width, "count": image.bands,
        "dtype": image.dtype,
    }  # fmt: skip
    with ignoring(NotGeoreferencedWarning), rasterio.open(target, "w", **profile) as dataset:
        for piece in pieces(Window(0, 0, image.height, image.width)):
            where = ((piece.row, piece.row_stop), (piece.col, piece.col_stop))
            dataset.write(image.read(piece)[0], window=where)
    image.close()


@contextmanager
def staged_images(samples: Sequence[Sample]) -> Iterator[dict[ImageRef, Path]]:
    """Give every image of the samples a path of its own name, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="tilenet-") as folder:
        staged: dict[ImageRef, Path] = {}
        for ref in dict.fromkeys(sample.image for sample in samples):
            target = Path(folder) / f"image-{len(staged):06d}{Path(ref.path).suffix}"
            if ref.page:
                _export_page(ref, target)
            else:
                target.symlink_to(Path(ref.path).absolute())
            staged[ref] = target
        yield staged


def _judge(sample: Sample, mask: Path, classes: int) -> Judged:
    image = open_image(sample.image)
    total = np.zeros((classes, classes + 1), np.int64)
    for window in pieces(sample.extent):
        truth = sample.label.read(window)[0]
        with environment():
            _, valid = image.read(window)
        if valid is not None:
            truth = np.where(valid, truth, np.uint8(NODATA))
        pred = read_keys(str(mask), 0, window, expand=False).astype(np.uint8)
        total += confusion(truth, pred, classes)
    image.close()
    return Judged(sample, total, mask)


def compare_samples(
    samples: Sequence[Sample], classes: Sequence[ClassInfo], predict: Predict, folder: Path
) -> list[Judged]:
    """Predict every sample's whole image and compare it with its truth.

    Parameters
    ----------
    samples : sequence of Sample
        Checked; several may be blocks of one image.
    classes : sequence of ClassInfo
        Of the labels.
    predict : callable
        The engine.
    folder : Path
        For the masks.

    Raises
    ------
    TilenetError
        As the engine does.
    """
    with staged_images(samples) as staged:
        predict(list(staged.values()), folder)
        masks = {ref: folder / f"{path.stem}.tif" for ref, path in staged.items()}
        return [_judge(sample, masks[sample.image], len(classes)) for sample in samples]
