"""TIFF files by hand: any tag, type, count and offset, right or wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTE, ASCII, SHORT, LONG, RATIONAL, SBYTE, SSHORT, SLONG = 1, 2, 3, 4, 5, 6, 8, 9
FLOAT, DOUBLE, IFD, LONG8 = 11, 12, 13, 16
_CODES = {
    BYTE: "B", SHORT: "H", LONG: "I", SBYTE: "b", SSHORT: "h", SLONG: "i", FLOAT: "f",
    DOUBLE: "d", IFD: "I", LONG8: "Q",
}  # fmt: skip
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
OFFSETS, SAMPLES, ROWS, COUNTS, PLANAR = 273, 277, 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
PREDICTOR, COLORMAP, SUBIFDS, EXTRA, FORMAT, MINMAX = 317, 320, 330, 338, 339, 341
SCALE, TIEPOINT, MATRIX, GEOKEYS, GEOASCII = 33550, 33922, 34264, 34735, 34737
METADATA, NODATA, RPC = 42112, 42113, 50844

Values = Sequence[Any] | bytes | str


@dataclass(frozen=True)
class Tag:
    """One entry of a directory.

    Parameters
    ----------
    kind : int
        Type code; any number.
    values : sequence, bytes or str
        Packed by the type, or as they are.
    count : int, optional
        What the entry says instead of the true count.
    """

    kind: int
    values: Values
    count: int | None = None

    def packed(self, order: str) -> bytes:
        """Return the values' bytes."""
        if isinstance(self.values, bytes):
            return self.values
        if isinstance(self.values, str):
            return self.values.encode() + b"\0"
        return struct.pack(f"{order}{len(self.values)}{_CODES[self.kind]}", *self.values)


def short(*values: int) -> Tag:
    return Tag(SHORT, values)


def long(*values: int) -> Tag:
    return Tag(LONG, values)


def double(*values: float) -> Tag:
    return Tag(DOUBLE, values)


def text(value: str) -> Tag:
    return Tag(ASCII, value)


def geokeys(*keys: tuple[int, int]) -> Tag:
    """Return a GeoKeyDirectory of keys with short values."""
    return short(1, 1, 0, len(keys), *(v for key, value in keys for v in (key, 0, 1, value)))


def strips(width: int = 50, height: int = 40, bands: int = 3, bits: int = 8) -> dict[int, Tag]:
    """Return the tags of a plain picture in one strip."""
    return {
        WIDTH: long(width), HEIGHT: long(height), BITS: short(*[bits] * bands),
        COMPRESSION: short(1), PHOTOMETRIC: short(2 if bands == 3 else 1),
        SAMPLES: short(bands), ROWS: long(height), PLANAR: short(1),
    }  # fmt: skip


def tiles(width: int = 50, height: int = 40, side: int = 32, bands: int = 3) -> dict[int, Tag]:
    """Return the tags of a plain picture in tiles."""
    tags = strips(width, height, bands)
    del tags[ROWS]
    return tags | {TILE_WIDTH: short(side), TILE_HEIGHT: short(side)}


def write(
    tags: Mapping[int, Tag | None],
    chunks: Sequence[bytes] = (),
    *,
    big: bool = False,
    order: str = "<",
    follow: Callable[[int], int] = lambda end: 0,
    tail: bytes = b"",
) -> bytes:
    """Return a file of one directory: header, entries, values, chunks.

    Parameters
    ----------
    tags : mapping of int to Tag
        Without offsets and counts of chunks these are filled in; None leaves a tag out.
    chunks : sequence of bytes
        Strips or tiles as stored.
    big : bool
        BigTIFF.
    order : {"<", ">"}
        Byte order.
    follow : callable
        From the file's end to the next directory's offset.
    tail : bytes
        What comes after.
    """
    wide = LONG8 if big else LONG
    pair = (TILE_OFFSETS, TILE_COUNTS) if TILE_WIDTH in tags else (OFFSETS, COUNTS)
    filled = {pair[0]: Tag(wide, [0] * len(chunks)), pair[1]: Tag(wide, [len(c) for c in chunks])}
    own = pair[0] not in tags
    known = {k: t for k, t in sorted((filled | dict(tags)).items()) if t is not None}
    sizes = (16, 8, 20, 8) if big else (8, 2, 12, 4)
    head, number, entry, inline = sizes
    start = head + number + entry * len(known) + inline
    values = sum(len(t.packed(order)) for t in known.values() if len(t.packed(order)) > inline)
    if own and chunks:
        places = [start + values + sum(map(len, chunks[:k])) for k in range(len(chunks))]
        known[pair[0]] = Tag(wide, places)
    end = start + values + sum(map(len, chunks))
    n, c, o = ("Q", "Q", "Q") if big else ("H", "I", "I")
    out = b"II" if order == "<" else b"MM"
    out += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    out += struct.pack(order + n, len(known))
    heap = b""
    for code, tag in known.items():
        data = tag.packed(order)
        unit = {ASCII: 1, 7: 1, RATIONAL: 8}.get(tag.kind) or struct.calcsize(
            "<" + _CODES.get(tag.kind, "B")
        )
        count = len(data) // unit if tag.count is None else tag.count
        out += struct.pack(f"{order}HH{c}", code, tag.kind, count)
        if len(data) <= inline:
            out += data.ljust(inline, b"\0")
        else:
            out += struct.pack(order + o, start + len(heap))
            heap += data
    out += struct.pack(order + o, follow(end))
    return out + heap + b"".join(chunks) + tail
