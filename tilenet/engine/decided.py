"""Decided blocks: stored, counted, and recorded for the journal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.engine.block import Forwarded
from tilenet.engine.journal import UNREADABLE, BlockRecord, Invalid
from tilenet.engine.plan import block_levels
from tilenet.geometry import Window
from tilenet.lattice import Lattice
from tilenet.pyramid import halve
from tilenet.sinks import MaskStore, StoredChunk

__all__ = ["class_pixels", "files_of", "record_of", "unreadable", "write_block"]

_COUNTED = 1 << 16  # pixels at a time


def class_pixels(mask: NDArray[np.uint8], classes: int) -> dict[int, int]:
    """Return how many pixels each class has, and how many have no answer (255)."""
    total = np.zeros(256, np.int64)
    values = (*range(classes), NODATA) if classes <= 8 else ()
    step = max(64, _COUNTED // mask.shape[1])
    for start in range(0, mask.shape[0], step):  # what rows make stays in the cache
        rows = mask[start : start + step]
        for value in values:
            total[value] += np.count_nonzero(rows == value)
        if not values:
            total += np.bincount(rows.ravel(), minlength=256)
    return {value: int(total[value]) for value in (*range(classes), NODATA)}


def unreadable(windows: Iterable[Window], core: Window) -> tuple[tuple[Window, str], ...]:
    """Return what of a core lies in windows that cannot be read, as `Forwarded.failed`."""
    parts = (window.intersection(core) for window in windows)
    return tuple((part, UNREADABLE) for part in parts if part.pixels)


def files_of(stored: Iterable[StoredChunk]) -> tuple[tuple[str, str | None, int], ...]:
    """Return stored chunks as a journal keeps them."""
    return tuple((chunk.path, chunk.sha256, chunk.size) for chunk in stored)


def write_block(
    store: MaskStore,
    lattice: Lattice,
    block: int,
    mask: NDArray[np.uint8],
    probabilities: NDArray[np.uint8] | None,
) -> list[StoredChunk]:
    """Store a decided block: chunks, probabilities, and the pyramid levels it makes alone."""
    core = lattice.core(block)
    stored = store.write("mask", mask, core.row, core.col)
    if probabilities is not None:
        stored += store.write("prob", probabilities, core.row, core.col)
    level = mask
    for path, factor, *_ in store.spec.levels[1 : block_levels(lattice, store.spec) + 1]:
        level = halve(level)
        stored += store.write(path, level, core.row // factor, core.col // factor)
    return stored


def record_of(
    block: int, done: Forwarded, stored: Iterable[StoredChunk], classes: int
) -> BlockRecord:
    """Return the record of a block that is decided and stored.

    Parameters
    ----------
    block : int
        Its number.
    done : Forwarded
        Its pixels.
    stored : iterable of StoredChunk
        Its chunks; none for a mask in one file.
    classes : int
        How many classes there are.
    """
    digest = hashlib.sha256(np.ascontiguousarray(done.mask))
    if done.probabilities is not None:
        digest.update(np.ascontiguousarray(done.probabilities))
    return BlockRecord(
        block,
        files_of(stored),
        class_pixels(done.mask, classes),
        done.tiles_forwarded + done.tiles_skipped,
        done.tiles_skipped,
        digest.hexdigest(),
        tuple(Invalid(block, w.row, w.col, w.height, w.width, why) for w, why in done.failed),
    )
