"""What the commands share: results on stdout, complaints on stderr, numbers with commas."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, override

from tilenet.errors import InputError, ResourceError, UsageError, one_line

__all__ = [
    "complain",
    "drop_unread",
    "drop_unwritten",
    "show",
    "split_numbers",
    "tell",
    "telling_problems",
]

_MAX_LISTED = 50
_STDERR = 2


class _Unread(io.FileIO):
    """A file that takes what it is given, also when nobody reads it any more."""

    @override
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def drop_unread() -> None:
    """Let a run not end because nobody reads what it says on stderr: a pipe that was closed.

    For the command, which owns its process.
    """
    # Else a file that the run opens would be the stream that was closed.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(fd)
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    raw = _Unread(_STDERR, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True
    )


def drop_unwritten() -> None:
    """Forget what stdout did not take: `show` has said so, and Python would at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(result: str | dict[str, Any]) -> None:
    """Write a result on stdout; a document as JSON.

    Raises
    ------
    ResourceError
        Stdout does not take it.
    """
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, indent=1)
    if sys.stdout is None:
        raise _unwritten("it is closed")
    try:
        # A file's name need not be text, and a terminal need not have every letter.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError as error:
        raise _unwritten(error.strerror) from error


def _unwritten(why: str | None) -> ResourceError:
    return ResourceError(f"the result cannot be written: {why}", "stdout", "point it elsewhere")


def complain(message: str) -> None:
    """Write one line of error on stderr."""
    sys.stderr.write(f"tilenet: error: {one_line(message)}\n")


def tell(line: str) -> None:
    """Write one line for a person on stderr."""
    sys.stderr.write(f"tilenet: {line}\n".encode(errors="backslashreplace").decode())


def split_numbers[T](text: str | None, kind: type[T], flag: str) -> tuple[T, ...] | None:
    """Return the numbers of a text like ``4,3,2``; None for None.

    Raises
    ------
    UsageError
        They are no numbers.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))  # type: ignore[call-arg]  # of a text
    except ValueError:
        raise UsageError(f"no numbers: {text}", flag, "numbers with commas between them") from None


@contextmanager
def telling_problems() -> Iterator[None]:
    """Write one line for each broken pair of an error that names several."""
    try:
        yield
    except InputError as error:
        problems = getattr(error, "problems", ())
        for problem in problems[:_MAX_LISTED]:
            complain(str(problem))
        if len(problems) > _MAX_LISTED:
            complain(f"and {len(problems) - _MAX_LISTED} more")
        raise
