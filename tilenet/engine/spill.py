"""Arrays that wait in files: a block's undecided half and the strips for its neighbours.

They are caches, not results: checksummed, not synced, and made again when lost or torn. Sums are
written and read a few rows at a time, so memory does not grow with the number of classes.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tilenet import durable

__all__ = ["RowsReader", "RowsWriter", "own_names", "read", "strip_name", "write"]

_MAGIC = b"tnspill1"
_HEAD = struct.Struct("<8sI")
_CHUNK = 1 << 18  # bytes at a time: they stay in a core's second-level cache from copy to file

RowsIndex = tuple[slice, slice, slice]


def own_names(block: int) -> tuple[str, str, str]:
    """Return the file names of a block's own half: decided pixels, upper and left frame.

    The first is written last: where it is, the others are.
    """
    return f"{block}.own", f"{block}.top", f"{block}.left"


def strip_name(giver: int, taker: int) -> str:
    """Return the file name of a strip."""
    return f"{taker}.{giver}.strip"


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file that becomes `path` if all goes well."""
    temp = durable.temporary(path)
    try:
        with temp.open("wb") as file:
            yield file, temp
        temp.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def write(path: Path, arrays: dict[str, NDArray[Any]]) -> int:
    """Write named arrays; a reader sees all or nothing.

    Returns
    -------
    int
        Bytes written.
    """
    header = json.dumps([[k, a.dtype.str, list(a.shape)] for k, a in arrays.items()]).encode()
    parts: list[bytes | memoryview] = [_HEAD.pack(_MAGIC, len(header)), header]
    parts += [memoryview(np.ascontiguousarray(a)).cast("B") for a in arrays.values() if a.size]
    crc = 0
    with _whole_file(path) as (file, _):
        for part in parts:
            crc = zlib.crc32(part, crc)
            file.write(part)
        file.write(struct.pack("<I", crc))
        return file.tell()


def read(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of a file, writable; None if it is missing or damaged."""
    try:
        data = bytearray(path.stat().st_size)
        with path.open("rb") as file:
            file.readinto(data)
    except OSError:
        return None
    if len(data) < _HEAD.size + 4 or data[: len(_MAGIC)] != _MAGIC:
        return None
    view = memoryview(data)
    if zlib.crc32(view[:-4]) != struct.unpack("<I", view[-4:])[0]:
        return None
    _, length = _HEAD.unpack_from(data)
    arrays: dict[str, NDArray[Any]] = {}
    start = _HEAD.size + length
    for name, dtype, shape in json.loads(bytes(view[_HEAD.size : start])):
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return arrays


class RowsWriter:
    """Sums, (K, h, w) int32, that go to a file as their rows come, from the first to the last.

    It takes assignments as an array does, ``writer[:, rows, cols] = sums``; what is never assigned
    is 0. In the file rows come first, (h, K, w), so that some rows are one read.

    Parameters
    ----------
    path : Path
        The file; it appears on `close`.
    shape : tuple of int
        K, h, w.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._temp = path, durable.temporary(path)
        self._shape = shape
        self._file = self._temp.open("wb")
        self._row = self._crc = 0

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
            self._file.write(data)
        self._row += len(rows)

    def close(self) -> int:
        """Complete the file, give it its name, and return its size in bytes."""
        self._skip(self._shape[1])
        self._file.write(struct.pack("<I", self._crc))
        size = self._file.tell()
        self._file.close()
        self._temp.replace(self._path)
        return size

    def abandon(self) -> None:
        """Drop the file."""
        self._file.close()
        self._temp.unlink(missing_ok=True)


class RowsReader:
    """Sums that `RowsWriter` wrote, read by rows: ``reader[:, a:b]`` is (K, b − a, w) int32.

    Parameters
    ----------
    path : Path
        The file.
    shape : tuple of int
        K, h, w.

    Raises
    ------
    ValueError
        The file is missing or damaged.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError("missing") from error
        try:
            self._verify()
        except ValueError:
            self.close()
            raise

    def _verify(self) -> None:
        size = self.size
        if os.fstat(self._fd).st_size != size + 4:
            raise ValueError("another size")
        crc = 0
        for start in range(0, size, _CHUNK):
            crc = zlib.crc32(os.pread(self._fd, min(_CHUNK, size - start), start), crc)
        if crc != struct.unpack("<I", os.pread(self._fd, 4, size))[0]:
            raise ValueError("damaged")

    @property
    def size(self) -> int:
        """Bytes of the sums."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, where: tuple[slice, slice]) -> NDArray[np.int32]:
        channels, height, width = self.shape
        start, stop, _ = where[1].indices(height)
        row_bytes = 4 * channels * width
        data = os.pread(self._fd, (stop - start) * row_bytes, start * row_bytes)
        return np.frombuffer(data, "<i4").reshape(stop - start, channels, width).transpose(1, 0, 2)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
