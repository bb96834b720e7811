"""Compiled networks on disk, for the next process: bytes under a name that says what made them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tilenet.models.store import cache_folder, keep

__all__ = ["compiled_name", "keep_compiled", "kept_compiled"]

_HASH_BYTES = 32
_MOST_BYTES = 1 << 28  # kept in all


def _folder() -> Path:
    return cache_folder() / "compiled"


def compiled_name(parts: Iterable[object]) -> str:
    """Return the name of what is made from these: each says itself in full by `repr`."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def kept_compiled(name: str) -> memoryview | None:
    """Return what was kept under a name; None if there is none that is as it was written."""
    path = _folder() / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = memoryview(data)[_HASH_BYTES:]
    if hashlib.sha256(content).digest() != data[:_HASH_BYTES]:
        return None  # nothing else would tell wrong weights
    with suppress(OSError):  # a cache that is somebody else's
        os.utime(path)  # the last to go
    return content


def keep_compiled(name: str, content: bytes) -> None:
    """Keep what was compiled, if the cache takes it, and drop what was used longest ago."""
    if len(content) + _HASH_BYTES > _MOST_BYTES:  # it would drive out all else, and not stay
        return
    path = _folder() / name
    if keep(path, hashlib.sha256(content).digest(), content):  # else it is compiled again
        with suppress(OSError):
            _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove the files beyond `_MOST_BYTES`, also those that a process began when it was killed."""
    found = [(path.stat(), path) for path in folder.iterdir()]
    total = 0
    for status, path in sorted(found, key=lambda one: -one[0].st_mtime_ns):
        total += status.st_size
        if total > _MOST_BYTES:
            path.unlink(missing_ok=True)
