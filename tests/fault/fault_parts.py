"""Parts of one mask, started and killed at random, several at a time: the bytes of one run.

A round starts parts in any order until the mask is there; some of them get SIGKILL, at random
moments or, while the last one finishes, at an exact call. At times a whole run mixes in.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from injection import Point
from workload import Outcome, Workload, end, remove, run_folder

NEEDS = ("cc",)

_COUNTS = (2, 3, 4, 7)
_AT_ONCE = 3
_MOST_STARTS = 60
_SHARE_KILLED = 0.4


@dataclass
class _Round:
    """Parts of one mask, until it is there."""

    workload: Workload
    out: Path
    dice: random.Random
    seconds: float
    figures: Counter[str]
    failures: list[str] = field(default_factory=list)

    def run(self) -> list[str]:
        """Return what went wrong."""
        left = self._deal()
        for _ in range(_MOST_STARTS):
            if self.out.exists() and not run_folder(self.out).exists():
                break
            left = left or self._deal()
            self._some([left.pop() for _ in range(min(len(left), self.dice.randint(1, _AT_ONCE)))])
        else:
            return [f"{self.out.name}: not finished after many starts"]
        if problem := self.workload.compare(self.out):
            self.failures.append(f"{self.out.name}: {problem}")
        self.figures["masks"] += 1
        remove(self.out)
        return self.failures

    def _deal(self) -> list[str]:
        """Return all parts of a count, at times of two, in any order, and at times a whole run."""
        counts = self.dice.sample(_COUNTS, self.dice.choice((1, 1, 2)))
        parts = [f"{k}/{count}" for count in counts for k in range(1, count + 1)]
        if self.dice.random() < 0.2:
            parts.append("")
        self.dice.shuffle(parts)
        return parts

    def _some(self, parts: list[str]) -> None:
        """Run some at once; kill a few of them."""
        running = [(part, self._start(part)) for part in parts]
        doomed = [one for _, one in running if self.dice.random() < _SHARE_KILLED]
        time.sleep(self.dice.uniform(0, self.seconds))
        for process in doomed:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for part, process in running:
            ended = end(process)
            self.figures["kills" if ended.code < 0 else f"exit_{ended.code}"] += 1
            # A whole run and parts exclude each other, as two of one part do.
            busy = ended.code == 5 and ("is writing" in ended.err or "is already" in ended.err)
            late = ended.code == 5 and "has just finished" in ended.err
            if ended.code not in (0, -signal.SIGKILL) and not busy and not late:
                self.failures.append(f"{part}: exit {ended.code}: {ended.err[-300:]}")
            if ended.code == 0 and json.loads(ended.out)["complete"] != self._finished(ended.out):
                self.failures.append(f"{part}: says that it is complete, and it is not")

    def _finished(self, text: str) -> bool:
        found = json.loads(text)
        return found["blocks_done"] == found["blocks"]

    def _start(self, part: str) -> subprocess.Popen[str]:
        more = {}
        if self.dice.random() < 0.2:
            call = self.dice.choice(("rename", "fsync", "write", "unlink"))
            more = Point(call, self.dice.randint(1, 120)).environment(self.out)
        extra = ("--part", part) if part else ()
        return self.workload.start(self.workload.predict(self.out, *extra), more=more)


def run(folder: Path, *, long: bool) -> Outcome:
    """Make 4 masks of parts that are killed; long: 150."""
    workload, dice = Workload.at(folder / "tiny"), random.Random(7)
    failures: list[str] = []
    figures: Counter[str] = Counter()
    start = time.monotonic()
    workload.undisturbed()
    seconds = time.monotonic() - start
    for suffix in (".zarr", ".tif"):
        workload.undisturbed(f"undisturbed{suffix}")
        for k in range(75 if long else 2):
            out = folder / f"{k}{suffix[1:]}" / f"mask{suffix}"
            out.parent.mkdir()
            failures += _Round(workload, out, dice, seconds, figures).run()
    return Outcome(figures["masks"], failures, dict(figures))
