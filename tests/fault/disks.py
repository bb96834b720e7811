"""Disks of the suite's own: small ones, and images that a power cut can be taken of. Needs root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def _do(*line: object) -> str:
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


@contextmanager
def _mounted(point: Path, *line: object) -> Iterator[Path]:
    point.mkdir()
    _do("mount", *line, point)
    try:
        yield point
    finally:
        _unmount(point)


def _unmount(point: Path) -> None:
    for _ in range(50):  # a process that was killed may take a moment to let go
        if subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    _do("umount", "--lazy", point)


@contextmanager
def small_disk(point: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes, in memory."""
    with _mounted(point, "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as disk:
        yield disk


def resize(disk: Path, size: int) -> None:
    """Give a small disk another size; not less than what is on it."""
    _do("mount", "-o", f"remount,size={size}", disk)


def make_image(image: Path, megabytes: int) -> None:
    """Make an image with an empty ext4 in it."""
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    _do("mkfs.ext4", "-q", "-F", image)


@contextmanager
def image_disk(image: Path, point: Path, options: str = "loop") -> Iterator[Path]:
    """An image as a disk."""
    with _mounted(point, "-t", "ext4", "-o", options, image) as disk:
        yield disk


def cut(image: Path, disk: Path, copy: Path, freeze: Callable[[], None]) -> bool:
    """Copy the image of a mounted disk as a power cut would leave it.

    A copy takes time, and one of two moments is no cut: it counts only if nothing reached the image
    meanwhile. If the first does not, `freeze` stops who writes; what is under way ends by itself.
    Returns whether that was needed.
    """
    device = Path(_do("findmnt", "-n", "-o", "SOURCE", disk).strip()).name
    statistics = Path(f"/sys/block/{device}/stat")
    for attempt in range(1000):
        if attempt == 1:
            freeze()
        before = _writes(statistics)
        _do("cp", "--sparse=always", image, copy)
        if before is not None and _writes(statistics) == before:
            return attempt > 0
    raise AssertionError("the disk was never at rest")


def _writes(statistics: Path) -> str | None:
    """Return a device's writes and flushes so far, None if one is under way."""
    fields = statistics.read_text().split()
    return None if fields[8] != "0" else " ".join([*fields[4:7], *fields[15:]])
