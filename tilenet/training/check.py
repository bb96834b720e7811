"""Find a data set and check every pair of it before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from tilenet.classes import ClassInfo, default_classes
from tilenet.errors import TilenetError, UsageError
from tilenet.geometry import Georeference
from tilenet.ground import metres_per_unit
from tilenet.training.config import TrainConfig
from tilenet.training.images import OpenImage, open_image
from tilenet.training.labels import (
    MaskFile,
    ObjectMasks,
    colour_table,
    mask_size,
    merge_objects,
    read_keys,
)
from tilenet.training.layouts import find_samples
from tilenet.training.palette import Palette, key_name
from tilenet.training.parallel import in_parallel
from tilenet.training.samples import BrokenDataError, DataSet, Problem, Sample
from tilenet.training.values import Values, count_values, palette_for
from tilenet.training.vectors import Polygons

__all__ = ["check_data"]

_SAME_RESOLUTION = 0.01


@dataclass(frozen=True)
class _Inspected:
    """What opening a sample's image and mask has shown."""

    sample: Sample
    image: OpenImage | None = None
    problems: list[Problem] = field(default_factory=list)


def _inspect(sample: Sample) -> _Inspected:
    """Open an image and its mask; compare their sizes."""
    try:
        image = open_image(sample.image)
    except TilenetError as error:
        return _Inspected(sample, None, [Problem(error.what, error.where or sample.image.path)])
    problems = []
    label = sample.label
    try:
        # Polygons lie on any grid; one-object masks are compared when they are merged.
        if isinstance(label, MaskFile):
            height, width = mask_size(label.path, label.page)
            if (height, width) != (image.height, image.width):
                sizes = f"image {image.height}×{image.width}, mask {height}×{width}"
                problems.append(Problem(f"sizes differ: {sizes}", label.path))
    except TilenetError as error:
        problems.append(Problem(error.what, error.where))
    image.close()
    return _Inspected(replace(sample, height=image.height, width=image.width), image, problems)


def _same_kind(inspected: Sequence[_Inspected]) -> tuple[int, str, list[Problem]]:
    """Return the images' band count and dtype, and those that differ from most."""
    kinds = Counter((i.image.bands, i.image.dtype) for i in inspected if i.image is not None)
    if not kinds:
        return 0, "uint8", []
    bands, dtype = kinds.most_common(1)[0][0]
    problems = [
        Problem(
            f"{i.image.bands} bands of {i.image.dtype}, most have {bands} of {dtype}",
            i.sample.image.path,
        )
        for i in inspected
        if i.image is not None and (i.image.bands, i.image.dtype) != (bands, dtype)
    ]
    return bands, dtype, problems


def _pixel_size(place: Georeference) -> tuple[str, float] | None:
    """Return the key of a card and the side of a square pixel; None if unknown or not square."""
    if place.mpp is not None:
        key, (high, wide) = "mpp", place.mpp
    elif place.transform is not None and not place.is_rotated:
        key, (high, wide) = "ground_resolution", _on_the_ground(place)
    else:
        return None
    square = abs(high - wide) <= _SAME_RESOLUTION * wide
    return (key, float(f"{wide:.6g}")) if square else None


def _on_the_ground(place: Georeference) -> tuple[float, float]:
    """Return a pixel's height and width in metres, or in CRS units that are none."""
    assert place.ground_resolution is not None
    high, wide = place.ground_resolution
    metres = (place.crs_wkt and metres_per_unit(place.crs_wkt)) or 1.0
    return high * metres, wide * metres


def _resolution(inspected: Sequence[_Inspected]) -> dict[str, float]:
    """Return the resolution that all images share, as a card's key."""
    sizes = [
        # Only polygons make a name like 2018-05-12 a place on a map.
        _pixel_size(
            i.image.placed if isinstance(i.sample.label, Polygons) else i.image.georeference
        )
        for i in inspected
        if i.image is not None
    ]
    known = [size for size in sizes if size is not None]
    if not known or len(known) < len(sizes) or len({key for key, _ in known}) > 1:
        return {}
    values = [value for _, value in known]
    if max(values) - min(values) > _SAME_RESOLUTION * min(values):
        return {}
    return {known[0][0]: float(np.median(values))}


