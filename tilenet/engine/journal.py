"""The journal: which blocks are on disk. Append-only lines, each with its own checksum.

A line is ``crc32␠json``. A block counts as done only if its line is whole; what follows the first
damaged line is ignored, so a torn tail costs one block's work and never a wrong pixel.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tilenet import durable

__all__ = [
    "KILLS",
    "NEIGHBOUR",
    "UNREADABLE",
    "UPPER",
    "BlockRecord",
    "Invalid",
    "Journal",
    "Tally",
    "as_plain",
    "decode",
    "drop",
    "encode",
    "from_plain",
    "records_of",
]

UPPER = -1
"""The number under which the upper pyramid levels stand, which no block makes alone."""

UNREADABLE = "the source cannot be read here"
KILLS = "every worker that took this block died"
NEIGHBOUR = "the block beside it has no answer"


@dataclass(frozen=True, slots=True)
class Invalid:
    """Pixels that have no answer (255) because something failed there.

    Parameters
    ----------
    block : int
        The block.
    row, col, height, width : int
        Where.
    why : str
        What failed.
    """

    block: int
    row: int
    col: int
    height: int
    width: int
    why: str


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One finished block.

    Parameters
    ----------
    block : int
        Its number, or `UPPER`.
    files : tuple of (str, str or None, int)
        Path in the store, sha256 (None: a chunk of fill values, not stored), stored bytes.
    pixels : dict of int to int
        Pixels of each class and of 255 at full resolution.
    tiles, tiles_skipped : int
        Tiles that the block owns, and those without kept pixels.
    sha256 : str
        Of the block's pixels, rows first, and of its probabilities behind them; "" for −1.
    invalid : tuple of Invalid
        What failed in it.
    """

    block: int
    files: tuple[tuple[str, str | None, int], ...]
    pixels: dict[int, int]
    tiles: int
    tiles_skipped: int
    sha256: str = ""
    invalid: tuple[Invalid, ...] = ()


def encode(record: BlockRecord) -> bytes:
    """Return a record as one line."""
    body = json.dumps(as_plain(record), separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def as_plain(record: BlockRecord) -> dict[str, Any]:
    """Return a record as plain JSON values; `from_plain` is the inverse."""
    return asdict(record)


def from_plain(keys: Mapping[str, Any]) -> BlockRecord:
    """Return the record that `as_plain` wrote, after a round trip through JSON."""
    return BlockRecord(**{
        **keys,
        "files": tuple((p, h, s) for p, h, s in keys["files"]),
        "pixels": {int(k): v for k, v in keys["pixels"].items()},
        "invalid": tuple(Invalid(**one) for one in keys.get("invalid", ())),
    })  # fmt: skip


def _whole_records(lines: Iterable[bytes]) -> Iterator[tuple[BlockRecord, int]]:
    """Yield the whole records at the head of a journal, and how many bytes each takes."""
    for line in lines:
        crc, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(body):
            return
        yield from_plain(json.loads(body)), len(line)


def decode(text: bytes) -> tuple[list[BlockRecord], int]:
    """Return the whole records at the head of a journal and how many bytes they take."""
    found = list(_whole_records(text.splitlines(keepends=True)))
    return [record for record, _ in found], sum(length for _, length in found)


def records_of(paths: Iterable[Path]) -> Iterator[BlockRecord]:
    """Yield what journals list; somebody may be appending to them."""
    for path in paths:
        with path.open("rb") as file:
            for record, _ in _whole_records(file):
                yield record


def drop(path: Path, gone: Callable[[BlockRecord], bool]) -> int:
    """Take records out of a journal to which nobody appends; return how many."""
    dropped = sum(map(gone, records_of([path])))
    if dropped:
        durable.write(path, b"".join(encode(r) for r in records_of([path]) if not gone(r)))
    return dropped


class Tally:
    """What finished blocks add up to.

    Attributes
    ----------
    blocks : set of int
        The finished blocks; −1 for the upper pyramid levels.
    pixels : Counter
        Pixels of each class and of 255.
    tiles, tiles_skipped : int
        Totals over the finished blocks.
    invalid : list of Invalid
        What failed in them.
    """

    def __init__(self, records: Iterable[BlockRecord] = ()) -> None:
        self.blocks: set[int] = set()
        self.pixels: Counter[int] = Counter()
        self.tiles = self.tiles_skipped = 0
        self.invalid: list[Invalid] = []
        for record in records:
            self.count(record)

    def count(self, record: BlockRecord) -> bool:
        """Count a block, once; return whether it is new."""
        if record.block in self.blocks:  # two owners of one run folder: see `runfolder.Owner`
            return False
        self.blocks.add(record.block)
        self.pixels.update(record.pixels)
        self.tiles += record.tiles
        self.tiles_skipped += record.tiles_skipped
        self.invalid += record.invalid
        return True


class Journal(Tally):
    """A journal file that is open for appending. Keeps totals and places, not records.

    Parameters
    ----------
    path : Path
        Made if it is not there; a torn tail is cut off.
    before : callable
        Called before anything is appended; raises if this is no longer ours to write.
    after : callable
        Called with the records that were appended.
    """

    def __init__(
        self,
        path: Path,
        before: Callable[[], None] = lambda: None,
        after: Callable[[Iterable[BlockRecord]], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0
        try:
            self._take_up(path)
        except BaseException:  # nobody has it yet who could close it
            os.close(self._fd)
            raise

    def _take_up(self, path: Path) -> None:
        with path.open("rb") as file:
            for record, length in _whole_records(file):
                self._note(record, length)
        if self._end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._end)
        durable.sync_directory(path.parent)

    def _note(self, record: BlockRecord, length: int) -> None:
        start, self._end = self._end, self._end + length
        if self.count(record):
            self._places[record.block] = (start, length)

    def append(self, records: Iterable[BlockRecord]) -> None:
        """Make records durable, in one write and one sync."""
        new = {r.block: r for r in records if r.block not in self.blocks}
        lines = {block: encode(record) for block, record in new.items()}
        if lines:
            self._before()
            durable.append(self._fd, b"".join(lines.values()))
            for block, line in lines.items():
                self._note(new[block], len(line))
            self._after(new.values())

    def _lines(self) -> Iterator[bytes]:
        for block in sorted(self._places):
            start, length = self._places[block]
            yield os.pread(self._fd, length, start)

    def records(self) -> Iterator[BlockRecord]:
        """Yield all records in block order."""
        for record, _ in _whole_records(self._lines()):
            yield record

    def dump(self) -> bytes:
        """Return all records in block order, the same bytes for any order of work."""
        return b"".join(self._lines())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
