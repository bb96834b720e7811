"""Progress of a run on stderr: a bar on a terminal, a line now and then in a log, or JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from tilenet.errors import UsageError
from tilenet.events import Event

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["KINDS", "Progress", "progress_of"]

KINDS = ("auto", "bar", "log", "json", "none")
"""What `--progress` takes; "auto" is a bar on a terminal, else a log."""

_logger = logging.getLogger(__name__)
_LOG_SECONDS = 30.0
_JSON_SECONDS = 1.0  # between two events of progress


class Progress(Protocol):
    """Hears what happens to the inputs of a run, and shows it."""

    def __call__(self, event: Event) -> None:
        """Show an event."""

    def close(self) -> None:
        """Show no more."""


def progress_of(kind: str) -> Progress:
    """Return what shows the progress of a run.

    Parameters
    ----------
    kind : str
        One of `KINDS`.

    Raises
    ------
    UsageError
        It is none of them.
    """
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "log"
    kinds: dict[str, type[Progress]] = {
        "bar": _Bar, "log": _Log, "json": _JsonLines, "none": _Nothing
    }  # fmt: skip
    if kind not in kinds:
        raise UsageError(f"no progress {kind}", "--progress", f"choose {', '.join(KINDS)}")
    return kinds[kind]()


class _Nothing:
    def __call__(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def __call__(self, event: Event) -> None:
        if event["event"] != "progress":
            return
        if self._bar is None:
            from tqdm import tqdm  # few runs show one

            self._bar = tqdm(unit="px", unit_scale=True, file=sys.stderr)
        self._bar.total = event["pixels"]
        self._bar.update(event["pixels_done"] - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Rate:
    """Pixels per second since the first ones: those that an earlier run left are not of this."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: int | None = None

    def of(self, event: Event) -> tuple[float, float | None]:
        """Return pixels per second, and the seconds that are left where that is known."""
        done, total = event["pixels_done"], event["pixels"]
        if self._first is None:
            self._first = done
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._start)
        return rate, (total - done) / rate if total and rate else None


class _Log:
    def __init__(self) -> None:
        self._rate, self._last = _Rate(), time.monotonic()

    def __call__(self, event: Event) -> None:
        if event["event"] != "progress":
            return
        rate, left = self._rate.of(event)
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS:
            return
        self._last = now
        of = f" of {event['pixels'] / 1e6:.0f}" if event["pixels"] else ""
        if event["inputs"] > 1:
            of += f" Mpx, {event['inputs_done']} of {event['inputs']} inputs"
        else:
            of += " Mpx"
        tail = "" if left is None else f", {left:.0f} s left"
        _logger.info("%.0f%s, %.1f Mpx/s%s", event["pixels_done"] / 1e6, of, rate / 1e6, tail)

    def close(self) -> None:
        pass


def _write(event: str, **figures: Any) -> None:
    line = {"event": event, "time": round(time.time(), 3), **figures}
    # One write: threads do not mix their lines. A file's name need not be text.
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


class _Messages(logging.Handler):
    """Messages as events."""

    def emit(self, record: logging.LogRecord) -> None:
        _write("message", level=record.levelname.lower(), text=record.getMessage())


class _JsonLines:
    """All events, and messages as events; those of progress not more often than once a second."""

    def __init__(self) -> None:
        self._rate, self._last = _Rate(), 0.0
        self._handler = _Messages()
        logger = logging.getLogger("tilenet")
        self._others = logger.handlers[:]
        for handler in self._others:
            logger.removeHandler(handler)
        logger.addHandler(self._handler)

    def __call__(self, event: Event) -> None:
        figures = dict(event)
        kind = figures.pop("event")
        if kind == "begin":
            figures["inputs"] = len(figures["inputs"])
        elif kind == "progress":
            rate, left = self._rate.of(event)
            now = time.monotonic()
            if now - self._last < _JSON_SECONDS:
                return
            self._last = now
            figures["mpixels_per_second"] = round(rate / 1e6, 3)
            figures["seconds_left"] = None if left is None else round(left, 1)
        _write(kind, **figures)

    def close(self) -> None:
        logger = logging.getLogger("tilenet")
        logger.removeHandler(self._handler)
        for handler in self._others:
            logger.addHandler(handler)
