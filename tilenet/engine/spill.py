"""Arrays that wait in files: a block's undecided half and the strips for its neighbours.

They are caches, not results: checksummed, not synced, and made again when lost or torn.
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from tilenet import durable

__all__ = ["own_name", "read", "strip_name", "write"]

_MAGIC = b"tnspill1"
_HEAD = struct.Struct("<8sI")


def own_name(block: int) -> str:
    """Return the file name of a block's own half."""
    return f"{block}.own"


def strip_name(giver: int, taker: int) -> str:
    """Return the file name of a strip."""
    return f"{taker}.{giver}.strip"


def write(path: Path, arrays: dict[str, NDArray[Any]]) -> int:
    """Write named arrays; a reader sees all or nothing.

    Returns
    -------
    int
        Bytes written.
    """
    header = json.dumps([[k, a.dtype.str, list(a.shape)] for k, a in arrays.items()]).encode()
    parts = [_HEAD.pack(_MAGIC, len(header)), header]
    parts += [memoryview(np.ascontiguousarray(a)).cast("B") for a in arrays.values() if a.size]
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    temp = durable.temporary(path)
    try:
        with temp.open("wb") as file:
            for part in parts:
                file.write(part)
            file.write(struct.pack("<I", crc))
            size = file.tell()
        temp.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    return size


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
    if google_crc32c.value(view[:-4]) != struct.unpack("<I", view[-4:])[0]:
        return None
    _, length = _HEAD.unpack_from(data)
    arrays: dict[str, NDArray[Any]] = {}
    start = _HEAD.size + length
    for name, dtype, shape in json.loads(bytes(view[_HEAD.size : start])):
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return arrays
