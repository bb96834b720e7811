"""Which value or colour of a mask is which class: found, printed, or read from a file."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA, ClassInfo, default_classes
from tilenet.errors import InputError, UsageError

__all__ = [
    "COLOUR",
    "Palette",
    "are_indices",
    "find_palette",
    "in_colours",
    "key_name",
    "read_palette",
    "to_keys",
]

COLOUR = 1 << 24
"""Added to a colour's 24 bits, so that colours and grey values are keys of one kind."""

_MANY = 64
_LOW = 32  # numbers of classes are lower, grey values of several classes are not all
_FEW_VALUES = 8
_MIDDLE = 128
_MAX_CLASSES = 254
_FEW_FILES = 3


def to_keys(pixels: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return a key per pixel: the grey value, or `COLOUR` + rgb where the bands differ.

    Parameters
    ----------
    pixels : ndarray, shape (C, H, W)
        One band, or red, green and blue.
    """
    if len(pixels) < 3:
        return np.asarray(pixels[0]).astype(np.int64)
    red, green, blue = (np.asarray(band).astype(np.int64) for band in pixels[:3])
    grey = (red == green) & (green == blue)
    return np.where(grey, red, COLOUR + (red << 16) + (green << 8) + blue)


def in_colours(keys: NDArray[np.int64], table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the keys of the colours of indices; what is nodata (`NODATA`) stays so."""
    inside = (keys >= 0) & (keys < len(table))
    found = np.where(inside, table[np.where(inside, keys, 0)], keys)
    return np.where(keys == NODATA, NODATA, found)


def key_name(key: int) -> str:
    """Return a key as a palette file writes it: a number or "#rrggbb"."""
    return f"#{key - COLOUR:06x}" if key >= COLOUR else str(key)


def _rgb(key: int) -> tuple[int, int, int]:
    value = key - COLOUR
    return (key, key, key) if value < 0 else (value >> 16, (value >> 8) & 255, value & 255)


def _key(text: str) -> int:
    if text.startswith("#"):
        value = int(text[1:], 16)
        red, green, blue = value >> 16, (value >> 8) & 255, value & 255
        return red if red == green == blue else COLOUR + value
    return int(text)


@dataclass(frozen=True)
class Palette:
    """How mask values become classes.

    Parameters
    ----------
    classes : tuple of ClassInfo
        In order of their ids.
    table : tuple of (int, int)
        Key and class, sorted by key; `NODATA` is "ignore".
    threshold : int or None
        Where class 1 begins in a grey mask of many values; the table is unused then.
    objects : bool
        Whether the values number separate objects: class 1 is everything above 0.
    """

    classes: tuple[ClassInfo, ...]
    table: tuple[tuple[int, int], ...] = ()
    threshold: int | None = None
    objects: bool = False

    def apply(self, keys: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the class of every key; `NODATA` also for keys that the table lacks."""
        if self.objects:
            return (keys > 0).astype(np.uint8)
        if self.threshold is not None:
            return (keys >= self.threshold).astype(np.uint8)
        known = np.array([key for key, _ in self.table], np.int64)
        classes = np.array([index for _, index in self.table], np.uint8)
        place = np.searchsorted(known, keys).clip(0, len(known) - 1)
        return np.where(known[place] == keys, classes[place], NODATA).astype(np.uint8)

    def lines(self) -> list[str]:
        """Return the palette as the lines of a palette file."""
        if self.objects:
            return [f'# values number objects: above 0 is "{self.classes[1].name}"']
        if self.threshold is not None:
            return [f'# grey from {self.threshold} is "{self.classes[1].name}"']
        names = {c.id: c.name for c in self.classes} | {NODATA: "ignore"}
        order = sorted(self.table, key=lambda entry: (entry[1], entry[0]))
        return [f'"{key_name(key)}" = "{names[index]}"' for key, index in order]

    def coloured(self, table: NDArray[np.int64]) -> Palette:
        """Return it with the colours that a table, (n,), has for its keys."""
        keys = {index: key for key, index in reversed(self.table) if key < len(table)}
        classes = (
            replace(c, color=_rgb(int(table[keys[c.id]]))) if c.id in keys else c
            for c in self.classes
        )
        return replace(self, classes=tuple(classes))

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """Return the keys that are outside the classes."""
        if self.objects or self.threshold is not None:
            return []
        known = {key for key, _ in self.table}
        return [key for key in keys if key not in known]


def _named(
    names: Sequence[str] | None, count: int, keys: Sequence[int] = ()
) -> tuple[ClassInfo, ...]:
    if names is not None and len(names) != count:
        raise UsageError(
            f"{len(names)} class names, but the labels have {count} classes",
            "--classes",
            "name them all, or map mask values in a --palette file",
        )
    found = []
    for default in default_classes(count):
        key = keys[default.id] if keys else -1
        color = _rgb(key) if key >= COLOUR else default.color
        name = names[default.id] if names else default.name
        if names is None and count == 2:
            name = ("background", "foreground")[default.id]
        found.append(ClassInfo(default.id, name, color))
    return tuple(found)


def read_palette(path: Path, names: Sequence[str] | None) -> Palette:
    """Read a palette file: TOML or JSON, ``"#ff7850" = "road"`` or ``0 = "ignore"``.

    Raises
    ------
    UsageError
        The file does not read, or names no class.
    """
    try:
        text = path.read_text()
        loads = json.loads if path.suffix.lower() == ".json" else tomllib.loads
        entries = [(_key(str(key)), str(name)) for key, name in loads(text).items()]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the palette does not read: {error}", path, 'lines like "#ff7850" = "road"'
        ) from error
    order = list(dict.fromkeys(n for _, n in entries if n != "ignore"))
    if names is not None:
        if sorted(names) != sorted(order):
            raise UsageError(
                "--classes and the palette name different classes", path, "correct one"
            )
        order = list(names)
    if not order:
        raise UsageError("the palette names no class", path, 'lines like "#ff7850" = "road"')
    first = {name: key for key, name in reversed(entries)}
    table = tuple(sorted((k, NODATA if n == "ignore" else order.index(n)) for k, n in entries))
    return Palette(_named(order, len(order), [first[n] for n in order]), table)


def _from_many(counts: Counter[int], names: Sequence[str] | None) -> Palette:
    """Judge masks of many values: numbered objects, or grey levels around two."""
    if any(key >= COLOUR for key in counts):
        raise InputError(
            f"the masks hold {len(counts)} colours", "masks",
            "store them without loss, or map the colours in a --palette file",
        )  # fmt: skip
    # Blurred white stays mostly near white; of up to 255 numbered objects, few have high numbers.
    bright = sum(n for key, n in counts.items() if key >= 192)
    if max(counts) <= 255 and bright and 2 * bright >= sum(counts[k] for k in counts if k >= 32):
        return Palette(_named(names, 2), threshold=_MIDDLE)
    return Palette(_named(names, 2), objects=True)


def _is_blurred(counts: Counter[int]) -> bool:
    """Return whether nearly all pixels are near black or white, as a JPEG leaves them.

    It leaves some that are nearly white: 255 beside small numbers is "ignore" beside classes.
    """
    near_white = any(240 <= key < NODATA for key in counts)
    ends = sum(n for key, n in counts.items() if key < 16 or 240 <= key <= NODATA)
    return near_white and len(counts) > _FEW_VALUES and ends >= 0.9 * counts.total()


def are_indices(
    per_file: Mapping[str, Counter[int]], tables: Mapping[str, NDArray[np.int64] | None]
) -> bool:
    """Return whether values with colour tables number the classes, whatever their colours.

    They do where an index has one colour in all files; of 0 and 1 alone, 0 must be the darker one:
    programs that save two colours number them as they come.

    Parameters
    ----------
    per_file : mapping of str to Counter
        Pixels per value, per mask file.
    tables : mapping of str to ndarray, shape (n,), or None
        The keys of the files' colours.
    """
    colours: dict[int, set[int]] = {}
    for name, counts in per_file.items():
        table = tables[name]
        if table is None:
            return False
        for index in counts:
            if index != NODATA:
                colour = int(table[index]) if 0 <= index < len(table) else index
                colours.setdefault(index, set()).add(colour)
    if any(len(found) > 1 for found in colours.values()):
        return False
    bright = [sum(_rgb(min(colours[index]))) for index in sorted(colours)]
    return sorted(colours) != [0, 1] or bright[0] <= bright[1]


def _have_gaps(keys: Sequence[int]) -> bool:
    """Return whether values look like numbers of classes of which some are not there."""
    return len(keys) > 1 and keys[-1] < _LOW and keys != list(range(len(keys)))


def _few(
    per_file: dict[str, set[int]], counts: Counter[int], names: Sequence[str] | None
) -> list[int]:
    """Return the keys that are classes, in order; the others are outside."""
    keys = sorted(counts, key=lambda key: (key >= COLOUR, key))
    files = Counter(key for found in per_file.values() for key in found)
    plain = [key for key in keys if key != NODATA]
    contiguous = plain == list(range(len(plain)))
    if names is not None and len(plain if contiguous else keys) > len(names):
        if contiguous or keys[: len(names)] == list(range(len(names))):
            return keys[: len(names)]
        common = sorted(keys, key=lambda key: (-files[key], -counts[key]))[: len(names)]
        return [key for key in keys if key in common]
    ignoring = len(plain) > 2 or any({1, NODATA} <= found for found in per_file.values())
    if names is not None and len(plain) > 1 and plain[-1] < len(names):
        return list(range(len(names)))
    if contiguous and (NODATA not in keys or ignoring):
        return plain
    # A value that hardly any mask has, in a set whose values are not 0, 1, 2 …, is a mistake.
    least = max(2, 0.1 * len(per_file)) if len(per_file) >= _FEW_FILES else 1
    usual = [key for key in keys if files[key] >= least]
    plain = [key for key in usual if key != NODATA]
    return plain if _have_gaps(plain) else usual


def find_palette(per_file: dict[str, Counter[int]], names: Sequence[str] | None) -> Palette:
    """Find which values are which classes.

    Values 0, 1, 2 … are the classes themselves, with 255 as "ignore"; two values of any kind are
    background and foreground; colours become classes in order, black first; many values are grey
    levels around two, or numbered objects.

    Parameters
    ----------
    per_file : dict of str to Counter
        Pixels per key, per mask file.
    names : sequence of str or None
        Class names, if given.

    Raises
    ------
    InputError
        No reading makes sense.
    """
    counts: Counter[int] = sum(per_file.values(), Counter())
    if len(counts) > _MANY or _is_blurred(counts):
        return _from_many(counts, names)
    keys = _few({name: set(found) for name, found in per_file.items()}, counts, names)
    if keys == [NODATA] or not keys:
        keys = [0, *keys]
    if len(keys) == 1:
        keys = [0, 1] if keys[0] in (0, 1) else [0, keys[0]]
    if len(keys) > _MAX_CLASSES:
        raise InputError(f"{len(keys)} values in the masks", "masks", "map them with --palette")
    table = {key: index for index, key in enumerate(keys)}
    contiguous = keys == list(range(len(keys)))
    if (contiguous or _have_gaps(keys)) and NODATA not in table and NODATA in counts:
        table[NODATA] = NODATA
    if names is not None and contiguous and len(names) > len(keys):
        keys = list(range(len(names)))
        table |= {key: key for key in keys}
    return Palette(_named(names, len(keys), keys), tuple(sorted(table.items())))
