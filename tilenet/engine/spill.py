"""Arrays that wait in files: a block's undecided half and the strips for its neighbours.

They are caches, not results: checksummed, not synced, and made again when lost or torn. Sums are
written and read a few rows at a time, so memory does not grow with the number of classes. A block
makes two files at the most, one for what is soon done with and one that waits for the blocks below:
on a shared disk, making and removing files costs more than filling them.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet import durable
from tilenet.lattice import Lattice

__all__ = ["RowsReader", "RowsWriter", "SpillReader", "SpillWriter", "name_for", "needed_by"]

_TAIL = struct.Struct("<II8s")  # length and CRC of the index before it; magic
_MAGIC = b"tnspill2"
_CHUNK = 1 << 18  # bytes at a time: they stay in a core's second-level cache from copy to file
_MOST_INDEX = 1 << 20

RowsIndex = tuple[slice, slice, slice]


def name_for(lattice: Lattice, giver: int, taker: int) -> str:
    """Return the name of the file in which a block leaves what another block, or itself, needs.

    Its own half and the strip to the right are joined soon, lower strips when the next row of
    blocks comes. Of the two files a forward completes the first last.
    """
    below = lattice.position(taker)[0] > lattice.position(giver)[0]
    return f"{giver}.strips" if below else f"{giver}.own"


def needed_by(lattice: Lattice, block: int) -> dict[str, list[int]]:
    """Return the names of a block's files, each with the blocks that need it."""
    found: dict[str, list[int]] = {}
    for taker in (block, *lattice.takers(block)):
        found.setdefault(name_for(lattice, block, taker), []).append(taker)
    return found


