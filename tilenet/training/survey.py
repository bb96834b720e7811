"""Look at every pixel once before training: broken pairs, classes, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA, ClassInfo, default_classes
from tilenet.errors import InputError, TilenetError, UsageError
from tilenet.geometry import Window
from tilenet.models.session import cores
from tilenet.training.config import TrainConfig
from tilenet.training.images import OpenImage, open_image, strict_reading
from tilenet.training.labels import (
    MaskFile,
    ObjectMasks,
    mask_size,
    merge_objects,
    read_keys,
    strips,
)
from tilenet.training.layouts import find_samples
from tilenet.training.palette import Palette, find_palette, key_name, read_palette
from tilenet.training.samples import DataSet, Found, Problem, Sample
from tilenet.training.split import split_samples

__all__ = ["BrokenDataError", "PartSurvey", "check_data", "survey_part"]

_MAX_CELLS = 64
_MIN_CELL = 32


class BrokenDataError(InputError):
    """The data set has broken pairs; `problems` names each.

    Parameters
    ----------
    problems : sequence of Problem
        One line each.
    where : object
        The data set.
    """

    def __init__(self, problems: Sequence[Problem], where: object) -> None:
        super().__init__(
            f"{len(problems)} broken: {problems[0]}", where, "mend or remove what is named"
        )
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.where)


def _parallel[T, R](work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(work, items))


def _mask_shapes(label: object) -> list[tuple[str, tuple[int, int]]]:
    if isinstance(label, MaskFile):
        return [(label.path, mask_size(label.path, label.page))]
    return []  # polygons lie on any grid; one-object masks are compared when they are merged


def _inspect(sample: Sample) -> tuple[Sample, OpenImage | None, list[Problem]]:
    """Open an image and its mask; compare their sizes."""
    try:
        image = open_image(sample.image)
    except TilenetError as error:
        return sample, None, [Problem(error.what, error.where or sample.image.path)]
    problems = []
    try:
        for path, (height, width) in _mask_shapes(sample.label):
            if (height, width) != (image.height, image.width):
                problems.append(
                    Problem(
                        f"sizes differ: image {image.height}×{image.width}, mask {height}×{width}",
                        path,
                    )
                )
    except TilenetError as error:
        problems.append(Problem(error.what, error.where))
    return replace(sample, height=image.height, width=image.width), image, problems


def _same_kind(
    inspected: Sequence[tuple[Sample, OpenImage | None, list[Problem]]],
) -> tuple[int, str, list[Problem]]:
    """Return the images' band count and dtype, and those that differ from most."""
    kinds = Counter((i.bands, i.dtype) for _, i, _ in inspected if i is not None)
    if not kinds:
        return 0, "uint8", []
    bands, dtype = kinds.most_common(1)[0][0]
    problems = [
        Problem(f"{i.bands} bands of {i.dtype}, most have {bands} of {dtype}", s.image.path)
        for s, i, _ in inspected
        if i is not None and (i.bands, i.dtype) != (bands, dtype)
    ]
    return bands, dtype, problems


def _scan_mask(sample: Sample) -> Counter[int] | Problem:
    label = sample.label
    assert isinstance(label, MaskFile)
    counts: Counter[int] = Counter()
    try:
        for strip in strips(sample.height, sample.width):
            keys, pixels = np.unique(read_keys(label.path, label.page, strip), return_counts=True)
            counts.update(dict(zip(keys.tolist(), pixels.tolist(), strict=True)))
    except TilenetError as error:
        return Problem(error.what, error.where)
    return counts


def _with_palette(
    samples: list[Sample], config: TrainConfig
) -> tuple[list[Sample], Palette, list[Problem]]:
    """Find or read the palette of mask rasters and check every mask against it."""
    problems: list[Problem] = []
    counts: dict[str, Counter[int]] = {}
    for sample, found in zip(samples, _parallel(_scan_mask, samples), strict=True):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            counts[sample.name] = found
    if config.palette is not None:
        palette = read_palette(config.palette, config.classes)
    elif counts:
        palette = find_palette(counts, config.classes)
    else:
        palette = find_palette({"": Counter([0])}, None)
    for sample in samples:
        outside = palette.unknown(sorted(counts.get(sample.name, ())))
        if outside:
            names = ", ".join(key_name(key) for key in outside[:5])
            pixels = sum(counts[sample.name][key] for key in outside)
            problems.append(
                Problem(f"{pixels} pixels of {names}: outside the classes", sample.label.path)
            )
    samples = [
        replace(s, label=s.label.with_palette(palette)) if isinstance(s.label, MaskFile) else s
        for s in samples
    ]
    return samples, palette, problems


def _merge(samples: list[Sample], cache: Path) -> tuple[list[Sample], list[Problem]]:
    """Merge the one-object masks of every sample into one raster each."""
    cache.mkdir(parents=True, exist_ok=True)
    palette = Palette(_named_objects(None), objects=True)

    def work(numbered: tuple[int, Sample]) -> Sample | Problem:
        number, sample = numbered
        assert isinstance(sample.label, ObjectMasks)
        try:
            merged = merge_objects(
                sample.label, sample.height, sample.width, cache / f"objects-{number:06d}.tif"
            )
        except TilenetError as error:
            return Problem(error.what, error.where)
        return replace(sample, label=merged.with_palette(palette))

    done = _parallel(work, list(enumerate(samples)))
    merged = [sample for sample in done if isinstance(sample, Sample)]
    return merged, [problem for problem in done if isinstance(problem, Problem)]


