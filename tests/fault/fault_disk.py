"""Full disks, and limits on files: exit 6 and one line, nothing at the final path, and a rerun
with more room ends with the same bytes.

A disk that is too small from the start is refused before anything is written; so that it is full
in the middle too, most disks are large until the run has begun.
"""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from disks import resize, small_disk
from workload import Ended, Outcome, Workload, end, remove, run_folder, wait_for

NEEDS = ("root", "mount")

EXHAUSTED = 6
_LARGE = 256 << 20
_PAGE = 4096


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 6 sizes of disk with a Zarr store, a COG or a PNG and 4 limits; long: 24 with each."""
    workload = Workload.at(folder / "tiny")
    figures: Counter[str] = Counter()
    failures: list[str] = []
    dice = random.Random(3)
    kinds = (".zarr", ".tif", ".png")
    for suffix in kinds:
        workload.undisturbed(f"undisturbed{suffix}")
    most = {suffix: _most_used(workload, folder / "most", suffix) for suffix in kinds}
    sizes = 24 if long else 6
    trials = [
        (suffix, int(most[suffix] * (index + 1) / sizes))
        for index in range(sizes)
        for suffix in (kinds if long else kinds[index % 3 :][:1])
    ]
    for suffix, size in trials:
        with small_disk(folder / "disk", _LARGE) as disk:
            later = dice.uniform(0, 0.2)
            problem = _fill(workload, disk / f"mask{suffix}", size, later, figures)
        (folder / "disk").rmdir()
        failures += [f"{suffix}, {size} bytes: {problem}"] if problem else []
    for suffix in kinds:
        with small_disk(folder / "disk", 64 << 10) as disk:
            problem = _too_small(workload, disk / f"mask{suffix}", figures)
        (folder / "disk").rmdir()
        failures += [f"{suffix}, too small: {problem}"] if problem else []
    for suffix in kinds:
        for name, limit, value in _LIMITS:
            out = folder / "limited" / f"mask{suffix}"
            out.parent.mkdir(exist_ok=True)
            ended = workload.run(workload.predict(out), preexec_fn=_limited(limit, value))
            problem = _judge(workload, out, ended, figures, f"{name}_hit")
            failures += [f"{suffix}, {name} {value}: {problem}"] if problem else []
            remove(out)
    trials_hit = figures["full"] + figures["too_small"] + figures["size_hit"] + figures["files_hit"]
    return Outcome(trials_hit, failures, {**figures, "most_used": most})


_LIMITS = (
    ("size", resource.RLIMIT_FSIZE, 8 << 10),
    ("size", resource.RLIMIT_FSIZE, 30 << 10),
    ("files", resource.RLIMIT_NOFILE, 10),
    ("files", resource.RLIMIT_NOFILE, 14),
)


def _limited(limit: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(limit, (value, value))


def _most_used(workload: Workload, point: Path, suffix: str) -> int:
    """Return the most that a run ever had on its disk."""
    with small_disk(point, _LARGE) as disk:
        process = workload.start(workload.predict(disk / f"mask{suffix}"))
        most = 0
        while process.poll() is None:
            most = max(most, shutil.disk_usage(disk).used)
            time.sleep(0.002)
        end(process)
    point.rmdir()
    return most


def _fill(workload: Workload, out: Path, size: int, later: float, figures: Counter[str]) -> str:
    """Let the disk become so small when the run has begun."""
    process = workload.start(workload.predict(out))
    if wait_for(run_folder(out) / "plan.json", process):
        time.sleep(later)
    for more in range(0, 1 << 20, _PAGE):  # it cannot become smaller than what is on it
        try:
            resize(out.parent, max(size, shutil.disk_usage(out.parent).used) + more)
            break
        except AssertionError:
            continue
    return _judge(workload, out, end(process), figures, "full")


def _too_small(workload: Workload, out: Path, figures: Counter[str]) -> str:
    """Begin on a disk that is too small."""
    ended = workload.run(workload.predict(out))
    return _judge(workload, out, ended, figures, "too_small")


def _judge(workload: Workload, out: Path, ended: Ended, figures: Counter[str], name: str) -> str:
    """Return what is wrong with how a run ended, and with the next one."""
    if ended.code == 0:
        figures["fitted"] += 1
        return workload.compare(out)
    figures[name] += 1
    # OpenVINO says of a library that it could not open only that the model does not load (4).
    allowed = (EXHAUSTED, 4) if name == "files_hit" else (EXHAUSTED,)
    if ended.code not in allowed or not ended.is_one_line():
        return f"exit {ended.code}: {ended.err[-400:]}"
    if out.exists():
        return "something is visible at the final path"
    if out.parent.name == "disk":
        resize(out.parent, _LARGE)
    return workload.rerun(out)
