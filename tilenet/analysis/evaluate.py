"""Compare masks with the truth, strip by strip: one pair, folders of pairs, or labelled samples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.analysis.alignment import TOLERANCE, distance
from tilenet.classes import NODATA, ClassInfo, default_classes
from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.sinks.store import MaskStore, open_store
from tilenet.sources.folder import SUFFIXES
from tilenet.training.labels import mask_place, mask_size, read_keys
from tilenet.training.layouts import mask_stem
from tilenet.training.metrics import Scores, confusion
from tilenet.training.palette import COLOUR, Palette, find_palette, key_name
from tilenet.training.pieces import pieces

__all__ = ["Evaluation", "MaskReader", "evaluate_pairs", "find_pairs", "score"]

_logger = logging.getLogger(__name__)
_MAX_LISTED = 8

Read = Callable[[Window], NDArray[np.uint8]]


@dataclass(frozen=True)
class Evaluation:
    """How well masks agree with the truth.

    Parameters
    ----------
    classes : tuple of ClassInfo
        In order.
    matrix : ndarray, shape (K, K + 1)
        Confusion over all images.
    images : tuple of (str, ndarray)
        Name and confusion of each.
    """

    classes: tuple[ClassInfo, ...]
    matrix: NDArray[np.int64]
    images: tuple[tuple[str, NDArray[np.int64]], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of `tilenet evaluate`; figures are of all pixels together.

        `mean_image_dice` is the mean over the images of `object_dice`.
        """
        document = Scores(self.matrix).as_dict(self.classes)
        rows = []
        for name, matrix in self.images:
            figures = Scores(matrix).as_dict(self.classes)
            dice = {c["name"]: c["dice"] for c in figures.pop("classes")}
            rows.append({"image": name} | figures | {"dice": dice})
        known = [row["object_dice"] for row in rows if row["object_dice"] is not None]
        document["mean_image_dice"] = round(float(np.mean(known)), 6) if known else None
        return document | {"per_image": rows}


def score(truth: Read, pred: Read, extent: Window, classes: int) -> NDArray[np.int64]:
    """Return the confusion of two masks over an extent, read by windows.

    Parameters
    ----------
    truth, pred : callable
        From a window to classes, (h, w) uint8.
    extent : Window
        Where.
    classes : int
        K.
    """
    total = np.zeros((classes, classes + 1), np.int64)
    for window in pieces(extent):
        total += confusion(truth(window), pred(window), classes)
    return total


