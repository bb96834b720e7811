"""What a network takes of memory: tried once, in processes of their own, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tilenet.durable import temporary
from tilenet.memory import forget_peak, peak_rss, return_freed, return_large_arrays
from tilenet.models.session import Setup, open_session
from tilenet.models.store import ModelFiles, cache_folder

__all__ = ["Footprint", "answer", "footprint"]

_SIDES = (256, 512)
_PATIENCE = 300.0  # seconds for one trial, in which a network may be converted


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory that a process takes which runs a network.

    Parameters
    ----------
    fixed : int
        Bytes that no tile changes; on a CPU those of the whole process.
    per_pixel : float
        Bytes for each pixel of the tiles that are in the network at one time.
    """

    fixed: int
    per_pixel: float

    def pixels_in(self, room: float) -> int:
        """Return how many pixels may be in the network at one time within so many bytes."""
        return max(0, int((room - self.fixed) / self.per_pixel))

    @classmethod
    def through(cls, sides: tuple[int, int], peaks: tuple[int, int]) -> Footprint:
        """Return the line through what a small and a larger tile took."""
        small, large = (side * side for side in sides)
        per_pixel = max(1.0, (peaks[1] - peaks[0]) / (large - small))
        return cls(max(0, int(peaks[0] - per_pixel * small)), per_pixel)


def footprint(files: ModelFiles, setup: Setup) -> Footprint | None:
    """Return what a network takes; None if it does not run, which its own run will explain.

    Parameters
    ----------
    files : ModelFiles
        The model.
    setup : Setup
        Backend, device and precision; its batch size is not looked at.
    """
    # Compiling for a trial would take minutes; what is compiled takes less than what is not.
    backend = "torch" if setup.backend == "inductor" else setup.backend
    setup = replace(setup, backend=backend, batch_size=1)
    made_by = (backend, version(setup.library), setup.device_class, setup.precision)
    own = (files.sha256, files.card.margin, *made_by)
    digest = hashlib.sha256("\0".join(map(repr, own)).encode()).hexdigest()
    path = cache_folder() / "footprints" / f"{digest}.json"
    with suppress(OSError, ValueError, TypeError):
        kept = Footprint(**json.loads(path.read_bytes()))
        if kept.fixed >= 0 and kept.per_pixel >= 1:
            return kept
    found = _tried(files, setup)
    if found is not None:
        _keep(path, found)
    return found


def _keep(path: Path, found: Footprint) -> None:
    with suppress(OSError):  # whoever cannot write there tries again
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temporary(path)
        try:
            temp.write_text(json.dumps(asdict(found)))
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


def _tried(files: ModelFiles, setup: Setup) -> Footprint | None:
    small, large = (-(-side // files.divisor) * files.divisor for side in _SIDES)
    # What a process has given back to its allocator would hide what comes next: each side has a
    # process. The first one counts for nothing: it may convert the network.
    peaks = list[int]()
    for side in (small, small, large):
        peak = _peak(files, setup, side)
        if peak is None:
            return None
        peaks.append(peak)
    return Footprint.through((small, large), (peaks[1], peaks[2]))


def _peak(files: ModelFiles, setup: Setup, side: int) -> int | None:
    """Return the bytes that one tile takes in a process of its own; None if it ends otherwise."""
    code = f"from {__name__} import answer; answer()"
    try:
        done = subprocess.run(  # noqa: S603 - our own
            [sys.executable, "-c", code],
            input=pickle.dumps((files, setup, side)),
            capture_output=True,
            check=False,
            timeout=_PATIENCE,
        )
        # The last word: libraries may have said something before.
        return None if done.returncode else int(done.stdout.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def answer() -> None:
    """Forward a tile as standard input says, and write the bytes that it took."""
    files, setup, side = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own process
    return_large_arrays()
    session = open_session(files, setup, "uint8")
    seen = side + sum(files.card.margin)
    pixels = np.zeros((files.card.band_count, seen, seen), np.uint8)

    def forward() -> None:
        with session.lock:
            for _ in session.scores([(session.load(pixels), 0, 0)], (side, side)):
                pass

    forward()  # loads, compiles and sets up
    return_freed()
    if setup.device_class == "cpu":
        forget_peak()
        forward()
        sys.stdout.write(str(peak_rss()))
    else:
        import torch

        torch.cuda.reset_peak_memory_stats(setup.device)
        forward()
        sys.stdout.write(str(torch.cuda.max_memory_allocated(setup.device)))