class SpillWriter:
    """A file of named arrays, those by rows first; a reader sees all of it or nothing.

    Parameters
    ----------
    path : Path
        The file; it appears on `close`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._temp = path, durable.temporary(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._temp, flags, 0o644)
        self._rows: dict[str, RowsWriter] = {}
        self._end = 0

    def rows(self, name: str, shape: tuple[int, int, int]) -> RowsWriter:
        """Make room for sums, (K, h, w) int32, that come by rows."""
        rows = self._rows[name] = RowsWriter(self._fd, self._end, shape)
        self._end += rows.size
        return rows

    def close(self, arrays: dict[str, NDArray[Any]]) -> int:
        """Add whole arrays, give the file its name, and return its size in bytes."""
        index = [(name, "<i4", *rows.complete()) for name, rows in self._rows.items()]
        for name, array in arrays.items():
            data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
            index.append((name, array.dtype.str, array.shape, self._end, zlib.crc32(data)))
            self._append(data)
        text = json.dumps(index).encode()
        self._append(text + _TAIL.pack(len(text), zlib.crc32(text), _MAGIC))
        self._shut()
        self._temp.replace(self._path)
        return self._end

    def _append(self, data: bytes | memoryview) -> None:
        _put(self._fd, data, self._end)
        self._end += len(data)

    def _shut(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def abandon(self) -> None:
        """Drop the file, unless it is closed."""
        if self._fd >= 0:
            self._shut()
        with contextlib.suppress(OSError):
            self._temp.unlink(missing_ok=True)


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _read(fd: int, size: int, offset: int) -> bytes:
    """Return bytes of a file; what cannot be read is as good as damaged, for it is made again."""
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise ValueError("cannot be read") from error


def _fill(fd: int, view: memoryview, offset: int) -> None:
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        data = _read(fd, len(part), offset + start)
        if len(data) < len(part):
            raise ValueError("cut short")
        part[:] = data


class RowsWriter:
    """Sums, (K, h, w) int32, that go to a file as their rows come, from the first to the last.

    It takes assignments as an array does, ``writer[:, rows, cols] = sums``; what is never assigned
    is 0. In the file rows come first, (h, K, w), so that some rows are one read.
    """

    def __init__(self, fd: int, offset: int, shape: tuple[int, int, int]) -> None:
        self._fd, self._offset, self._shape = fd, offset, shape
        self._row = self._crc = 0
        self.size = _bytes(shape)

    def __setitem__(self, where: RowsIndex, sums: NDArray[np.int32]) -> None:
        _, rows, cols = where
        assert rows.start >= self._row, "rows come in order"
        self._skip(rows.start)
        channels, _, width = self._shape
        step = max(1, _CHUNK // (4 * channels * width))
        whole = np.zeros((step, channels, width), np.int32)
        for start in range(0, sums.shape[1], step):
            part = sums[:, start : start + step]
            whole[: part.shape[1], :, cols] = part.transpose(1, 0, 2)
            self._put(whole[: part.shape[1]])

    def _skip(self, row: int) -> None:
        """Write zeros up to a row."""
        channels, _, width = self._shape
        self._put(np.zeros((row - self._row, channels, width), np.int32))

    def _put(self, rows: NDArray[np.int32]) -> None:
        if rows.size:
            data = memoryview(rows).cast("B")
            self._crc = zlib.crc32(data, self._crc)
            _put(self._fd, data, self._offset + rows[0].nbytes * self._row)
        self._row += len(rows)

    def complete(self) -> tuple[tuple[int, int, int], int, int]:
        """Write what is left as 0; return shape, place in the file and CRC."""
        self._skip(self._shape[1])
        return self._shape, self._offset, self._crc


class SpillReader:
    """The arrays of a file that `SpillWriter` wrote.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ValueError
        The file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError("missing") from error
        try:
            self._index = self._read_index()
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        end = os.fstat(self._fd).st_size - _TAIL.size
        tail = _read(self._fd, _TAIL.size, end) if end >= 0 else b""
        if not tail.endswith(_MAGIC):
            raise ValueError("no end")
        length, crc, _ = _TAIL.unpack(tail)
        if length > min(end, _MOST_INDEX):
            raise ValueError("damaged index")
        text = _read(self._fd, length, end - length)
        if zlib.crc32(text) != crc:
            raise ValueError("damaged index")
        return {
            name: (dtype, tuple(shape), *rest) for name, dtype, shape, *rest in json.loads(text)
        }

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a whole array, writable; None if there is none of that name.

        Raises
        ------
        ValueError
            It is damaged.
        """
        if name not in self._index:
            return None
        dtype, shape, offset, crc = self._index[name]
        array = np.empty(shape, dtype)
        data = memoryview(array).cast("B") if array.size else memoryview(b"")
        _fill(self._fd, data, offset)
        if zlib.crc32(data) != crc:
            raise ValueError("damaged")
        return array

    def rows(self, name: str, shape: tuple[int, int, int]) -> RowsReader:
        """Return sums to be read by rows, as long as this is open.

        Raises
        ------
        ValueError
            They are not there, of another shape, or damaged.
        """
        _, found, offset, crc = self._index.get(name, ("", (), 0, 0))
        if found != shape:
            raise ValueError("not there")
        rows = RowsReader(self._fd, offset, shape)
        if rows.crc() != crc:
            raise ValueError("damaged")
        return rows

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class RowsReader:
    """Sums in a file, read by rows: ``reader[:, a:b]`` is (K, b − a, w) int32."""

    def __init__(self, fd: int, offset: int, shape: tuple[int, int, int]) -> None:
        self._fd, self._offset, self.shape = fd, offset, shape
        self.size = _bytes(shape)

    def crc(self) -> int:
        """Return the CRC of all rows, as they are in the file."""
        crc = 0
        for start in range(0, self.size, _CHUNK):
            part = _read(self._fd, min(_CHUNK, self.size - start), self._offset + start)
            crc = zlib.crc32(part, crc)
        return crc

    def __getitem__(self, where: tuple[slice, slice]) -> NDArray[np.int32]:
        channels, height, width = self.shape
        start, stop, _ = where[1].indices(height)
        row_bytes = 4 * channels * width
        data = os.pread(self._fd, (stop - start) * row_bytes, self._offset + start * row_bytes)
        return np.frombuffer(data, "<i4").reshape(stop - start, channels, width).transpose(1, 0, 2)


def _bytes(shape: tuple[int, int, int]) -> int:
    return 4 * int(np.prod(shape, dtype=np.int64))
