"""What values masks have, and the palette that makes classes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.geometry import Window
from tilenet.training.palette import Palette, are_indices, find_palette, in_colours, read_palette
from tilenet.training.pieces import pieces

__all__ = ["Values", "are_numbers", "count_values", "palette_for"]


@dataclass(frozen=True)
class Values:
    """What a mask holds.

    Parameters
    ----------
    counts : Counter
        Pixels of each value.
    table : ndarray, shape (n,), or None
        The keys of the colours that the values are indices of.
    """

    counts: Counter[int]
    table: NDArray[np.int64] | None

    def in_colours(self) -> Counter[int]:
        """Return the pixels of each colour; of each value, where these are no indices."""
        if self.table is None:
            return self.counts
        found = Counter[int]()
        keys = in_colours(np.array(list(self.counts), np.int64), self.table)
        for key, pixels in zip(keys.tolist(), self.counts.values(), strict=True):
            found[key] += pixels
        return found


def count_values(
    read: Callable[[Window], NDArray[np.int64]], extent: Window, table: NDArray[np.int64] | None
) -> Values:
    """Return what an extent of a mask holds.

    Parameters
    ----------
    read : callable
        From a window to values, (h, w).
    extent : Window
        Where.
    table : ndarray, shape (n,), or None
        The keys of the colours that the values are indices of.
    """
    counts: Counter[int] = Counter()
    for piece in pieces(extent):
        values, pixels = np.unique(read(piece), return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    return Values(counts, table)


def are_numbers(found: Mapping[str, Values]) -> bool:
    """Return whether values count as they are, colour tables or not."""
    tables = {name: one.table for name, one in found.items()}
    if all(table is None for table in tables.values()):
        return True
    return are_indices({name: one.counts for name, one in found.items()}, tables)


def palette_for(
    found: Mapping[str, Values], file: Path | None, names: Sequence[str] | None
) -> tuple[Palette, bool]:
    """Read or find the palette of masks.

    Parameters
    ----------
    found : mapping of str to Values
        By name.
    file : Path or None
        The palette, if it is given.
    names : sequence of str or None
        Of the classes, if they are given.

    Returns
    -------
    palette : Palette
    plain : bool
        Whether it is for the values, and not for the colours that they are indices of.

    Raises
    ------
    InputError
        No reading makes sense.
    UsageError
        The file does not read, or the names do not fit.
    """
    values = {name: one.counts for name, one in found.items()}
    if file is not None:
        palette = read_palette(file, names)
        present = set().union(*values.values()) - {NODATA}
        return palette, not palette.unknown(sorted(present))
    if not are_numbers(found):
        return find_palette({n: one.in_colours() for n, one in found.items()}, names), False
    palette = find_palette(values or {"": Counter([0])}, names)
    table = next((one.table for one in found.values() if one.table is not None), None)
    return palette if table is None else palette.coloured(table), True
