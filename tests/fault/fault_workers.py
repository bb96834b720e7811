"""Workers and schedulers that die: the same bytes, or exit 9 in bounded time and a rerun.

The workers of `processes:2` are killed one at a time, at random, every 4 seconds in the mean; Dask
starts them again. Of a cluster that was started by hand, all workers go, or the scheduler.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from workload import Outcome, Workload, end, rasters, remove, run_folder, wait_for

LOST = 9
BOUND = 60.0  # seconds: 30 without a worker, and what it takes to see it and to leave
_MEAN = 4.0
_TRIALS = (2, 20)
_SIDE = 3072  # 400 blocks: long enough to lose some workers


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 2 runs whose workers die and 2 lost clusters; long: 20 and 10."""
    figures: Counter[str] = Counter()
    dice = random.Random(6)
    large = Workload(folder / "large", Workload.at(folder / "large").model)
    rasters.write_tif(large.raster, rasters.picture(_SIDE, _SIDE), georeferenced=True)
    large.undisturbed("undisturbed.zarr")
    failures: list[str] = []
    with ThreadPoolExecutor(1) as beside:  # a lost cluster is mostly waited for
        lost = [
            beside.submit(_lost, folder / f"{what}{number}", large, what, figures)
            for number in range(5 if long else 1)
            for what in ("workers", "scheduler")
        ]
        for _ in range(_TRIALS[long]):
            problem = _dying(large, folder / "mask.zarr", dice, figures)
            failures += [f"workers that die: {problem}"] if problem else []
        failures += [problem for problem in (future.result() for future in lost) if problem]
    trials = figures["runs_that_lost_workers"] + figures["lost_clusters"]
    return Outcome(trials, failures, dict(figures))


def _dying(workload: Workload, out: Path, dice: random.Random, figures: Counter[str]) -> str:
    """Kill workers while a run goes on."""
    process = workload.start(workload.predict(out, "--scheduler", "processes:2"))
    wait_for(run_folder(out) / "journal.jsonl", process)
    kills = 0
    while process.poll() is None:
        time.sleep(min(dice.expovariate(1 / _MEAN), 3 * _MEAN))
        workers = _workers(process.pid)
        if workers and process.poll() is None:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1
    ended = end(process)
    figures["workers_killed"] += kills
    figures["runs_that_lost_workers" if kills else "runs_undisturbed"] += 1
    problem = f"exit {ended.code}: {ended.err[-400:]}" if ended.code else workload.compare(out)
    remove(out)
    return problem


def _workers(group: int) -> list[int]:
    """Return the worker processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.getpgid(int(path.name)) == group
            worker = b"multiprocessing.spawn" in (path / "cmdline").read_bytes()
        except OSError:
            continue
        if ours and worker:
            found.append(int(path.name))
    return found


def _lost(folder: Path, workload: Workload, what: str, figures: Counter[str]) -> str:
    """Kill all workers, or the scheduler, of a cluster that was started by hand."""
    folder.mkdir()
    out = folder / "mask.zarr"
    with _cluster(workload, folder) as (address, parts):
        process = workload.start(workload.predict(out, "--scheduler", address))
        if not wait_for(run_folder(out) / "journal.jsonl", process):
            return f"the cluster did not work: {end(process).err[-300:]}"
        time.sleep(0.5)
        killed = parts[1:] if what == "workers" else parts[:1]
        for part in killed:
            os.killpg(part.pid, signal.SIGKILL)
        start = time.monotonic()
        ended = end(process, 2 * BOUND)
        seconds = time.monotonic() - start
    if ended.code == 0:
        figures["finished_before"] += 1
        return workload.compare(out)
    figures["lost_clusters"] += 1
    figures["longest_wait_s"] = max(figures["longest_wait_s"], round(seconds))
    if ended.code != LOST or not ended.is_one_line() or seconds > BOUND:
        return f"{what} lost: exit {ended.code} after {seconds:.0f} s: {ended.err[-400:]}"
    problem = workload.rerun(out)
    remove(out)
    return f"{what} lost: {problem}" if problem else ""


@contextmanager
def _cluster(
    workload: Workload, folder: Path
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers on this machine; each in a process group of its own."""
    file = folder / "scheduler.json"
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1"]
    lines = [
        ["scheduler", *common, "--port", "0", "--no-dashboard"],
        *[["worker", *common, "--nthreads", "2", "--no-dashboard", "--no-nanny"]] * 2,
    ]
    parts: list[subprocess.Popen[bytes]] = []
    try:
        for line in lines:
            log = (folder / "cluster.log").open("ab")
            parts.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dask", *line],
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=workload.environment,
                    start_new_session=True,
                )
            )
            while not file.exists() and parts[0].poll() is None:
                time.sleep(0.05)
        yield json.loads(file.read_text())["address"], parts
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
