"""Make the Nth call of a run fail, or kill the run there: `inject.c` and what it is told."""

from __future__ import annotations

import errno
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workload import Workload, remove

CALLS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "truncate", "close", "read", "map")
KILL = 0


@dataclass(frozen=True)
class Point:
    """A call of a run, and what becomes of it.

    Parameters
    ----------
    call : str
        One of `CALLS`.
    nth : int
        Which of them, from 1.
    error : int
        The errno it fails with; `KILL`: the run is killed there.
    lasting : bool
        All later ones fail too.
    """

    call: str
    nth: int
    error: int = KILL
    lasting: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error else "kill"
        return f"{what} at {self.call} {self.nth}{' and on' if self.lasting else ''}"

    def environment(self, out: Path) -> dict[str, str]:
        """Return what a run that writes `out` is started with; `log(out)` gets what it does."""
        return {
            "LD_PRELOAD": str(_library(out.parent.parent)), "INJECT_FOLDER": str(out.parent),
            "INJECT_CALL": self.call, "INJECT_NTH": str(self.nth), "INJECT_ERROR": str(self.error),
            "INJECT_LOG": str(log(out)), **({"INJECT_LASTING": "1"} if self.lasting else {}),
        }  # fmt: skip


def log(out: Path) -> Path:
    """Return where the calls of a run are noted: outside what they are counted in."""
    return out.parent.with_suffix(".log")


def was_hit(out: Path) -> bool:
    """Whether a run came to its point."""
    path = log(out)
    return path.exists() and any(line.startswith("hit ") for line in path.open(errors="replace"))


def points_of(workload: Workload, out: Path) -> Counter[str]:
    """Return how often an undisturbed run makes each call on what it writes."""
    out.parent.mkdir()
    ended = workload.run(workload.predict(out), more=Point("any", 0).environment(out))
    assert ended.code == 0, ended.err
    found = Counter(line.split()[0] for line in log(out).open(errors="replace"))
    remove(out)
    return found


@cache
def _library(folder: Path) -> Path:
    target = folder / "inject.so"
    source = Path(__file__).with_name("inject.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", target, source, "-ldl"], check=True)
    return target
