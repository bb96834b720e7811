"""Whether a GeoTIFF holds its directories and tiles and nothing else.

GDAL can swallow one failed write and write the same things again elsewhere: the file reads back
right, but it is not the file that an undisturbed run writes. What was abandoned shows as a gap.
Source: TIFF 6.0 and BigTIFF; of GDAL's COG, the header's "ghost" text, and that tiles have a leader
and a trailer of 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["has_gaps"]

_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
"""Size of a value of each field type."""
_INTEGERS = {3: "H", 4: "I", 16: "Q"}
_TILE_OFFSETS, _TILE_SIZES = 324, 325
_ALIGNMENT = 8  # directories begin at a multiple of it, at the most
_LEADER = _TRAILER = 4
_GHOST = b"GDAL_STRUCTURAL_METADATA_SIZE="

Part = tuple[int, int]
"""First and one-past-last byte."""


def has_gaps(path: Path) -> bool:
    """Return whether a little-endian COG of GDAL's has bytes that belong to nothing.

    Parameters
    ----------
    path : Path
        The file.
    """
    with path.open("rb") as file:
        end = 0
        for first, stop in sorted(_parts(file)):
            if first - end >= _ALIGNMENT:
                return True
            end = max(end, stop)
        return end != path.stat().st_size


def _parts(file: BinaryIO) -> Iterator[Part]:
    head = file.read(16)
    assert head[:2] == b"II", "GDAL writes in the machine's order, which is this"
    big = head[2] == 43
    size = 16 if big else 8
    (offset,) = struct.unpack_from("<Q" if big else "<I", head, 8 if big else 4)
    yield 0, size
    file.seek(size)
    ghost = file.read(43)
    if ghost.startswith(_GHOST):
        yield size, size + len(ghost) + int(ghost[len(_GHOST) : len(_GHOST) + 6])
    while offset:
        offset = yield from _directory(file, offset, big=big)


def _directory(file: BinaryIO, offset: int, *, big: bool) -> Generator[Part, None, int]:
    """Yield the parts of one directory; returns where the next one is, or 0."""
    count_format, entry_format, word = ("<Q", "<HHQ", "<Q") if big else ("<H", "<HHI", "<I")
    inline = struct.calcsize(word)
    file.seek(offset)
    (count,) = struct.unpack(count_format, file.read(struct.calcsize(count_format)))
    length = struct.calcsize(entry_format) + inline
    entries = file.read(count * length)
    (following,) = struct.unpack(word, file.read(inline))
    yield offset, file.tell()
    tiles: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(entries), length):
        tag, kind, number = struct.unpack_from(entry_format, entries, start)
        data, size = entries[start + length - inline : start + length], _BYTES[kind] * number
        if size > inline:
            (place,) = struct.unpack(word, data)
            yield place, place + size
            if tag in (_TILE_OFFSETS, _TILE_SIZES):
                file.seek(place)
                data = file.read(size)
        if tag in (_TILE_OFFSETS, _TILE_SIZES):
            tiles[tag] = struct.unpack_from(f"<{number}{_INTEGERS[kind]}", data)
    for first, size in zip(tiles.get(_TILE_OFFSETS, ()), tiles.get(_TILE_SIZES, ()), strict=True):
        if size:
            yield first - _LEADER, first + size + _TRAILER
    return int(following)
