"""What a network takes of memory: tried once, in processes of their own, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import TimeoutExpired

import numpy as np

from tilenet.apart import run_apart
from tilenet.memory import forget_peak, peak_rss, return_freed, return_large_arrays
from tilenet.models.devices import cpu_flags
from tilenet.models.session import Setup, open_session
from tilenet.models.store import ModelFiles, cache_folder, keep

__all__ = ["Footprint", "answer", "footprint"]

_logger = logging.getLogger(__name__)
_TRIED_AS = 1  # to be raised when what is tried changes
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
        Bytes for each pixel of the tiles that are in the network at one time; infinite if a small
        tile could be tried and a larger one could not.
    """

    fixed: int
    per_pixel: float

    def of(self, pixels: int) -> float:
        """Return the bytes for so many pixels in the network at one time."""
        return self.fixed + self.per_pixel * pixels

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
    path = cache_folder() / "footprints" / f"{_name(files, setup)}.json"
    with suppress(OSError, ValueError, TypeError, RecursionError):
        kept = Footprint(**json.loads(path.read_bytes()))
        if kept.fixed >= 0 and 1 <= kept.per_pixel < math.inf:
            return kept
    _logger.info("trying how much memory %s takes, once", files.card.name)
    found = _tried(files, setup)
    if found is not None and found.per_pixel < math.inf:
        keep(path, json.dumps(asdict(found)).encode())  # if it cannot, it is tried again
    return found


def _name(files: ModelFiles, setup: Setup) -> str:
    """Return what a trial depends on, as a file's name."""
    try:
        library = version(setup.library)
    except PackageNotFoundError:
        library = "none"
    machine: object = sorted(cpu_flags())
    if setup.device_class != "cpu":
        import torch

        machine = torch.cuda.get_device_name(setup.device)
    made_by = (_TRIED_AS, setup.backend, library, setup.device_class, setup.precision, machine)
    own = (files.sha256, files.card.margin, files.divisor, *made_by)
    return hashlib.sha256("\0".join(map(repr, own)).encode()).hexdigest()


def _tried(files: ModelFiles, setup: Setup) -> Footprint | None:
    small, large = (-(-side // files.divisor) * files.divisor for side in _SIDES)
    large = max(large, small + files.divisor)
    # What a process has given back to its allocator would hide what comes next: each side has a
    # process. The first one counts for nothing: it may convert the network.
    if _peak(files, setup, small) is None or (first := _peak(files, setup, small)) is None:
        return None
    second = _peak(files, setup, large)
    if second is None:
        return Footprint(first, math.inf)
    return Footprint.through((small, large), (first, second))


def _peak(files: ModelFiles, setup: Setup, side: int) -> int | None:
    """Return the bytes that one tile takes in a process of its own; None if it ends otherwise."""
    try:
        done = run_apart(__name__, "answer", pickle.dumps((files, setup, side)), _PATIENCE)
        if not done.returncode:
            return int(done.stdout.split()[-1])  # libraries may have said something before
        _logger.debug("a tile of %d did not run: %s", side, done.stderr.decode(errors="replace"))
    except (OSError, ValueError, IndexError, TimeoutExpired) as error:
        _logger.debug("a tile of %d was not tried: %s", side, error)
    return None


def answer() -> None:
    """Forward a tile as standard input says, and write the bytes that it took."""
    files, setup, side = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own process
    with suppress(OSError):  # if the system runs out of memory, this is to end, and not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
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
        sys.stdout.write(str(torch.cuda.max_memory_reserved(setup.device)))
