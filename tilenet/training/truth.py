"""Run a finished model through the predict engine over whole images; compare with the labels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

Predict = Callable[[Path, dict[Path, ImageRef], Path], dict[Path, Path]]
"""Called with a manifest, what stands for which image in it, and a folder for the masks; returns
the mask of each."""


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
    """Write one page of a stack as a file that predict opens; its bands are chosen there."""
    image = open_image(replace(ref, bands=None))
    profile = {
        "driver": "GTiff", "height": image.height, "width": image.width, "count": image.bands,
        "dtype": image.dtype, "photometric": "minisblack", "alpha": "no",
    }  # fmt: skip
    with ignoring(NotGeoreferencedWarning), rasterio.open(target, "w", **profile) as dataset:
        for piece in pieces(Window(0, 0, image.height, image.width)):
            where = ((piece.row, piece.row_stop), (piece.col, piece.col_stop))
            dataset.write(image.read(piece)[0], window=where)
    image.close()


def _fits_a_line(name: str) -> bool:
    return name == name.strip() and len(os.fsencode(name).splitlines()) == 1


def _stage(ref: ImageRef, folder: Path) -> Path:
    """Return a path in a new folder that stands for an image."""
    path = Path(ref.path).absolute()
    if ref.page:
        folder.mkdir()
        _export_page(ref, folder / f"{path.stem}-{ref.page:04d}.tif")
        return folder / f"{path.stem}-{ref.page:04d}.tif"
    if _fits_a_line(path.name):
        # All that lies beside it may belong to it: headers, masks, the levels of a slide.
        folder.symlink_to(path.parent)
        return folder / path.name
    folder.mkdir()
    (folder / f"image{path.suffix}").symlink_to(path)
    return folder / f"image{path.suffix}"


@contextmanager
def staged_images(samples: Sequence[Sample]) -> Iterator[tuple[Path, dict[Path, ImageRef]]]:
    """Give every image of the samples a path of its own, for as long as the context lasts.

    Yields
    ------
    manifest : Path
        Names them all.
    staged : dict of Path to ImageRef
        Which is which.
    """
    with tempfile.TemporaryDirectory(prefix="tilenet-") as temp:
        folder, staged = Path(temp).absolute(), dict[Path, ImageRef]()
        for number, ref in enumerate(dict.fromkeys(sample.image for sample in samples)):
            staged[_stage(ref, folder / f"{number:06d}")] = ref
        manifest = folder / "images.txt"
        lines = (os.fsencode(path.relative_to(folder)) + b"\n" for path in staged)
        manifest.write_bytes(b"".join(lines))
        yield manifest, staged


def _judge(sample: Sample, mask: Path, classes: int) -> Judged:
    image = open_image(sample.image)
    total = np.zeros((classes, classes + 1), np.int64)
    for window in pieces(sample.extent):
        truth = sample.label.read(window)[0]
        with environment():
            _, valid = image.read(window)
        if valid is not None:
            truth = np.where(valid, truth, np.uint8(NODATA))
        pred = read_keys(str(mask), 0, window).astype(np.uint8)
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
    with staged_images(samples) as (manifest, staged):
        masks = {staged[path]: mask for path, mask in predict(manifest, staged, folder).items()}
        return [_judge(sample, masks[sample.image], len(classes)) for sample in samples]
