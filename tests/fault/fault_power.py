"""Power cuts: what the journal calls done is on disk, with the right bytes, and the run goes on.

A run writes into an ext4 image. At a random moment the image is copied while it is mounted: that
is what a cut leaves, because what was not synced is still in memory. The copy is mounted, its
journal is checked against its chunks, and the run is resumed there.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from disks import cut, image_disk, make_image
from workload import Outcome, Workload, end, journaled, remove, run_folder

NEEDS = ("root", "mount", "mkfs.ext4")

_MEGABYTES = 16
_CUTS = (5, 50)
# The second: names may reach the disk before the bytes they name.
_OPTIONS = ("loop,commit=1", "loop,data=writeback")


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 5 cuts; long: 50."""
    workload = Workload.at(folder / "tiny")
    figures: Counter[str] = Counter()
    failures: list[str] = []
    dice = random.Random(4)
    image = folder / "image"
    for trial in range(_CUTS[long]):
        name = ("mask.zarr", "mask.tif")[trial % 2]
        options = _OPTIONS[trial // 2 % 2]
        make_image(image, _MEGABYTES)
        with image_disk(image, folder / "disk", options) as disk:
            figures["frozen"] += _cut_at_random(workload, image, disk / name, dice)
        (folder / "disk").rmdir()
        with image_disk(folder / "copy", folder / "disk", options) as disk:
            problem = _check(workload, disk / name, figures)
            failures += [f"{name}, {options}, cut {trial}: {problem}"] if problem else []
        (folder / "disk").rmdir()
    return Outcome(_CUTS[long] - figures["cut_after_the_end"], failures, dict(figures))


def _cut_at_random(workload: Workload, image: Path, out: Path, dice: random.Random) -> bool:
    """Start a run, and cut while it writes; return whether it had to be frozen for that."""
    workload.undisturbed(f"undisturbed{out.suffix}")
    process = workload.start(workload.predict(out))
    blocks = dice.randrange(17)
    while len(journaled(out)) < blocks and process.poll() is None:
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.05))
    frozen = cut(
        image, out.parent, image.with_name("copy"), lambda: _signal(process, signal.SIGSTOP)
    )
    _signal(process, signal.SIGKILL)
    end(process)
    remove(out)
    return frozen


def _signal(process: subprocess.Popen[str], number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _check(workload: Workload, out: Path, figures: Counter[str]) -> str:
    """Return what the cut has broken."""
    if out.exists():
        figures["cut_after_the_end"] += 1
    records = journaled(out)
    figures["blocks_in_journals"] += len(records)
    for record in records.values():
        for name, sha256, _ in record["files"]:
            file = run_folder(out) / "store" / name
            if not (run_folder(out) / "store").exists() and out.is_dir():
                file = out / name
            found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
            figures["chunks_checked"] += 1
            if found != sha256:
                return f"block {record['block']}: {name} is {found or 'missing'}"
    return workload.rerun(out)
