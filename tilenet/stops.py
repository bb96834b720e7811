"""Stops: SIGINT and SIGTERM become one InterruptError, wherever in the main thread they arrive."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tilenet.errors import InterruptError

__all__ = ["check_stopping", "is_stopping", "stopping_on_signals"]

_SOON = 0.01  # seconds
_raised: list[InterruptError] = []


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code is _send_again.__code__:  # in there too, Python drops errors
            _send_later(number)
            return
        frame = frame.f_back
    # A second signal must not wait for what the first one already stops.
    signal.signal(number, signal.SIG_DFL)
    error = InterruptError(
        "interrupted", signal.Signals(number).name, "the same command resumes", code=128 + number
    )
    _raised.append(error)
    raise error


def _send_again(unraisable: Any) -> None:
    """Repeat a signal that arrived where Python drops errors: in a `__del__`, as Dask's futures."""
    error = unraisable.exc_value
    if not isinstance(error, InterruptError):
        sys.__unraisablehook__(unraisable)
        return
    number = error.code - 128
    signal.signal(number, _stop)
    _send_later(number)


def _send_later(number: int) -> None:
    threading.Timer(_SOON, _send, (number,)).start()


def _send(number: int) -> None:
    main = threading.main_thread().ident
    if main is not None and signal.getsignal(number) is _stop:  # else all is done meanwhile
        signal.pthread_kill(main, number)


def is_stopping() -> bool:
    """Return whether a signal has stopped this process: threads may end what nobody awaits."""
    return bool(_raised)


def check_stopping() -> None:
    """Raise InterruptError in a thread of this process if a signal has stopped it."""
    if _raised:
        error = _raised[-1]
        raise InterruptError(error.what, error.where, error.do, code=error.code)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise InterruptError in the main thread at SIGINT and SIGTERM.

    Some libraries raise an error of their own instead, as pydantic while it builds a class.
    """
    _raised.clear()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _stop) for number in numbers]
    hook, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        yield
    except Exception as error:
        if _raised:
            raise _raised[0] from error
        raise
    finally:
        _raised.clear()
        sys.unraisablehook = hook
        for number, handler in zip(numbers, before, strict=True):
            if signal.getsignal(number) is _stop:
                signal.signal(number, handler)