def _scan_mask(sample: Sample) -> Values | Problem:
    """Return what values a mask has."""
    label = sample.label
    assert isinstance(label, MaskFile)
    read = partial(read_keys, label.path, label.page)
    try:
        return count_values(read, sample.extent, colour_table(label.path, label.page))
    except TilenetError as error:
        return Problem(error.what, error.where)


def _with_palette(
    samples: list[Sample], config: TrainConfig
) -> tuple[list[Sample], Palette, list[Problem]]:
    """Find or read the palette of mask rasters and check every mask against it."""
    problems: list[Problem] = []
    found: dict[str, Values] = {}
    for sample, one in zip(samples, in_parallel(_scan_mask, samples), strict=True):
        if isinstance(one, Problem):
            problems.append(one)
        else:
            found[sample.name] = one
    palette, plain = palette_for(found, config.palette, config.classes)
    done = list[Sample]()
    for sample in samples:
        seen, label = found.get(sample.name), sample.label
        if seen is None or not isinstance(label, MaskFile):
            continue
        counts = seen.counts if plain else seen.in_colours()
        outside = palette.unknown(sorted(counts))
        if outside:
            names = ", ".join(key_name(key) for key in outside[:5])
            pixels = sum(counts[key] for key in outside)
            problems.append(Problem(f"{pixels} pixels of {names}: outside the classes", label.path))
        table = None if plain else seen.table
        done.append(replace(sample, label=label.with_palette(palette, table)))
    return done, palette, problems


def _merge(
    samples: list[Sample], classes: tuple[ClassInfo, ...], cache: Path
) -> tuple[list[Sample], list[Problem]]:
    """Merge the one-object masks of every sample into one raster each."""
    cache.mkdir(parents=True, exist_ok=True)
    palette = Palette(classes, objects=True)

    def work(numbered: tuple[int, Sample]) -> Sample | Problem:
        number, sample = numbered
        assert isinstance(sample.label, ObjectMasks)
        target = cache / f"objects-{number:06d}.tif"
        try:
            merged = merge_objects(sample.label, sample.height, sample.width, target)
        except TilenetError as error:
            return Problem(error.what, error.where)
        return replace(sample, label=merged.with_palette(palette))

    done = in_parallel(work, list(enumerate(samples)))
    merged = [sample for sample in done if isinstance(sample, Sample)]
    return merged, [problem for problem in done if isinstance(problem, Problem)]


def _object_classes(names: Sequence[str] | None) -> tuple[ClassInfo, ...]:
    names = names or ("background", "foreground")
    if len(names) != 2:
        raise UsageError("objects make two classes", "--classes", "name background and object")
    return tuple(replace(c, name=n) for c, n in zip(default_classes(2), names, strict=True))


def _vector_classes(found: tuple[str, ...], names: tuple[str, ...] | None) -> tuple[ClassInfo, ...]:
    if not found:
        return _object_classes(names)
    names = names or ("background", *found)
    pairs = zip(default_classes(len(names)), names, strict=True)
    return tuple(replace(c, name=n) for c, n in pairs)


def check_data(config: TrainConfig, cache: Path) -> DataSet:
    """Find, open and check a data set.

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
        No layout is recognised.
    UsageError
        The palette or the class names do not fit, or polygons need the extra.
    """
    found = find_samples(config)
    inspected = in_parallel(_inspect, found.samples)
    bands, dtype, odd = _same_kind(inspected)
    problems = [*found.problems, *odd, *(p for i in inspected for p in i.problems)]
    good = [i.sample for i in inspected if i.image is not None and not i.problems]
    lines: tuple[str, ...] = ()
    more: list[Problem] = []
    if good and isinstance(good[0].label, ObjectMasks):
        classes = _object_classes(config.classes)
        good, more = _merge(good, classes, cache)
        lines = (f'# one mask per object: "{classes[1].name}"',)
    elif good and isinstance(good[0].label, MaskFile):
        good, palette, more = _with_palette(good, config)
        classes, lines = palette.classes, tuple(palette.lines())
    else:
        classes = _vector_classes(found.class_names, config.classes)
    if problems or more:
        raise BrokenDataError([*problems, *more])
    samples = tuple(sorted(good, key=lambda sample: sample.name))
    resolution = _resolution(inspected)
    return DataSet(found.layout, samples, classes, lines, bands, dtype, resolution)
