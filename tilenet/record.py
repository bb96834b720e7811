"""The record of a run: a JSON file for whoever was not there."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tilenet import __version__, durable
from tilenet.errors import OutputError, convert_errors, one_line
from tilenet.events import Event
from tilenet.strangers import parse_json

__all__ = ["Record"]

_SCHEMA = 1
_KEY = "tilenet_run"
_OUTCOMES = ("finished", "resumed", "partial", "skipped", "failed", "open")
"""Of an input. Resumed: its mask was there and is this run's; partial: parts of it have no answer;
open: the run ended before it did."""

_OPEN = _OUTCOMES[-1]
_MOST = 1 << 30


def _folder() -> str | None:
    """Return where the command was given; None where that has gone."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return None


class Record:
    """Hears what happens to the inputs of a run; knows its outcome at any time.

    Parameters
    ----------
    command : sequence of str
        The command line.
    path : Path, optional
        Where it is written: when the run begins, and when it has ended.
    """

    def __init__(self, command: Sequence[str], path: Path | None = None) -> None:
        self._path, self._start = path, time.time()
        self._head = {
            _KEY: _SCHEMA,
            "tilenet": __version__,
            "command": [one_line(word) for word in command],
            "folder": _folder(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _iso(self._start),
        }
        self._inputs: dict[str, dict[str, Any]] = {}
        if path is not None:
            _check(path)
            self._write({"exit_code": None, "ended": None})

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event["event"]:
            case "begin":
                self._inputs |= {name: {"outcome": _OPEN} for name in event["inputs"]}
            case "start":
                self._of(event)["output"] = event["output"]
            case "finish":
                self._of(event).update(
                    {
                        "outcome": "resumed" if event["resumed"] else "finished",
                        "output": event["output"],
                        "pixels": event["pixels"],
                        "seconds": event["seconds"],
                    }
                )
            case "fail":
                self._of(event).update(
                    {
                        "outcome": "partial" if event["code"] == _PARTLY else "failed",
                        "code": event["code"],
                        "error": event["error"],
                    }
                )
            case "skip":
                self._of(event).update({"outcome": "skipped", "output": event["output"]})

    def _of(self, event: Event) -> dict[str, Any]:
        return self._inputs.setdefault(event["input"], {})

    def end(self, code: int, error: dict[str, object] | None = None) -> dict[str, Any]:
        """Write the record, if it has a place; return its figures without those of the inputs.

        Parameters
        ----------
        code : int
            The exit code.
        error : dict, optional
            What ended the run, as `TilenetError.as_dict` has it.
        """
        now = time.time()
        counts = Counter(one.get("outcome", _OPEN) for one in self._inputs.values())
        figures = {
            "exit_code": code,
            "error": error,
            "inputs": len(self._inputs),
            **{outcome: counts[outcome] for outcome in _OUTCOMES},
            "pixels": sum(one.get("pixels", 0) for one in self._inputs.values()),
            "seconds": round(now - self._start, 3),
        }
        self._write({"ended": _iso(now), **figures})
        return figures

    def _write(self, figures: dict[str, Any]) -> None:
        if self._path is None:
            return
        outcomes = [{"input": name, **one} for name, one in self._inputs.items()]
        document = json.dumps({**self._head, **figures, "outcomes": outcomes}, indent=1)
        with convert_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(self._path, document.encode() + b"\n")


_PARTLY = 7


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _check(path: Path) -> None:
    """Raise OutputError if there is something that is no record of ours."""
    with convert_errors(path):
        if not path.exists() and not path.is_symlink():
            return
        if path.is_dir():
            raise OutputError("the summary is a folder", path, "give --summary a file")
        with path.open("rb") as file:
            data = file.read(_MOST)
    try:
        ours = _KEY in parse_json(data)
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise OutputError("the file exists and is not tilenet's", path, "choose another --summary")
