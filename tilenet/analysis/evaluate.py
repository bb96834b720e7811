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
from tilenet.engine.document import read_sidecar
from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.sinks import MaskSpec
from tilenet.sinks.store import MaskStore, open_store
from tilenet.sources.folder import SUFFIXES
from tilenet.strangers import is_collection
from tilenet.training.labels import colour_table, mask_place, mask_size, read_keys
from tilenet.training.layouts import mask_stem
from tilenet.training.metrics import Scores, confusion
from tilenet.training.palette import COLOUR, Palette, in_colours, key_name
from tilenet.training.pieces import pieces
from tilenet.training.values import Values, are_numbers, count_values, palette_for

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
        self._table: NDArray[np.int64] | None = None
        if path.is_dir():
            self._store = open_store(path)
            spec = self._store.spec
            self.classes = tuple(spec.classes)
            self.height, self.width = spec.height, spec.width
        else:
            self.height, self.width = mask_size(str(path))
            self._table = colour_table(str(path), 0)
            document = read_sidecar(path)
            if document is not None:
                self.classes = tuple(MaskSpec.from_dict(document["spec"]).classes)

    def place(self) -> Georeference:
        """Return where the mask lies on a map."""
        return mask_place(str(self.path)) if self._store is None else self._store.spec.georeference

    @property
    def table(self) -> NDArray[np.int64] | None:
        """The keys of the colours that values are indices of, where they count."""
        return None if self.classes else self._table

    def values(self, window: Window) -> NDArray[np.int64]:
        """Return what is stored, indices of colours as they are, of a window, (h, w)."""
        if self._store is None:
            return read_keys(str(self.path), 0, window)
        return self._store.read("mask", window).astype(np.int64)

    def keys(self, window: Window) -> NDArray[np.int64]:
        """Return values, or colours where these count, of a window, (h, w)."""
        values = self.values(window)
        return values if self.table is None else in_colours(values, self.table)

    def read(self, window: Window) -> NDArray[np.uint8]:
        """Return class indices of a window, (h, w)."""
        keys = self.values(window)
        return np.where((keys < 0) | (keys > NODATA), NODATA, keys).astype(np.uint8)


