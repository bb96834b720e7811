"""What the commands share: results on stdout, complaints on stderr, numbers with commas."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tilenet.errors import InputError, UsageError, one_line

__all__ = ["complain", "show", "split_numbers", "tell", "telling_problems"]

_MAX_LISTED = 50


def show(result: str | dict[str, Any]) -> None:
    """Write a result on stdout; a document as JSON."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, indent=1)
    # A file's name need not be text.
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")


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
        return tuple(kind(part) for part in text.split(","))  # type: ignore[call-arg]
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
