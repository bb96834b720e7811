"""Who writes masks into a folder: one run of many inputs, or the parts of one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilenet import filelock
from tilenet.errors import OutputError

__all__ = ["FOLDER_LOCK", "folder_locked"]

FOLDER_LOCK = ".tilenet.lock"
"""Its name in the folder of masks."""

_MOST = 256
_LEAVING = 2.0  # seconds that one who leaves may take
_PAUSE = 0.02


@contextmanager
def folder_locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Own a folder of masks; the kernel gives it back however this process ends.

    The folder is made if need be, and goes again if it stays empty. What is locked is a hidden file
    in it, which is removed in the end.

    Parameters
    ----------
    folder : Path
        Where a run writes its masks.
    shared : bool
        Others that share it may be there too, as the parts of one run. Who comes while the last of
        them leaves waits for that.

    Raises
    ------
    OutputError
        Another run is at work there, or the disk has no locks.
    """
    fd, made = _lock(folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        if not shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError, OutputError):
            # The last one puts out the light: whoever shares the file keeps it from going.
            if filelock.take(fd, fcntl.LOCK_EX, folder):
                (folder / FOLDER_LOCK).unlink()
                if made:
                    folder.rmdir()
        os.close(fd)


def _lock(folder: Path, kind: int) -> tuple[int, bool]:
    """Return the locked file, and whether the folder had to be made.

    Whoever is the last to leave owns it alone for that moment, and may take the folder along.
    """
    end, made = time.monotonic() + _LEAVING, False
    while True:
        try:
            made = not folder.exists() or made
            folder.mkdir(parents=True, exist_ok=True)
            fd = _try(folder, kind)
            if fd is not None:
                return fd, made
        except OutputError:
            if kind == fcntl.LOCK_EX or time.monotonic() > end:
                raise
        except (FileNotFoundError, FileExistsError):  # it went between two of these calls
            if time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def _try(folder: Path, kind: int) -> int | None:
    """Return the locked file, None if the one before us has just removed it."""
    path = folder / FOLDER_LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        if not filelock.take(fd, kind, folder):
            owner = os.pread(fd, _MOST, 0).decode(errors="replace")
            raise OutputError(
                f"another run{f' ({owner})' if owner else ''} writes masks into this folder",
                folder,
                "wait for it, or choose another --out",
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.lstat()):
                stack.pop_all()
                return fd
    return None
