"""Rot: whatever changes in a finished mask, `tilenet verify` finds it and `--repair` undoes it.

Single bits, anywhere in any of its files; and files that are gone, cut short, exchanged, doubled,
emptied or not ours. Most trials call what the command calls; a share runs the command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from workload import Outcome, Workload, digest, remove

from tilenet import mask_api
from tilenet.errors import InputError, TilenetError

DAMAGED = 8
_FLIPS = (60, 1000)
_COMMANDS = 20  # one trial in so many runs the command
_BEYOND = "damaged beyond repair"


def run(folder: Path, *, long: bool) -> Outcome:
    """Try 60 bits and 28 other damages; long: 1,000 and 280."""
    workload = Workload.at(folder / "tiny")
    os.environ["XDG_CACHE_HOME"] = workload.environment["XDG_CACHE_HOME"]
    figures: Counter[str] = Counter()
    failures: list[str] = []
    dice = random.Random(7)
    for suffix in (".zarr", ".tif"):
        mask = folder / f"mask{suffix}"
        workload.undisturbed(mask.name.replace("mask", "undisturbed"))
        damages = [_flip] * (_FLIPS[long] // 2)
        damages += [one for one in _OTHERS for _ in range(20 if long else 2)]
        for number, damage in enumerate(damages):
            _copy(folder / "tiny" / f"undisturbed{suffix}", mask)
            what = damage(_files(mask), dice)
            check = _by_command if number % _COMMANDS == 0 else _in_process
            problem = check(workload, mask)
            figures[damage.__name__.strip("_")] += 1
            figures[check.__name__.strip("_")] += 1
            if problem == _BEYOND and f"{mask.name}.tilenet.json" in what:
                figures["found_beyond_repair"] += 1
                problem = ""  # the only record of a one-file mask: found is all that can be
            elif not problem and digest(mask) != workload.undisturbed(f"undisturbed{suffix}"):
                problem = "repaired, but other bytes"
            failures += [f"{suffix}, {what}: {problem}"] if problem else []
            remove(mask)
    return Outcome(figures["by_command"] + figures["in_process"], failures, dict(figures))


def _in_process(_workload: Workload, mask: Path) -> str:
    """Return how verifying and repairing a damaged mask went wrong."""
    try:
        if mask_api.verify(mask).ok:
            return "not found"
        repaired = mask_api.verify(mask, repair=True)
        if not repaired.ok:
            return _BEYOND if repaired.bad[0].what == _BEYOND else "not repaired"
    except InputError as error:
        return _BEYOND if _is_no_mask(mask) else f"verify exits 3: {error}"
    except TilenetError as error:
        return f"verify exits {error.code}: {error}"
    return "" if mask_api.verify(mask).ok else "bad after the repair"


def _is_no_mask(mask: Path) -> bool:
    """Whether nothing says any more that a file is a mask of ours."""
    return mask.is_file() and not mask.with_name(f"{mask.name}.tilenet.json").exists()


def _by_command(workload: Workload, mask: Path) -> str:
    """Return the same of the command."""
    found = workload.run(workload.verify(mask))
    if found.code != DAMAGED or not found.is_one_line():
        return _BEYOND if _is_no_mask(mask) else f"verify exits {found.code}: {found.err[-300:]}"
    report = json.loads(found.out)
    if report["bad"][0]["what"] == _BEYOND:
        return _BEYOND
    if report["ok"] or not report["bad"]:
        return f"verify says {found.out[:300]}"
    repaired = workload.run(workload.verify(mask, "--repair"))
    if repaired.code or not json.loads(repaired.out)["ok"]:
        return f"--repair exits {repaired.code}: {repaired.err[-300:]}"
    clean = workload.run(workload.verify(mask))
    return f"verify exits {clean.code} after the repair" if clean.code else ""


def _copy(source: Path, mask: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, mask)
        return
    for path in (source, *source.parent.glob(f"{source.name}.*")):
        shutil.copy(path, mask.with_name(path.name.replace(source.name, mask.name)))


def _files(mask: Path) -> list[Path]:
    """Return all files of a mask that have a byte."""
    found = mask.rglob("*") if mask.is_dir() else [mask, *mask.parent.glob(f"{mask.name}.*")]
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def _flip(files: list[Path], dice: random.Random) -> str:
    """Flip a bit: half of the time in any file, half of the time in any byte."""
    sizes = [file.stat().st_size if dice.random() < 0.5 else 1 for file in files]
    [file] = dice.choices(files, sizes)
    data = bytearray(file.read_bytes())
    bit = dice.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"bit {bit} of {file.name} in {file.parent}"


def _delete(files: list[Path], dice: random.Random) -> str:
    file = _one_of_pixels(files, dice)
    file.unlink()
    return f"without {file}"


def _truncate(files: list[Path], dice: random.Random) -> str:
    file = dice.choice(files)
    size = dice.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file} cut to {size} bytes"


def _zero(files: list[Path], dice: random.Random) -> str:
    file = dice.choice(files)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    return f"{file}: zeros in its second half"


def _append(files: list[Path], dice: random.Random) -> str:
    file = dice.choice(files)
    with file.open("ab") as opened:
        opened.write(b"\0")
    return f"{file}: a byte more"


def _swap(files: list[Path], dice: random.Random) -> str:
    one, other = _two_that_differ(files, dice)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one} and {other} swapped"


def _double(files: list[Path], dice: random.Random) -> str:
    one, other = _two_that_differ(files, dice)
    other.write_bytes(one.read_bytes())
    return f"{other} is a copy of {one}"


def _foreign(files: list[Path], dice: random.Random) -> str:
    """Put a chunk beyond the others into a store, or a byte behind a file."""
    file = _one_of_pixels(files, dice)
    if not file.name.isdigit():  # one file: what else lies beside it is not its own
        return _append(files, dice)
    extra = file.with_name("77")
    extra.write_bytes(file.read_bytes())
    return f"{extra} is not the run's"


def _one_of_pixels(files: list[Path], dice: random.Random) -> Path:
    chunks = [file for file in files if file.name.isdigit()]
    return dice.choice(chunks or [file for file in files if file.name != "mask.tif"] or files)


def _two_that_differ(files: list[Path], dice: random.Random) -> tuple[Path, Path]:
    one = _one_of_pixels(files, dice)
    others = [file for file in files if file.read_bytes() != one.read_bytes()]
    return one, dice.choice([file for file in others if file.name.isdigit()] or others)


_OTHERS: tuple[Callable[[list[Path], random.Random], str], ...] = (
    _delete, _truncate, _zero, _append, _swap, _double, _foreign,
)  # fmt: skip
