"""The journal: which blocks are on disk. Append-only lines, each with its own checksum.

A line is ``crc32␠json``. A block counts as done only if its line is whole; what follows the first
damaged line is ignored, so a torn tail costs one block's work and never a wrong pixel.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, KeysView
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tilenet import durable

__all__ = ["BlockRecord", "Journal", "decode", "encode"]


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One finished block.

    Parameters
    ----------
    block : int
        Its number; −1 for the upper pyramid levels.
    files : tuple of (str, str or None, int)
        Path in the store, sha256 (None: a chunk of fill values, not stored), stored bytes.
    pixels : dict of int to int
        Pixels of each class and of 255 at full resolution.
    tiles, tiles_skipped : int
        Tiles that the block owns, and those without kept pixels.
    """

    block: int
    files: tuple[tuple[str, str | None, int], ...]
    pixels: dict[int, int]
    tiles: int
    tiles_skipped: int


def encode(record: BlockRecord) -> bytes:
    """Return a record as one line."""
    body = json.dumps(asdict(record), separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(text: bytes) -> tuple[list[BlockRecord], int]:
    """Return the whole records at the head of a journal and how many bytes they take."""
    records: list[BlockRecord] = []
    good = 0
    for line in text.splitlines(keepends=True):
        crc, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(body):
            break
        keys = json.loads(body)
        keys["files"] = tuple((p, h, s) for p, h, s in keys["files"])
        keys["pixels"] = {int(k): v for k, v in keys["pixels"].items()}
        records.append(BlockRecord(**keys))
        good += len(line)
    return records, good


class Journal:
    """A journal file that is open for appending. Keeps totals and places, not records.

    Parameters
    ----------
    path : Path
        Made if it is not there; a torn tail is cut off.

    Attributes
    ----------
    pixels : Counter
        Pixels of each class and of 255.
    tiles, tiles_skipped : int
        Totals over the finished blocks.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0
        self.pixels: Counter[int] = Counter()
        self.tiles = self.tiles_skipped = 0
        records, good = decode(path.read_bytes())
        if good < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, good)
        durable.sync_directory(path.parent)
        for record in records:
            self._note(record, len(encode(record)))

    def _note(self, record: BlockRecord, length: int) -> None:
        self._places[record.block] = (self._end, length)
        self._end += length
        self.pixels.update(record.pixels)
        self.tiles += record.tiles
        self.tiles_skipped += record.tiles_skipped

    @property
    def blocks(self) -> KeysView[int]:
        """The finished blocks."""
        return self._places.keys()

    def append(self, records: Iterable[BlockRecord]) -> None:
        """Make records durable, in one write and one sync."""
        new = {r.block: r for r in records if r.block not in self._places}
        lines = {block: encode(record) for block, record in new.items()}
        if lines:
            durable.append(self._fd, b"".join(lines.values()))
            for block, line in lines.items():
                self._note(new[block], len(line))

    def dump(self) -> bytes:
        """Return all records in block order, the same bytes for any order of work."""
        places = (self._places[block] for block in sorted(self._places))
        return b"".join(os.pread(self._fd, length, start) for start, length in places)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
