"""Every error that tilenet raises on purpose, with the exit code of the command.

::

    TilenetError
    |-- UsageError       2  the command line or a config value is off
    |   `-- UnfitError   2  a worker does not see what the run sees, or is of another version
    |-- InputError       3  bad or unsupported input (also FileNotFoundError's meaning)
    |-- ModelError       4  the model, or the machine's backend, does not fit
    |-- OutputError      5  the output exists, is foreign or busy
    |-- ResourceError    6  disk, memory or device exhausted; resumable
    |   `-- DeviceError  6  the device failed, and this process can use it no more; resumable
    |-- InvalidError     7  finished, but some inputs or blocks are invalid
    |-- VerifyError      8  verification failed
    `-- ClusterError     9  the cluster was lost; resumable

    InterruptError     130  stopped by a signal (143 for SIGTERM); resumable. No Exception, so that
                            nobody's `except Exception` takes it for a failure

An error says *what* is wrong, *where*, and what to *do*; it prints as one line and survives
pickling.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "DISK_FULL",
    "ClusterError",
    "DeviceError",
    "InputError",
    "InterruptError",
    "InvalidError",
    "ModelError",
    "OutputError",
    "ResourceError",
    "TilenetError",
    "UnfitError",
    "UsageError",
    "VerifyError",
    "blame",
    "convert_errors",
    "error_of_one",
    "one_line",
    "without_secrets",
]


_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(?<=[^/\s]/)([^\s?;]*)\?[^\s;,\"']*")


def without_secrets(text: str) -> str:
    """Return a text whose URLs have no passwords and no queries, where signatures stand."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


def one_line(text: object) -> str:
    """Return `text` on one line, control characters escaped (names come from strangers)."""
    joined = " ".join(without_secrets(str(text)).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


class _Clauses(BaseException):
    """`what` is wrong, `where`, and what to `do` about it.

    Parameters
    ----------
    what, where, do : str
        One short clause each; `where` is a path, a flag or a key.
    code : int, optional
        Exit code, when it differs from the class's own (143 for SIGTERM).
    """

    code: int = 1

    def __init__(
        self, what: str, where: object = "", do: str = "", code: int | None = None
    ) -> None:
        super().__init__(what, where, do, code)
        self.what = one_line(what)
        self.where = one_line(where)
        self.do = one_line(do)
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return "; ".join(part for part in (self.what, self.where, self.do) if part)

    def as_dict(self) -> dict[str, object]:
        """Return the error as the JSON document that `--json` prints."""
        return {"code": self.code, "what": self.what, "where": self.where, "do": self.do}


class TilenetError(_Clauses, Exception):
    """Base class of what tilenet raises on purpose."""


class UsageError(TilenetError):
    """The command line or a config value is off."""

    code = 2


class UnfitError(UsageError):
    """A worker does not see what the run sees, or is of another version."""


class InputError(TilenetError):
    """Bad or unsupported input."""

    code = 3


class ModelError(TilenetError):
    """The model does not fit the input or the machine."""

    code = 4


class OutputError(TilenetError):
    """The output exists, is foreign or busy."""

    code = 5


class ResourceError(TilenetError):
    """Disk, memory or device exhausted; the same command resumes."""

    code = 6


class DeviceError(ResourceError):
    """The device failed, and this process can use it no more."""


class InvalidError(TilenetError):
    """The run finished, but some inputs or blocks are invalid."""

    code = 7


class VerifyError(TilenetError):
    """Verification failed."""

    code = 8


class ClusterError(TilenetError):
    """The cluster was lost; the same command resumes."""

    code = 9


class InterruptError(_Clauses):
    """Stopped by a signal; the same command resumes."""

    code = 130


DISK_FULL = "the disk is full"

_OTHER = "choose another --out"
_PATH = {
    errno.ENOENT: _OTHER,
    errno.ENOTDIR: _OTHER,
    errno.EEXIST: _OTHER,
    errno.EISDIR: _OTHER,
    errno.ELOOP: "remove the link, or choose another --out",
    errno.ENAMETOOLONG: "rename the input, or choose another --out",
}
_EXHAUSTED = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "out of memory",
    errno.EIO: "the disk reports an error",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
}


_NO_MEMORY = re.compile(r"CU\w+_STATUS_\w*ALLOC(ATION)?_FAILED|CUDA error: out of memory")
"""What cuDNN, cuBLAS and CUDA say; CUDA also where it cannot pin the machine's own memory."""


def blame(error: TilenetError) -> TilenetError:
    """Return `error`, or the want of file handles that a library reported as something else."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as system:
        what = _EXHAUSTED.get(system.errno or 0, str(system))
        return ResourceError(what, error.where, "raise the limit (ulimit -n); a rerun resumes")
    return error


def _lost(error: Exception, where: object) -> ClusterError:
    return ClusterError(f"the cluster was lost: {type(error).__name__}", where, "a rerun resumes")


def _of_device(error: Exception, where: object) -> ResourceError | None:
    """Return what a device has no memory for, or why it failed; None if it is something else.

    By names, for torch need not be imported.
    """
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError" or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return ResourceError(
            "the device is out of memory", where, "use a smaller --tile or --batch-size"
        )
    if kind == "AcceleratorError":
        first = text.strip().partition("\n")[0]
        return DeviceError(f"the device failed: {first}", where, "a rerun in a new process resumes")
    return None


@contextmanager
def convert_errors(where: object) -> Iterator[None]:
    """Turn the system's own errors into ours: what is exhausted, where, and that a rerun resumes.

    Parameters
    ----------
    where : object
        What the errors are about, when they do not say.

    Raises
    ------
    OutputError
        For paths that cannot be.
    ResourceError
        For other OSErrors, MemoryError, and what torch says of a device.
    ClusterError
        For errors of Dask's about lost workers and connections.
    """
    try:
        yield
    except MemoryError as error:
        raise ResourceError("out of memory", where, "use a smaller --tile or --block") from error
    except OSError as error:
        if type(error).__module__.startswith("distributed"):
            raise _lost(error, where) from error
        if error.errno in _PATH:
            raise OutputError(
                error.strerror or str(error), error.filename or where, _PATH[error.errno]
            ) from error
        what = _EXHAUSTED.get(error.errno or 0, error.strerror or str(error))
        raise ResourceError(what, error.filename or where, "mend it; a rerun resumes") from error
    except Exception as error:
        if type(error).__module__.startswith("distributed"):
            raise _lost(error, where) from error
        if (ours := _of_device(error, where)) is not None:
            raise ours from error
        raise


def error_of_one(error: Exception, where: object) -> TilenetError | None:
    """Return why one of several inputs failed, None if it is why none of them can go on.

    They share the disk, the memory, the device and the cluster. What else is wrong, be it a defect,
    concerns the one input.

    Parameters
    ----------
    error : Exception
        What was raised.
    where : object
        The input.
    """
    try:
        with convert_errors(where):
            raise error  # noqa: TRY301 - to see what it is turned into
    except TilenetError as ours:
        system = ours.__cause__
        ours.__cause__ = ours.__context__ = None  # they hold on to what was in memory
        denied = isinstance(system, OSError) and system.errno in (errno.EACCES, errno.EPERM)
        shared = isinstance(ours, ResourceError | ClusterError | UnfitError) and not denied
        return None if shared else ours.with_traceback(None)
    except Exception as defect:
        place = traceback.extract_tb(defect.__traceback__)[-1]
        what = f"a defect in tilenet: {type(defect).__name__}: {defect}"
        return TilenetError(what, where, f"report it with {place.name}:{place.lineno}", code=1)
