"""What a run took: seconds, tiles, memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from tilenet.memory import peak_rss

__all__ = ["Meter", "Spans", "host_of"]

_SHARED = ("read", "write", "queue", "prepare", "blend")


@lru_cache(maxsize=4096)
def host_of(worker: str) -> str:
    """Return the host in a worker's address; "" for this process."""
    return "" if worker.startswith("inproc:") else urlsplit(worker).hostname or ""


def _process() -> str:
    return f"{platform.node()}:{os.getpid()}"


@dataclass
class Spans:
    """What one task measured, as plain values that travel between processes.

    Parameters
    ----------
    forward : list of (float, float)
        When forwards ran, in seconds of the system's clock.
    read, write, queue : float
        Seconds spent reading, writing, and waiting for the network with pixels read.
    prepare, blend : float
        Seconds in which the network was converted, loaded or compiled, and in which scores were
        added up and decided.
    forwarded : int
        Tiles forwarded.
    nonfinite : int
        Scores that were NaN or infinite.
    strip_bytes : int
        Bytes of strips and halves written.
    strip_reads : list of (int, int)
        Which block's strips and halves were read, and how many bytes.
    pixels : int
        Pixels of masks finished.
    worker : str
        Dask's address of the process, "" without Dask.
    process : str
        Host and process; hosts that are containers count their processes from 1.
    rss : int
        Its peak memory in bytes.
    """

    forward: list[tuple[float, float]] = field(default_factory=list)
    read: float = 0.0
    write: float = 0.0
    queue: float = 0.0
    prepare: float = 0.0
    blend: float = 0.0
    forwarded: int = 0
    nonfinite: int = 0
    strip_bytes: int = 0
    strip_reads: list[tuple[int, int]] = field(default_factory=list)
    pixels: int = 0
    worker: str = ""
    process: str = field(default_factory=_process)
    rss: int = 0

    def ran(self, start: float, stop: float) -> None:
        """Note a forward; they come in the order of their starts."""
        if self.forward and start <= self.forward[-1][1]:
            start, last = self.forward.pop()
            stop = max(last, stop)
        self.forward.append((start, stop))

    def prepared(self, seconds: float) -> None:
        """Note that the network was made ready."""
        self.prepare += seconds

    @contextmanager
    def _adding(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def preparing(self) -> AbstractContextManager[None]:
        """Count the time within as making the network ready."""
        return self._adding("prepare")

    def blending(self) -> AbstractContextManager[None]:
        """Count the time within as adding up scores."""
        return self._adding("blend")

    @contextmanager
    def using(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Hold a lock on the network; count the time before as waiting."""
        start = time.perf_counter()
        with lock:
            self.queue += time.perf_counter() - start
            yield

    def reading(self) -> AbstractContextManager[None]:
        """Count the time within as reading."""
        return self._adding("read")

    def writing(self) -> AbstractContextManager[None]:
        """Count the time within as writing."""
        return self._adding("write")

    @property
    def forward_seconds(self) -> float:
        """Seconds in which a forward of this task ran."""
        return sum(stop - start for start, stop in self.forward)

    def part(self, share: float) -> Spans:
        """Return what one of several took that were measured together."""
        return replace(
            self, forward=[(0.0, share * self.forward_seconds)],
            **{name: share * getattr(self, name) for name in _SHARED},
            strip_bytes=0, nonfinite=0, pixels=0,
        )  # fmt: skip

    def close(self) -> Spans:
        """Note the memory; returns itself."""
        self.rss = peak_rss()
        return self


@dataclass
class Meter:
    """The sum of all tasks' spans.

    Parameters
    ----------
    read_seconds, write_seconds, queue_seconds, prepare_seconds, blend_seconds : float
        Added up over threads and processes.
    tiles_forwarded, nonfinite, strip_bytes, pixels : int
        Totals.
    strip_bytes_moved : int
        Of these, what was read on another host than wrote it.
    """

    read_seconds: float = 0.0
    write_seconds: float = 0.0
    queue_seconds: float = 0.0
    prepare_seconds: float = 0.0
    blend_seconds: float = 0.0
    tiles_forwarded: int = 0
    nonfinite: int = 0
    strip_bytes: int = 0
    pixels: int = 0
    strip_bytes_moved: int = 0
    _forward_end: float = 0.0
    _forward_seconds: float = 0.0
    _pending: list[tuple[float, float]] = field(default_factory=list)
    _rss: dict[str, int] = field(default_factory=dict)

    def add(self, spans: Spans) -> None:
        """Add one task."""
        self.read_seconds += spans.read
        self.write_seconds += spans.write
        self.queue_seconds += spans.queue
        self.prepare_seconds += spans.prepare
        self.blend_seconds += spans.blend
        self.tiles_forwarded += spans.forwarded
        self.nonfinite += spans.nonfinite
        self.strip_bytes += spans.strip_bytes
        self.pixels += spans.pixels
        self._rss[spans.process] = max(self._rss.get(spans.process, 0), spans.rss)
        self._pending += spans.forward
        if len(self._pending) > 4096:
            self._fold(keep=1024)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time within, that of no task, as writing."""
        start = time.perf_counter()
        yield
        self.write_seconds += time.perf_counter() - start

    def _fold(self, keep: int) -> None:
        """Add the union of all but the latest intervals to the total."""
        self._pending.sort()
        done, self._pending = (
            self._pending[: len(self._pending) - keep],
            self._pending[len(self._pending) - keep :],
        )
        for start, stop in done:
            self._forward_seconds += max(0.0, stop - max(start, self._forward_end))
            self._forward_end = max(self._forward_end, stop)

    @property
    def forward_seconds(self) -> float:
        """Wall time during which a forward ran anywhere."""
        self._fold(keep=0)
        return self._forward_seconds

    @property
    def peak_rss_bytes(self) -> int:
        """Peak memory of all processes, added up; of this one, as it was last noted."""
        # To ask the system is not free: of a pack, every raster would.
        own = {} if _process() in self._rss else {_process(): peak_rss()}
        return sum((self._rss | own).values())

    def note_memory(self) -> Meter:
        """Note this process' memory as it is now; returns itself."""
        self._rss[_process()] = peak_rss()
        return self
