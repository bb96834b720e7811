"""Kills and stops: wherever a run ends, the next one goes on, and the bytes are the same.

Three ways: SIGKILL to all its processes at random moments, again and again on one output; SIGKILL
at an exact call (a rename, sync, write or unlink); SIGTERM and SIGINT, which must end it in time.
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

from injection import Point, points_of, was_hit
from workload import (
    Ended,
    Outcome,
    Workload,
    end,
    journaled,
    remove,
    run_folder,
    two_at_a_time,
    wait_for,
)

from tilenet.engine.executor import forwards_on
from tilenet.engine.journal import decode
from tilenet.sinks import documents

NEEDS = ("cc",)

STOP_SECONDS = 10.0
_MOST = ("most_forwards_redone", "most_joins_redone")
_EXACT = ("rename", "fsync", "write", "unlink")


@dataclass
class _Kills:
    """Kills in a row of runs of one output: what they may cost."""

    workload: Workload
    out: Path
    dice: random.Random
    failures: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        whole = self.workload.folder / f"undisturbed-{self.workload.backend}.zarr"
        self.seconds = self._undisturbed(whole)
        records, _ = decode(documents(whole)["journal"])
        self.tiles = {record.block: record.tiles for record in records if record.block >= 0}

    def _undisturbed(self, whole: Path) -> float:
        start = time.monotonic()
        ended = self.workload.run(self.workload.predict(whole))
        assert ended.code == 0, ended.err
        return time.monotonic() - start

    def run(self, kills: int) -> None:
        """Kill until there were so many kills, and then let it finish."""
        while self.figures["kills"] < kills:
            before = self._kept()
            self._one(before)
        before = self._kept()
        ended = self.workload.run(self.workload.predict(self.out))
        self._completed(ended, before)

    def _kept(self) -> tuple[dict[int, object], set[int]]:
        """Return the journal, and the blocks that are forwarded but not in it."""
        strips = (run_folder(self.out) / "strips").glob("*.own")
        records = journaled(self.out)
        return records, {int(path.stem) for path in strips} - set(records)

    def _one(self, before: tuple[dict[int, object], set[int]]) -> None:
        process = self.workload.start(self.workload.predict(self.out))
        if self.figures["kills"] % 2:  # half of them while it starts too, half while it works
            wait_for(run_folder(self.out) / "plan.json", process)
            time.sleep(self.dice.uniform(0, self.seconds / 3))
        else:
            time.sleep(self.dice.uniform(0, self.seconds))
        finished = process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL) if not finished else None
        ended = end(process)
        if ended.code >= 0:
            self.figures["finished_before"] += 1
            self._completed(ended, before)
            return
        self.figures["kills"] += 1
        self._check_redo(before)

    def _check_redo(self, before: tuple[dict[int, object], set[int]]) -> None:
        """Compare what was there before the run that was killed, and what is there now."""
        records, forwarded = self._kept()
        if not self.out.exists():
            lost = [block for block in before[0] if records.get(block) != before[0][block]]
            gone = before[1] - forwarded - set(records)
            if lost or gone:
                self.failures.append(f"{self.out.name}: lost records {lost}, forwards {gone}")
            strips = list((run_folder(self.out) / "strips").glob("*.tmp"))
            begun = {int(path.name.split(".")[1]) for path in strips} - set(records) - forwarded
            stored = list((run_folder(self.out) / "store" / "mask" / "c").glob("*/*[0-9]"))
            self._note_most("most_forwards_redone", len(begun))
            self._note_most("most_joins_redone", len(stored) - len(set(records) - {-1}))
            if len(begun) > forwards_on("cpu"):
                self.failures.append(f"{self.out.name}: {len(begun)} forwards are done again")

    def _note_most(self, name: str, value: int) -> None:
        self.figures[name] = max(self.figures[name], value)

    def _completed(self, ended: Ended, before: tuple[dict[int, object], set[int]]) -> None:
        """A run came to its end: its bytes, and that it did only what was left to do."""
        if ended.code:
            self.failures.append(f"{self.out.name}: exit {ended.code}: {ended.err[-300:]}")
            return
        if problem := self.workload.compare(self.out):
            self.failures.append(f"{self.out.name}: {problem}")
        report = json.loads(ended.out)
        done = set(before[0]) | before[1]
        left = sum(tiles for block, tiles in self.tiles.items() if block not in done)
        if report["blocks_resumed"] not in (len([b for b in before[0] if b >= 0]), len(self.tiles)):
            self.failures.append(f"{self.out.name}: {report['blocks_resumed']} blocks resumed")
        if report["tiles_forwarded"] > left:
            self.failures.append(
                f"{self.out.name}: {report['tiles_forwarded']} tiles forwarded, {left} were left"
            )
        self.figures["runs_completed"] += 1
        remove(self.out)


def _exact(workload: Workload, folder: Path, *, share: int, failures: list[str]) -> Counter[str]:
    """Kill at calls; `share` of each kind are tried, most of them while it finishes."""
    figures: Counter[str] = Counter()

    def trial(suffix: str, point: Point) -> str:
        out = folder / f"{point.call}{point.nth}{suffix[1:]}" / f"mask{suffix}"
        out.parent.mkdir()
        ended = workload.run(workload.predict(out), more=point.environment(out))
        hit = ended.code == -signal.SIGKILL
        figures["exact_kills" if hit else "exact_missed"] += 1
        problem = workload.rerun(out) if hit else ""
        if not hit and (ended.code or was_hit(out)):
            problem = f"exit {ended.code}: {ended.err[-300:]}"
        remove(out)
        return f"{suffix}, {point}: {problem}" if problem else ""

    for suffix in (".zarr", ".tif", ".ome.tif"):
        workload.undisturbed(f"undisturbed{suffix}")
        counts = points_of(workload, folder / f"count{suffix[1:]}" / f"mask{suffix}")
        chosen = [
            (suffix, Point(call, nth))
            for call in _EXACT
            for nth in _towards_end(counts[call], min(share, counts[call]))
        ]
        failures += [line for line in two_at_a_time(trial, chosen) if line]
    return figures


def _towards_end(many: int, share: int) -> list[int]:
    """Return some of 1 … many, closer together towards the end, where a run finishes; or all."""
    if share == many:
        return list(range(1, many + 1))
    return sorted({max(1, round(many * (1 - (k / share) ** 2))) for k in range(share)})


def _stops(
    workload: Workload, folder: Path, dice: random.Random, *, trials: int, failures: list[str]
) -> Counter[str]:
    """Stop runs; they must end in time, and those that have begun say so in a line."""
    figures: Counter[str] = Counter()
    slowest = 0.0
    for trial in range(trials):
        number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
        out = folder / f"stop{trial}" / ("mask.zarr", "mask.tif")[trial // 2 % 2]
        out.parent.mkdir()
        process = workload.start(workload.predict(out))
        # A third of them while it starts; the others while it works.
        begun = folder if trial % 3 == 0 else run_folder(out)
        ended, seconds = _stop(process, number, begun, dice.uniform(0, 0.4))
        if ended.code == 0:
            figures["finished_before_stop"] += 1
        elif ended.code == -number and not ended.err and not run_folder(out).exists():
            figures["stopped_before_the_command"] += 1
        else:
            figures["stops"] += 1
            slowest = max(slowest, seconds)
            if ended.code != 128 + number or not ended.is_one_line() or seconds > STOP_SECONDS:
                failures.append(f"{number.name}: {ended.code} in {seconds:.1f} s: {ended.err}")
        if problem := workload.rerun(out):
            failures.append(f"{number.name}: {problem}")
        remove(out)
    return figures | Counter({"slowest_stop_ms": round(1000 * slowest)})


def _stop(
    process: subprocess.Popen[str], number: int, begun: Path, later: float
) -> tuple[Ended, float]:
    wait_for(begun, process)
    time.sleep(later)
    start = time.monotonic()
    if process.poll() is None:
        os.killpg(process.pid, number)
    return end(process), time.monotonic() - start


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 10 kills in a row, 24 exact ones and 6 stops; long: 100, 480, and 100."""
    dice = random.Random(1)
    tiny, real = Workload.at(folder / "tiny"), Workload.at(folder / "real", real=True)
    failures: list[str] = []
    figures: Counter[str] = Counter()
    for workload, name, kills in (
        (tiny, "mask.zarr", 40 if long else 4),
        (tiny, "mask.tif", 40 if long else 4),
        (real, "real.zarr", 20 if long else 2),
    ):
        series = _Kills(workload, folder / name, dice)
        series.run(kills)
        failures += series.failures
        most = {key: max(figures[key], series.figures[key]) for key in _MOST}
        figures = Counter({**(figures + series.figures), **most})
    figures |= _exact(tiny, folder, share=40 if long else 2, failures=failures)
    figures |= _stops(tiny, folder, dice, trials=100 if long else 6, failures=failures)
    trials = figures["kills"] + figures["exact_kills"] + figures["stops"]
    return Outcome(trials, failures, dict(figures))
