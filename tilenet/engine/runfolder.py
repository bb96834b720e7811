"""The run folder, where work in progress lies, and who owns it."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilenet.errors import OutputError, ResourceError

__all__ = [
    "LOCK",
    "PLAN",
    "Owner",
    "locked",
    "outside",
    "remove_run_folder",
    "run_folder",
    "scratch",
]

PLAN, LOCK = "plan.json", "lock"
"""Names in a run folder."""


def outside(out: Path) -> Path:
    """Return the path beside which an output's own files may lie: mostly its own.

    For a label of a Zarr image it is a name beside the store, in which readers warn of loose files.
    """
    top = out.parent
    if top.name != "labels" or not _is_group(top.parent):
        return out
    top = top.parent.resolve()
    parts = [out.name]
    while _is_group(top.parent):
        parts.append(top.name)
        top = top.parent
    return top.with_name(".".join([top.name, *reversed(parts)]))


def _is_group(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup"))


def run_folder(out: Path) -> Path:
    """Return where the work in progress of an output lies."""
    place = outside(out)
    return place.with_name(f".{place.name}.tilenet")


class Owner:
    """Who owns a run folder: the kernel's lock, and a name in it for disks that lack such locks.

    Some shared file systems grant a lock to everybody. There the later run writes its name over the
    earlier one's, which finds it before it next writes, and stops.
    """

    def __init__(self, folder: Path, fd: int) -> None:
        self._folder, self._name = folder, secrets.token_hex(16).encode()
        os.ftruncate(fd, 0)
        os.pwrite(fd, self._name, 0)

    def check(self) -> None:
        """Raise OutputError if another run has taken over."""
        try:
            found = (self._folder / LOCK).read_bytes()
        except FileNotFoundError:
            found = b""
        if found != self._name:
            raise OutputError(
                "another run has taken over this output", self._folder, "leave it to that one"
            )


@contextmanager
def locked(folder: Path) -> Iterator[Owner]:
    """Own a run folder; the kernel gives it back however this process ends.

    Raises
    ------
    OutputError
        Another run owns it.
    """
    links = [path for path in (folder, *folder.iterdir()) if path.is_symlink()]
    if links:
        raise OutputError("work in progress is a link", links[0], "remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(folder / LOCK, flags, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another run is writing this output", folder, "wait for it, or choose another --out"
            ) from error
        if not (folder / LOCK).exists() or not os.path.samestat(
            os.fstat(fd), (folder / LOCK).stat()
        ):
            raise OutputError(
                "another run has just finished this output", folder, "look at it, or run again"
            )
        yield Owner(folder, fd)
    finally:
        os.close(fd)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Own a run folder for work that holds no run and, after a crash, is begun anew.

    Raises
    ------
    OutputError
        Somebody else is at work on this output.
    """
    folder = run_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        try:
            yield folder
        finally:
            remove_run_folder(folder)


def remove_run_folder(folder: Path) -> None:
    """Remove a run folder that is ours and locked; the lock goes last.

    Another run may want the folder from then on: what it does there stays.
    """
    try:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    except OSError as error:
        raise ResourceError(f"cannot be removed: {error.strerror}", folder, "remove it") from error