def _masks(folder: Path) -> dict[str, Path]:
    """Return the masks below a folder by their place in it, without endings like ``_mask.png``."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = any(above.suffix == ".zarr" for above in path.relative_to(folder).parents)
        known = path.suffix.lower() in (SUFFIXES | {".zarr"})
        if not known or inside or path.name.endswith(".prob.tif"):
            continue
        stem = mask_stem(path).removesuffix(".ome")  # a.ome.tif is a's mask
        name = path.relative_to(folder).with_name(stem).as_posix()
        other, plain = found.get(name), mask_stem(path) == path.stem
        if other is not None and (mask_stem(other) == other.stem) == plain:
            raise InputError(f"{other.name} and {path.name} have one stem", path, "remove one")
        if other is None or not plain:  # beside its image, a_mask is the mask
            found[name] = path
    return found


def _by_stem(found: dict[str, Path], folder: Path) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for name, path in found.items():
        stem = name.rpartition("/")[2]
        if stem in stems:
            raise InputError(
                f"several masks are called {stem}", folder,
                "give two folders in which equal files lie at equal places",
            )  # fmt: skip
        stems[stem] = path
    return stems


def find_pairs(pred: Path, truth: Path) -> list[tuple[str, Path, Path]]:
    """Return name, mask and truth: two files, or two folders with equal stems.

    Files of folders are paired by their places in them, or, where these differ, by stems alone.

    Raises
    ------
    InputError
        A mask has no truth, there is none at all, or stems alone do not tell.
    """
    for path in (pred, truth):
        if not path.exists():
            raise InputError("no such file or folder", path, "check the path")
    if not is_collection(pred):
        return [(pred.stem, pred, truth)]
    wanted, given = _masks(truth), _masks(pred)
    if not set(given) <= set(wanted):
        wanted, given = _by_stem(wanted, truth), _by_stem(given, pred)
    lonely = sorted(set(given) - set(wanted))
    if lonely or not given:
        what = f"{lonely[0]} has no truth" if lonely else "no masks"
        raise InputError(what, pred, "give folders whose files have equal stems")
    return [(name, given[name], wanted[name]) for name in sorted(given)]


def _seen(reader: MaskReader) -> Values:
    return count_values(reader.values, Window(0, 0, reader.height, reader.width), reader.table)


def _palette(
    found: dict[str, Values], classes: tuple[ClassInfo, ...], file: Path | None
) -> tuple[Palette, bool]:
    """Return the palette of the truth (see `palette_for`); a mask has no classes but its own."""
    names = [c.name for c in classes] or None
    if file is not None:
        palette, plain = palette_for(found, file, None)
        same = names is not None and sorted(names) == sorted(c.name for c in palette.classes)
        return palette_for(found, file, names) if same else (palette, plain)
    palette, plain = palette_for(found, None, None)
    if 0 < len(classes) < len(palette.classes):
        return palette_for(found, None, names)
    return palette, plain


def _truth_reader(
    readers: Sequence[tuple[str, MaskReader]],
    classes: tuple[ClassInfo, ...],
    known: int,
    file: Path | None,
) -> tuple[Callable[[MaskReader], Read], int]:
    """Return how truth becomes class indices, and how many classes it has.

    Parameters
    ----------
    readers : sequence of (str, MaskReader)
        The truth.
    classes : tuple of ClassInfo
        Of the mask, if it tells them.
    known : int
        How many classes the mask is known to have.
    file : Path or None
        A palette.
    """
    found = {name: _seen(reader) for name, reader in readers}
    values = set().union(*(one.counts for one in found.values())) - {NODATA}
    fit = bool(values) and max(values) < known and (known != 2 or 1 in values)
    if file is None and fit and are_numbers(found):
        return (lambda reader: reader.read), known
    palette, plain = _palette(found, classes, file)
    counts = (one.counts if plain else one.in_colours() for one in found.values())
    _say_values(palette, sum(counts, Counter()), given=file is not None)

    def read(reader: MaskReader) -> Read:
        keys = reader.values if plain else reader.keys
        return lambda window: palette.apply(keys(window))

    return read, len(palette.classes)


def _say_values(palette: Palette, pixels: Counter[int], *, given: bool) -> None:
    """Warn of what counts for nothing, and of grey values that are no numbers of classes.

    Of two values in all, any may be meant; and those that a palette names are meant.
    """
    taken = dict(palette.table)
    lost = palette.unknown([key for key in pixels if key != NODATA])
    odd = [
        key
        for key in sorted(pixels)
        if key in lost or (key < COLOUR and key not in (taken.get(key), NODATA))
    ]
    if given:
        odd = lost
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


def evaluate_pairs(
    pairs: Sequence[tuple[str, Path, Path]], palette: Path | None = None
) -> Evaluation:
    """Compare masks with truths of the same size, and place if both say where they lie.

    Truth whose values number the mask's classes is taken as it is. Else two values of any kind are
    background and object; colours and grey levels are read as training reads them, and a warning
    names grey levels that are no class numbers. 255 is "ignore" in the truth and "no answer" in the
    mask.

    Parameters
    ----------
    pairs : sequence of (str, Path, Path)
        Name, mask and truth.
    palette : Path, optional
        A palette file for the truth.

    Raises
    ------
    InputError
        A file does not read, or sizes or places differ.
    UsageError
        The palette does not read.
    """
    preds = [MaskReader(pred) for _, pred, _ in pairs]
    truths = [(name, MaskReader(truth)) for name, _, truth in pairs]
    for pred, (_, truth) in zip(preds, truths, strict=True):
        _check_grids(pred, truth)  # before any pixel is read
    classes = preds[0].classes
    known = len(classes)
    if not classes:
        seen = set[int]().union(*(_seen(pred).counts for pred in preds))
        known = max((value + 1 for value in seen if 0 <= value < NODATA), default=0)
    # A mask of two values may mean them as the truth does, whatever they are.
    sure = known if classes or known > 2 else 0
    as_classes, count = _truth_reader(truths, classes, sure, palette)
    if not classes:
        classes = default_classes(max(count, known))
    images = []
    for pred, (name, truth) in zip(preds, truths, strict=True):
        extent = Window(0, 0, truth.height, truth.width)
        images.append((name, score(as_classes(truth), pred.read, extent, len(classes))))
    return Evaluation(classes, np.sum([m for _, m in images], axis=0), tuple(images))
