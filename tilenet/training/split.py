"""Which samples are held out: by folder, by source image, or by spatial block; never by tile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tilenet.classes import NODATA
from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.training.config import TrainConfig
from tilenet.training.pieces import pieces
from tilenet.training.samples import Parts, Sample

__all__ = ["split_samples"]

_BLOCKS = 40
_FEW_IMAGES = 3


def _digest(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16)  # noqa: S324 - it only deals cards


def _by_hash(samples: Sequence[Sample], config: TrainConfig) -> set[str]:
    """Return the held-out names: one fold, or the nearest thing to it in a small set."""
    names = [s.name for s in samples]
    wanted = max(1, round(len(names) * config.val))
    chosen = {n for n in names if _digest(n) % config.folds == config.fold}
    if not 0.5 * wanted <= len(chosen) <= 1.5 * wanted or len(chosen) == len(names):
        order = sorted(names, key=_digest)
        start = config.fold * wanted % len(order)
        chosen = set((order + order)[start : start + wanted])
    return chosen


def _labelled(sample: Sample, window: Window) -> int:
    return sum(int((sample.label.read(p)[0] != NODATA).sum()) for p in pieces(window))


def _blocks(sample: Sample, tile: int) -> list[tuple[Sample, int]]:
    """Cut one raster into about forty blocks; return those with labels and how many pixels."""
    side = max(tile, round((sample.height * sample.width / _BLOCKS) ** 0.5))
    side = min(side, max(1, max(sample.height, sample.width) // 2))
    rows = np.linspace(0, sample.height, max(1, sample.height // side) + 1).round().astype(int)
    cols = np.linspace(0, sample.width, max(1, sample.width // side) + 1).round().astype(int)
    found = []
    for i in range(len(rows) - 1):
        for j in range(len(cols) - 1):
            window = Window.from_bounds(*map(int, (rows[i], cols[j], rows[i + 1], cols[j + 1])))
            pixels = _labelled(sample, window)
            if pixels:
                block = replace(sample, name=f"{sample.name}[{i},{j}]", window=window)
                found.append((block, pixels))
    return found


def _by_block(
    samples: Sequence[Sample], config: TrainConfig
) -> tuple[list[Sample], list[Sample], str]:
    blocks = [pair for sample in samples for pair in _blocks(sample, config.tile)]
    if len(blocks) < 2:
        raise InputError(
            "too small to hold a part out", samples[0].image.path, "use a smaller --tile"
        )
    blocks.sort(key=lambda pair: _digest(f"{config.fold}/{pair[0].name}"))
    wanted = config.val * sum(pixels for _, pixels in blocks)
    val: list[Sample] = []
    held = 0
    for block, pixels in blocks[:-1]:
        if held >= wanted:
            break
        val.append(block)
        held += pixels
    names = {s.name for s in val}
    train = [block for block, _ in blocks if block.name not in names]
    words = f"by spatial block: {len(val)} of {len(blocks)} blocks with labels are held out"
    return train, val, words


def split_samples(samples: Sequence[Sample], config: TrainConfig) -> Parts:
    """Split checked samples into a training and a validation part.

    Raises
    ------
    InputError
        A part would be empty.
    """
    how = config.split
    if how == "auto":
        both = {s.part for s in samples} >= {"train", "val"}
        how = "folder" if both else "image" if len(samples) >= _FEW_IMAGES else "block"
    if how == "folder":
        train = [s for s in samples if s.part != "val"]
        val = [s for s in samples if s.part == "val"]
        words = "by folder or table"
    elif how == "block":
        train, val, words = _by_block(samples, config)
    else:
        chosen = _by_hash(samples, config)
        train = [s for s in samples if s.name not in chosen]
        val = [s for s in samples if s.name in chosen]
        words = f"by source image: sha1 of the name, fold {config.fold} of {config.folds}"
    if not train or not val:
        raise InputError(
            f"{len(train)} images to train on and {len(val)} to validate on",
            config.data,
            "give more images, or --split block",
        )
    train, val = (sorted(part, key=lambda s: s.name) for part in (train, val))
    return Parts(tuple(train), tuple(val), words)
