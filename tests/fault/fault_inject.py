"""SQLite's method: the Nth call on a file of the run fails, for every N, call and errno.

A run may then end well, with the same bytes, or say in one line what is wrong (6: exhausted, and a
rerun resumes). Anything else is a defect: an error that nobody saw is a wrong mask one day.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections import Counter
from pathlib import Path

from injection import CALLS, Point, points_of, was_hit
from workload import Outcome, Workload, remove, two_at_a_time

NEEDS = ("cc",)

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE)
EXHAUSTED = 6
_SHARES = (2, 40)  # points of each call and kind of output


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 34 points; long: 640. A third are lasting."""
    workload = Workload.at(folder / "tiny")
    figures: Counter[str] = Counter()
    failures: list[str] = []

    def trial(suffix: str, point: Point) -> str:
        name = str(point).replace(" ", "-") + suffix.replace(".", "-")
        out = folder / name / f"mask{suffix}"
        out.parent.mkdir()
        problem, outcome = _try(workload, out, point)
        figures[outcome] += 1
        remove(out)
        return f"{suffix}, {point}: {problem}" if problem else ""

    for suffix in (".zarr", ".tif"):
        workload.undisturbed(f"undisturbed{suffix}")
        counts = points_of(workload, folder / f"count{suffix[1:]}" / f"mask{suffix}")
        chosen = [(suffix, point) for point in _points(counts, share=_SHARES[long])]
        failures += [line for line in two_at_a_time(trial, chosen) if line]
    return Outcome(sum(figures.values()) - figures["missed"], failures, dict(figures))


def _points(counts: Counter[str], *, share: int) -> list[Point]:
    """Return points spread evenly over the calls of a run, at most `share` of each call."""
    dice, errors = random.Random(2), itertools.cycle(ERRORS)
    return [
        Point(call, nth, next(errors), lasting=index % 3 == 2)
        for call in CALLS
        for index, nth in enumerate(_sample(dice, counts[call], share))
    ]


def _sample(dice: random.Random, many: int, share: int) -> list[int]:
    return sorted(dice.sample(range(1, many + 1), min(share, many)))


def _try(workload: Workload, out: Path, point: Point) -> tuple[str, str]:
    """Return what is wrong, and how the run ended in a word."""
    ended = workload.run(workload.predict(out), more=point.environment(out))
    if not was_hit(out):
        return "" if ended.code == 0 else f"not hit, but exit {ended.code}: {ended.err}", "missed"
    if ended.code == 0:
        return workload.compare(out), "went_on"
    if ended.code != EXHAUSTED or not ended.is_one_line():
        return f"exit {ended.code}: {ended.err[-400:]}", "wrong_end"
    return workload.rerun(out), "refused"