class MaskReader:
    """A finished mask: a Zarr store of ours, or a raster of class indices.

    Parameters
    ----------
    path : Path
        Where it lies.

    Raises
    ------
    InputError
        It is no mask.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.classes: tuple[ClassInfo, ...] = ()
        self._store: MaskStore | None = None
        if path.is_dir():
            self._store = open_store(path)
            spec = self._store.spec
            self.classes = tuple(spec.classes)
            self.height, self.width = spec.height, spec.width
        else:
            self.height, self.width = mask_size(str(path))

    def place(self) -> Georeference:
        """Return where the mask lies on a map."""
        return mask_place(str(self.path)) if self._store is None else self._store.spec.georeference

    def keys(self, window: Window, *, expand: bool = True) -> NDArray[np.int64]:
        """Return values, or colours where there is a colour table, of a window, (h, w)."""
        if self._store is None:
            return read_keys(str(self.path), 0, window, expand=expand)
        return self._store.read("mask", window).astype(np.int64)

    def read(self, window: Window) -> NDArray[np.uint8]:
        """Return class indices of a window, (h, w)."""
        keys = self.keys(window, expand=False)
        return np.where((keys < 0) | (keys > NODATA), NODATA, keys).astype(np.uint8)


def find_pairs(pred: Path, truth: Path) -> list[tuple[str, Path, Path]]:
    """Return name, mask and truth: two files, or two folders with equal stems.

    Raises
    ------
    InputError
        A mask has no truth, or there is none at all.
    """
    for path in (pred, truth):
        if not path.exists():
            raise InputError("no such file or folder", path, "check the path")
    if not (pred.is_dir() and pred.suffix != ".zarr"):
        return [(pred.stem, pred, truth)]

    def masks(folder: Path) -> dict[str, Path]:
        found = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (SUFFIXES | {".zarr"})]
        inside = [p for p in found if not any(q.suffix == ".zarr" for q in p.parents)]
        return {mask_stem(p).removesuffix(".ome"): p for p in inside}  # a.ome.tif is a's mask

    wanted, given = masks(truth), masks(pred)
    lonely = sorted(set(given) - set(wanted))
    if lonely or not given:
        what = f"{lonely[0]} has no truth" if lonely else "no masks"
        raise InputError(what, pred, "give folders whose files have equal stems")
    return [(stem, given[stem], wanted[stem]) for stem in sorted(given)]


def _values(reader: MaskReader) -> Counter[int]:
    counts: Counter[int] = Counter()
    for piece in pieces(Window(0, 0, reader.height, reader.width)):
        keys, pixels = np.unique(reader.keys(piece), return_counts=True)
        counts.update(dict(zip(keys.tolist(), pixels.tolist(), strict=True)))
    return counts


def _truth_reader(
    readers: Sequence[tuple[str, MaskReader]], classes: tuple[ClassInfo, ...]
) -> tuple[Callable[[MaskReader], Read], int]:
    """Return how truth becomes class indices, and how many classes it has."""
    counts = {name: _values(reader) for name, reader in readers}
    values = set().union(*counts.values()) - {NODATA}
    known = len(classes)
    if values and max(values) < known and (known != 2 or 1 in values):
        return (lambda reader: reader.read), known
    names = [c.name for c in classes] or None
    fits = names is None or len(set().union(*counts.values())) <= known or known == 2
    palette = find_palette(counts, names if fits else None)
    if 0 < known < len(palette.classes):  # the mask can have no others
        palette = find_palette(counts, names)
    _say_values(palette, sum(counts.values(), Counter()))
    return (lambda reader: lambda window: palette.apply(reader.keys(window))), len(palette.classes)


def _say_values(palette: Palette, pixels: Counter[int]) -> None:
    """Warn of what counts for nothing, and of grey values that are no numbers of classes.

    Of two values in all, any may be meant.
    """
    taken = dict(palette.table)
    lost = palette.unknown([key for key in pixels if key != NODATA])
    odd = [
        key
        for key in sorted(pixels)
        if key in lost or (key < COLOUR and key not in (taken.get(key), NODATA))
    ]
    if not taken or not odd or (len(palette.classes) == 2 and not lost):
        return
    told = [
        f"{key_name(key)} ({pixels[key]} pixels) "
        + ("counts for nothing" if key in lost else f"is taken for class {taken[key]}")
        for key in odd[:_MAX_LISTED]
    ]
    more = f", and {len(odd) - _MAX_LISTED} more" if len(odd) > _MAX_LISTED else ""
    _logger.warning("the truth has values that are no classes: %s%s", ", ".join(told), more)


def _check_grids(pred: MaskReader, truth: MaskReader) -> None:
    """Raise InputError unless pixels of the two can be compared one by one."""
    if (pred.height, pred.width) != (truth.height, truth.width):
        raise InputError(
            f"sizes differ: mask {pred.height}×{pred.width}, truth {truth.height}×{truth.width}",
            truth.path,
            "compare masks on one grid",
        )
    apart = distance(pred.place(), truth.place(), truth.height, truth.width)
    if apart is not None and apart > TOLERANCE:
        raise InputError(
            f"places differ: mask and truth lie up to {apart:.4g} pixels apart on the map",
            truth.path,
            "compare masks on one grid",
        )


def evaluate_pairs(pairs: Sequence[tuple[str, Path, Path]]) -> Evaluation:
    """Compare masks with truths of the same size, and place if both say where they lie.

    Truth with two values of any kind is background and object; colours and grey levels are read as
    training reads them, and a warning names grey levels that are no class numbers. 255 is "ignore"
    in the truth and "no answer" in the mask.

    Raises
    ------
    InputError
        A file does not read, or sizes or places differ.
    """
    preds = [MaskReader(pred) for _, pred, _ in pairs]
    truths = [(name, MaskReader(truth)) for name, _, truth in pairs]
    for pred, (_, truth) in zip(preds, truths, strict=True):
        _check_grids(pred, truth)  # before any pixel is read
    classes = preds[0].classes
    as_classes, count = _truth_reader(truths, classes)
    if not classes:
        seen = [int(v) for p in preds for v in _values(p) if v != NODATA]
        count = max([count, *(v + 1 for v in seen if v < NODATA)])
        classes = default_classes(count)
    images = []
    for pred, (name, truth) in zip(preds, truths, strict=True):
        extent = Window(0, 0, truth.height, truth.width)
        images.append((name, score(as_classes(truth), pred.read, extent, len(classes))))
    return Evaluation(classes, np.sum([m for _, m in images], axis=0), tuple(images))