def _named_objects(names: Sequence[str] | None) -> tuple[ClassInfo, ...]:
    names = names or ("background", "foreground")
    if len(names) != 2:
        raise UsageError("objects make two classes", "--classes", "name background and object")
    return tuple(replace(c, name=n) for c, n in zip(default_classes(2), names, strict=True))


def _vector_classes(found: Found, config: TrainConfig) -> tuple[ClassInfo, ...]:
    if not found.class_names:
        return _named_objects(config.classes)
    names = config.classes or ("background", *found.class_names)
    return tuple(
        replace(c, name=n) for c, n in zip(default_classes(len(names)), names, strict=True)
    )


def check_data(config: TrainConfig, cache: Path) -> DataSet:
    """Find, open and check a data set; split it.

    Parameters
    ----------
    config : TrainConfig
        What and how.
    cache : Path
        Folder for what is made again at will.

    Raises
    ------
    BrokenDataError
        With one problem for every broken pair.
    InputError
        No layout is recognised, or nothing is left to train on.
    """
    found = find_samples(config)
    inspected = _parallel(_inspect, found.samples)
    bands, dtype, odd = _same_kind(inspected)
    problems = [*found.problems, *odd, *(p for _, _, several in inspected for p in several)]
    good = [s for s, image, several in inspected if image is not None and not several]
    lines: tuple[str, ...] = ()
    if good and isinstance(good[0].label, ObjectMasks):
        good, more = _merge(good, cache)
        classes, problems = _named_objects(config.classes), problems + more
        lines = (f'# one mask per object: "{classes[1].name}"',)
    elif good and isinstance(good[0].label, MaskFile):
        good, palette, more = _with_palette(good, config)
        classes, lines, problems = palette.classes, tuple(palette.lines()), problems + more
    else:
        classes = _vector_classes(found, config)
    if problems:
        raise BrokenDataError(problems, config.data)
    train, val, words = split_samples(good, config)
    return DataSet(found.layout, tuple(train), tuple(val), classes, lines, bands, dtype, words)


@dataclass
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
    cells : list of ndarray, shape (rows, cols, K)
        Per sample, class pixels per cell.
    cell_sides : list of int
        Per sample, a cell's side in pixels.
    """

    images: int
    pixels: int
    class_pixels: NDArray[np.int64]
    ignored: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    cells: list[NDArray[np.int64]] = field(default_factory=list)
    cell_sides: list[int] = field(default_factory=list)


@dataclass
class _Seen:
    cells: NDArray[np.int64]
    side: int
    ignored: int
    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]


def _cell_counts(
    classes: NDArray[np.uint8], row: int, side: int, counts: NDArray[np.int64]
) -> None:
    """Add the class pixels of a strip whose first row is `row` to the cells, in place."""
    for k in range(counts.shape[2]):
        rows, cols = np.nonzero(classes == k)
        index = (rows + row) // side * counts.shape[1] + cols // side
        flat = np.bincount(index, minlength=counts.shape[0] * counts.shape[1])
        counts[:, :, k] += flat.reshape(counts.shape[:2])


def _see(sample: Sample, classes: int) -> _Seen | Problem:
    extent = sample.extent
    side = max(_MIN_CELL, -(-max(extent.height, extent.width) // _MAX_CELLS))
    shape = (-(-extent.height // side), -(-extent.width // side), classes)
    try:
        image = open_image(sample.image)
        seen = _Seen(np.zeros(shape, np.int64), side, 0, 0, *np.zeros((2, image.bands)))
        for strip in strips(extent.height, extent.width):
            window = Window(extent.row + strip.row, extent.col, strip.height, strip.width)
            with strict_reading():
                pixels, valid = image.read(window)
            label = sample.label.read(window)[0]
            if valid is not None:
                label = np.where(valid, label, np.uint8(NODATA))
            flat = pixels.reshape(len(pixels), -1) if valid is None else pixels[:, valid]
            flat = flat.astype(np.float64)
            seen.count += flat.shape[1]
            seen.total += flat.sum(axis=1)
            seen.squares += (flat * flat).sum(axis=1)
            seen.ignored += int((label == NODATA).sum())
            _cell_counts(label, strip.row, side, seen.cells)
    except TilenetError as error:
        return Problem(error.what, error.where)
    return seen


def survey_part(samples: Sequence[Sample], classes: int, where: object) -> PartSurvey:
    """Read every pixel of a part once.

    Raises
    ------
    BrokenDataError
        Pixels that do not read.
    """
    done = _parallel(lambda sample: _see(sample, classes), samples)
    problems = [seen for seen in done if isinstance(seen, Problem)]
    if problems:
        raise BrokenDataError(problems, where)
    seen = [one for one in done if isinstance(one, _Seen)]
    count = max(1, sum(one.count for one in seen))
    mean = np.sum([one.total for one in seen], axis=0) / count
    square = np.sum([one.squares for one in seen], axis=0) / count
    return PartSurvey(
        images=len(seen),
        pixels=sum(s.extent.pixels for s in samples),
        class_pixels=np.sum([one.cells.sum(axis=(0, 1)) for one in seen], axis=0),
        ignored=sum(one.ignored for one in seen),
        mean=mean,
        std=np.sqrt(np.maximum(square - mean * mean, 0)),
        cells=[one.cells for one in seen],
        cell_sides=[one.side for one in seen],
    )
