"""The run folder, where work in progress lies, and who owns it."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tilenet import durable, filelock
from tilenet.errors import OutputError, ResourceError
from tilenet.part import Part

__all__ = [
    "LOCK",
    "PLAN",
    "STORE",
    "STRIPS",
    "Owner",
    "empty",
    "locked",
    "outside",
    "part_locked",
    "remove_run_folder",
    "run_folder",
    "set_up_alone",
]

PLAN, LOCK, STORE, STRIPS = "plan.json", "lock", "store", "strips"
"""Names in a run folder."""

_SETUP = "setup.lock"
_PART = b"part "  # the owner is a part that finishes what all parts have made


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
    """Who owns a lock: the kernel's, and a name in its file for disks that lack such locks.

    Some shared file systems grant a lock to everybody. There the later run writes its name over the
    earlier one's, which finds it before it next writes, and stops.

    Parameters
    ----------
    file : Path
        The lock's file.
    fd : int
        It, open.
    kind : bytes
        Stands before the name.
    kept : mapping of Path to bytes
        Other files that must stay as they are.
    """

    def __init__(
        self, file: Path, fd: int, kind: bytes = b"", kept: Mapping[Path, bytes] | None = None
    ) -> None:
        name = kind + secrets.token_hex(16).encode()
        self._folder, self._said = file.parent, {file: name, **(kept or {})}
        os.ftruncate(fd, 0)
        os.pwrite(fd, name, 0)

    def check(self) -> None:
        """Raise OutputError if another run has taken over."""
        for file, said in self._said.items():
            try:
                found = file.read_bytes()
            except FileNotFoundError:
                found = b""
            if found != said:
                raise OutputError(
                    "another run has taken over this output", self._folder, "leave it to that one"
                )


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(file, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _take(fd: int, how: int, what: str, where: Path, do: str) -> None:
    """Lock a file without waiting for it."""
    if not filelock.take(fd, how, where):
        raise OutputError(what, where, do)


def _check_links(folder: Path) -> None:
    links = [path for path in (folder, *folder.iterdir()) if path.is_symlink()]
    if links:
        raise OutputError("work in progress is a link", links[0], "remove it")


def _check_there(file: Path, fd: int) -> None:
    """Raise if a lock that was granted is that of a run folder which is gone."""
    if not file.exists() or not os.path.samestat(os.fstat(fd), file.stat()):
        raise OutputError(
            "another run has just finished this output", file.parent, "look at it, or run again"
        )


@contextmanager
def locked(folder: Path, *, last_part: bool = False) -> Iterator[Owner]:
    """Own a run folder; the kernel gives it back however this process ends.

    Parameters
    ----------
    folder : Path
        The run folder.
    last_part : bool
        Every block is made: wait for the parts that are still there. Those that come now wait too.

    Raises
    ------
    OutputError
        Another run owns it, or the disk has no locks.
    """
    _check_links(folder)
    lock = folder / LOCK
    with _opened(lock) as fd:
        if last_part:
            filelock.wait_for(fd, fcntl.LOCK_EX, folder)
        else:
            _take(
                fd, fcntl.LOCK_EX, "another run is writing this output", folder,
                "wait for it, or choose another --out",
            )  # fmt: skip
        _check_there(lock, fd)
        yield Owner(lock, fd, _PART if last_part else b"")


@contextmanager
def part_locked(folder: Path, part: Part) -> Iterator[Owner]:
    """Own one part of the work in a run folder, beside others who own theirs.

    On a disk that lacks locks, the owner finds out who took over the part, or the whole output; but
    a whole run that was there before does not find out about a part.

    Raises
    ------
    OutputError
        A whole run owns the folder, or another process has this part.
    """
    _check_links(folder)
    lock, own = folder / LOCK, folder / f"part-{part.name}.lock"
    with _opened(lock) as fd:
        if os.pread(fd, len(_PART), 0) == _PART:
            filelock.wait_for(fd, fcntl.LOCK_SH, folder)
        else:
            _take(
                fd, fcntl.LOCK_SH, "a whole run is writing this output", folder,
                "wait for it, or choose another --out",
            )  # fmt: skip
        _check_there(lock, fd)
        with _opened(own) as mine:
            what = f"part {part} is already running"
            _take(mine, fcntl.LOCK_EX, what, folder, "leave it to that one")
            yield Owner(own, mine, kept={lock: lock.read_bytes()})


@contextmanager
def set_up_alone(folder: Path) -> Iterator[None]:
    """Keep other parts from preparing a run folder for a moment; wait for one that does."""
    with _opened(folder / _SETUP) as fd:
        filelock.wait_for(fd, fcntl.LOCK_EX, folder)
        owner = Owner(folder / _SETUP, fd)
        yield
        owner.check()


def empty(folder: Path, keep: Container[str] = (LOCK,)) -> None:
    """Remove what is in a folder that is ours and locked, but for some files."""
    for path in folder.iterdir():
        if path.is_dir():
            durable.remove_folder(path)
        elif path.name not in keep:
            path.unlink()


def remove_run_folder(folder: Path) -> None:
    """Remove a run folder that is ours and locked; the lock goes last.

    Another run may want the folder from then on: what it does there stays.
    """
    try:
        empty(folder)
        (folder / LOCK).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    except OSError as error:
        raise ResourceError(f"cannot be removed: {error.strerror}", folder, "remove it") from error
