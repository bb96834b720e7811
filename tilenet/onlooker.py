"""Who looks on while a run of the command goes: its progress on stderr, and its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tilenet.errors import InterruptError, TilenetError
from tilenet.events import Event
from tilenet.progress import progress_of
from tilenet.record import Record

__all__ = ["Onlooker"]


class Onlooker:
    """Passes events on, and tells the end once.

    Parameters
    ----------
    progress : str
        How progress is shown: see `tilenet.progress`.
    command : sequence of str
        The command line.
    summary : Path, optional
        Where the record goes.

    Raises
    ------
    UsageError
        Progress cannot be shown so.
    OutputError, ResourceError
        The record cannot be written.
    """

    def __init__(self, progress: str, command: Sequence[str], summary: Path | None) -> None:
        self._ended = False
        self._progress = progress_of(progress)
        try:
            self._record = Record(command, summary)
        except BaseException:
            self._progress.close()
            raise

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        self._record(event)
        self._progress(event)

    def end(self, code: int, error: TilenetError | InterruptError | None = None) -> None:
        """Tell how the run ended.

        Parameters
        ----------
        code : int
            Its exit code.
        error : TilenetError or InterruptError, optional
            What ended it; what goes wrong here is of less interest then.

        Raises
        ------
        OutputError, ResourceError
            The record cannot be written.
        """
        if self._ended:
            return
        self._ended = True
        try:
            figures = self._record.end(code, None if error is None else error.as_dict())
            self._progress({"event": "summary", **figures})
        except TilenetError:
            if error is None:
                raise
        finally:
            self._progress.close()
