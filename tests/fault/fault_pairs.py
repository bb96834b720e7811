"""Two runs of one output: one writes it, the other says at once that it is taken.

The second starts at a random moment of the first. Sometimes the owner is frozen meanwhile: it stays
the owner, and goes on when it thaws.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from workload import Ended, Outcome, Workload, end, remove, run_folder, wait_for

BUSY = 5
SECONDS = 5.0
_START = 2.0  # what importing may take of them
_PAIRS, _FROZEN = (6, 50), (2, 10)


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 6 pairs and 2 frozen owners; long: 50 and 10."""
    workload = Workload.at(folder / "tiny")
    figures: Counter[str] = Counter()
    failures: list[str] = []
    dice = random.Random(5)
    for trial in range(3 * _PAIRS[long]):  # more than enough: some do not meet
        out = folder / ("mask.zarr", "mask.tif")[trial % 2]
        workload.undisturbed(f"undisturbed{out.suffix}")
        frozen = trial < _FROZEN[long]
        pair = _frozen(workload, out) if frozen else _pair(workload, out, dice.uniform(0, 0.5))
        problem = _judge(pair, figures) or workload.compare(out)
        if frozen and pair[1].code != BUSY:
            problem = f"the owner was frozen, but the second exits {pair[1].code}"
        figures["frozen"] += frozen
        failures += [f"{out.name}, {'frozen' if frozen else 'pair'}: {problem}"] if problem else []
        remove(out)
        if figures["refused"] >= _PAIRS[long] + _FROZEN[long]:
            break
    return Outcome(figures["refused"], failures, dict(figures))


def _pair(workload: Workload, out: Path, later: float) -> tuple[Ended, Ended]:
    first = workload.start(workload.predict(out))
    time.sleep(later)
    start = time.monotonic()
    second = end(workload.start(workload.predict(out)))
    second = Ended(second.code, second.out, second.err, time.monotonic() - start)
    return end(first), second


def _frozen(workload: Workload, out: Path) -> tuple[Ended, Ended]:
    first = workload.start(workload.predict(out))
    wait_for(run_folder(out) / "journal.jsonl", first)
    os.killpg(first.pid, signal.SIGSTOP)
    second = workload.run(workload.predict(out))
    os.killpg(first.pid, signal.SIGCONT)
    return end(first), second


def _judge(pair: tuple[Ended, Ended], figures: Counter[str]) -> str:
    """Return what is wrong with how two runs ended."""
    codes = sorted(ended.code for ended in pair)
    if codes == [0, 0]:
        figures["one_after_the_other"] += 1
        return ""
    if codes != [0, BUSY]:
        return f"exits {codes}: {pair[0].err[-300:]} {pair[1].err[-300:]}"
    figures["refused"] += 1
    refused = max(pair, key=lambda ended: ended.code)
    figures["slowest_ms"] = max(figures["slowest_ms"], round(1000 * refused.seconds))
    if not refused.is_one_line():
        return refused.err[-300:]
    return "" if refused.seconds < SECONDS + _START else f"refused after {refused.seconds:.1f} s"
