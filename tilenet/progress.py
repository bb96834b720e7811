"""Progress of a run on stderr: a bar on a terminal, a line every 30 s in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["ProgressBar"]

_logger = logging.getLogger(__name__)
_LOG_SECONDS = 30.0


class ProgressBar:
    """Shows finished pixels and the time that is left; call it with both numbers."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` pixels (0 = not known yet)."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total or None, unit="px", unit_scale=True, file=sys.stderr)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._last >= _LOG_SECONDS:
            self._last = now
            rate = (done - self._first) / (now - self._start)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            of = f" of {total / 1e6:.0f}" if total else ""
            _logger.info("%.0f%s Mpx, %.1f Mpx/s%s", done / 1e6, of, rate / 1e6, left)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
