"""Linux' control groups: what a container or a job may have of its machine (cgroups(7))."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["control_groups", "cpu_limit"]


def control_groups(kind: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process' control groups and of those around them.

    Parameters
    ----------
    kind : {"memory", "cpu"}
        The controller, which in version 1 has groups of its own.
    root : Path
        Where ``proc`` and ``sys`` are.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").split("\n"):
            _, kinds, path = line.split(":", 2)
            if not kinds or kind in kinds.split(","):
                all_groups = root / "sys/fs/cgroup" / (kind if kinds else "")
                own = all_groups / path.lstrip("/")
                yield own
                yield from (one for one in own.parents if one.is_relative_to(all_groups))


def cpu_limit(root: Path = Path("/")) -> int | None:
    """Return how many processors' time this process may take, rounded up; None if all of them."""
    limits = []
    for folder in control_groups("cpu", root):
        with suppress(OSError, ValueError):  # "max", or −1 in version 1: there is none
            if (folder / "cpu.max").exists():
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:
                limits.append(math.ceil(quota / period))
    return min(limits, default=None)
