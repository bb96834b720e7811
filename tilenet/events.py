"""What happens to the inputs of a run, told to whoever listens while it happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilenet.errors import without_secrets
from tilenet.sources.remote import is_remote

__all__ = ["Event", "Listener", "Tracker"]

Event = Mapping[str, Any]
"""What happened, under ``event``, and its figures: see the README, *Unattended*."""

Listener = Callable[[Event], None]
"""Called with each event, never by two threads at once."""


@dataclass(slots=True)
class _Input:
    pixels: int
    done: int = 0
    blocks: int = 1


class Tracker:
    """Counts the pixels, blocks and inputs of a run; any thread may tell it.

    Parameters
    ----------
    progress : callable
        Called with finished pixels and all pixels (0 while unknown).
    listener : callable
        Called with all that happens.
    """

    def __init__(self, progress: Callable[[int, int], None], listener: Listener) -> None:
        self._progress, self._listener = progress, listener
        self._lock = threading.RLock()
        self._inputs: dict[str, _Input] = {}
        self._done = self._total = self._count = 0
        self._ended: set[str] = set()
        self._all_known = False

    def begin(self, inputs: Iterable[object]) -> None:
        """Tell which inputs there are."""
        names = [_name(one) for one in inputs]
        self._count = len(names)
        self._tell("begin", inputs=names)

    def expect(self, name: object, pixels: int) -> None:
        """Note the size of an input."""
        with self._lock:
            self._inputs[_name(name)] = _Input(pixels)
            self._total += pixels

    def all_known(self) -> None:
        """Note that no input will be met whose size was not told."""
        self._all_known = True

    def start(self, name: object, out: object, blocks: int) -> None:
        """Tell that an input is under way, perhaps once more."""
        with self._lock:
            one = self._inputs[_name(name)]
            self._done -= one.done
            one.done, one.blocks = 0, blocks
            self._tell("start", input=_name(name), output=_place(out), pixels=one.pixels,
                       blocks=blocks)  # fmt: skip

    def advance(self, name: object, pixels: int) -> None:
        """Tell that so many more pixels are finished."""
        with self._lock:
            one = self._inputs[_name(name)]
            one.done += pixels
            self._done += pixels
            total = self._total if self._all_known else 0
            self._progress(self._done, total)
            self._tell(
                "progress",
                input=_name(name),
                # All blocks are of one size, but for those at two borders.
                blocks_done=round(one.blocks * one.done / max(1, one.pixels)),
                blocks=one.blocks,
                inputs_done=len(self._ended),
                inputs=self._count,
                pixels_done=self._done,
                pixels=total or None,
            )

    def finish(self, name: object, out: object, *, seconds: float, resumed: bool) -> None:
        """Tell that a mask is complete; `resumed`: it was there, and nothing was done."""
        with self._lock:
            self._ended.add(_name(name))
            one = self._inputs[_name(name)]
            self._tell("finish", input=_name(name), output=_place(out), pixels=one.pixels,
                       seconds=seconds, resumed=resumed)  # fmt: skip

    def fail(self, name: object, code: int, error: str) -> None:
        """Tell that an input failed, or (code 7) that a part of its mask has no answer."""
        with self._lock:
            one = self._inputs.get(_name(name))
            if one is not None and one.done < one.pixels:
                self._total -= one.pixels - one.done
            self._ended.add(_name(name))
            self._tell("fail", input=_name(name), code=code, error=error)

    def skip(self, name: object, out: object) -> None:
        """Tell that an input was left alone."""
        with self._lock:
            self._ended.add(_name(name))
            self._tell("skip", input=_name(name), output=_place(out))

    def _tell(self, event: str, **figures: Any) -> None:
        with self._lock:
            self._listener({"event": event, **figures})


def _place(out: object) -> str:
    """Return where a mask is, to whoever stands in another folder."""
    name = str(out)
    return name if is_remote(name) else str(Path(name).absolute())


def _name(name: object) -> str:
    return without_secrets(str(name))
