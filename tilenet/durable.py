"""Files that are on disk when the call returns: temp file, fsync, rename, fsync of the directory.

The sequence is tensorstore's (kvstore/file, ``file_io_sync``); zarr's own store renames but does
not sync, so "done" chunks can vanish in a power cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import batched
from pathlib import Path

__all__ = [
    "append",
    "copy",
    "remove_folder",
    "rename",
    "sync_all",
    "sync_directory",
    "temporary",
    "write",
    "write_all",
]

_SYNCS = 8
_OPEN = 64  # files at a time: other threads need handles too
_LONGEST = 255  # bytes of a name, on most file systems


def temporary(path: Path, scratch: Path | None = None) -> Path:
    """Return the name under which `path` is written before it is complete.

    It lies beside `path`, or in `scratch`, on the same file system.
    """
    return (scratch or path.parent) / _hidden(path.name, f".{secrets.token_hex(4)}.tmp")


def _hidden(name: str, end: str) -> str:
    """Return a hidden name that tells of another: where that one may be, this one may be too."""
    room = _LONGEST - len(f".{end}")
    return f".{os.fsencode(name)[:room].decode(errors='ignore')}{end}"


def _known(path: Path) -> Path:
    """Return a temporary name of `path` that is always the same, and no other path's."""
    usual = f".{path.name}.tmp"
    if len(os.fsencode(usual)) > _LONGEST:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
        usual = _hidden(path.name, f".{digest[:16]}.tmp")
    return path.with_name(usual)


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


def copy(source: Path, target: Path) -> None:
    """Copy a file so that a reader of `target` sees all of it or nothing.

    Raises
    ------
    OSError
        As the system says; the temporary file is removed.
    """
    temp = temporary(target)
    try:
        shutil.copyfile(source, temp)
        _sync_file(temp)
        temp.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def write_all(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write many small files; they get their names in order, when all are on disk.

    Syncs that run side by side share the file system's commits. The temporary names are always the
    same, so that what a kill leaves is overwritten by the next run; the caller sees to it that
    nobody else writes these files.

    Raises
    ------
    OSError
        As the system says; the temporary files are removed. The first files may have their names.
    """
    temps = [_known(path) for path, _ in files]
    try:
        for some in batched(zip(temps, (data for _, data in files), strict=True), _OPEN):
            _put(some)
        for temp, (path, _) in zip(temps, files, strict=True):
            temp.replace(path)
    except BaseException:
        for temp in temps:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
        raise
    for folder in sorted({path.parent for path, _ in files}):
        sync_directory(folder)


def _put(files: Iterable[tuple[Path, bytes]]) -> None:
    """Write files, then sync them: the first commit takes most of the others along."""
    # Somebody may have planted a link under a name that is known beforehand.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with ExitStack() as stack:
        fds = list[int]()
        for path, data in files:
            fds.append(os.open(path, flags, 0o644))
            stack.callback(os.close, fds[-1])
            _write(fds[-1], data)
        # A task for each thread costs less than one for each file. The pool goes before the handles
        # do: their numbers may be other files' then.
        pool = stack.enter_context(ThreadPoolExecutor(_SYNCS))
        list(pool.map(_sync, [fds[k::_SYNCS] for k in range(_SYNCS)]))


def _sync(fds: Iterable[int]) -> None:
    for fd in fds:
        os.fsync(fd)


def sync_all(files: Sequence[Path], folders: Sequence[Path]) -> None:
    """Make files that were written before durable, then the names in folders.

    Syncs that run side by side share the file system's commits.
    """
    with ThreadPoolExecutor(_SYNCS) as pool:
        list(pool.map(_sync_file, files))
        list(pool.map(sync_directory, folders))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append(fd: int, data: bytes) -> None:
    """Append `data` to an open file descriptor and sync it."""
    _write(fd, data)
    os.fsync(fd)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def rename(source: Path, target: Path) -> None:
    """Rename `source` to `target` durably."""
    source.replace(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it: its name first, so that a crash leaves no half of it there."""
    gone = path.with_name(f".{secrets.token_hex(8)}.tmp")
    rename(path, gone)
    shutil.rmtree(gone)
