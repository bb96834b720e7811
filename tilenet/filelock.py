"""The kernel's locks on open files and folders; it gives them back however a process ends.

Not every disk has them. Who is told that another run is at work waits for it, so nothing but that
is said to be so.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilenet.errors import OutputError

__all__ = ["take", "turn", "wait_for"]

_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NONE = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def wait_for(fd: int, how: int, where: Path) -> None:
    """Lock an open file, when nobody else has it any more.

    Parameters
    ----------
    fd : int
        The file.
    how : int
        `fcntl.LOCK_EX`, or `fcntl.LOCK_SH` beside others who share it.
    where : Path
        What an error names.

    Raises
    ------
    OutputError
        The disk has no locks.
    OSError
        As the system says.
    """
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in _NONE:
            raise OSError(error.errno, error.strerror, str(where)) from error
        raise OutputError(
            f"the disk has no file locks ({error.strerror})",
            where,
            "mount it with them (Lustre: -o flock, NFS: with lockd), or write to another disk",
        ) from error


def take(fd: int, how: int, where: Path) -> bool:
    """Do what `wait_for` does without waiting; return False if somebody else has the lock."""
    try:
        wait_for(fd, how | fcntl.LOCK_NB, where)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Let those who write into one folder take turns: `wait_for` the lock of the folder itself."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        wait_for(fd, fcntl.LOCK_EX, folder)
        yield
    finally:
        os.close(fd)
