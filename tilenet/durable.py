"""Files that are on disk when the call returns: temp file, fsync, rename, fsync of the directory.

The sequence is tensorstore's (kvstore/file, ``file_io_sync``); zarr's own store renames but does
not sync, so "done" chunks can vanish in a power cut.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["append", "rename", "sync_directory", "temporary", "write"]


def temporary(path: Path, scratch: Path | None = None) -> Path:
    """Return the name under which `path` is written before it is complete.

    It lies beside `path`, or in `scratch`, on the same file system.
    """
    return (scratch or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"


def sync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(
    path: Path,
    data: bytes | memoryview,
    *,
    sync_parent: bool = True,
    scratch: Path | None = None,
) -> None:
    """Write `data` to `path` so that a reader sees all of it or nothing.

    Parameters
    ----------
    path : Path
        Final name; its directory exists.
    data : bytes
        The whole content.
    sync_parent : bool
        Sync the directory too; a caller that writes many files into one directory does it once.
    scratch : Path, optional
        Where the file is written before it gets its name: what a kill leaves there is found again.

    Raises
    ------
    OSError
        As the system says; the temporary file is removed.
    """
    temp = temporary(path, scratch)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    if sync_parent:
        sync_directory(path.parent)


def append(fd: int, data: bytes) -> None:
    """Append `data` to an open file descriptor and sync it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def rename(source: Path, target: Path) -> None:
    """Rename `source` to `target` durably."""
    source.replace(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)
