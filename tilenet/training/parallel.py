"""Work on many files at once, in threads: GDAL and NumPy release the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tilenet.models.devices import cores

__all__ = ["in_parallel"]


def in_parallel[T, R](work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work` of every item, in their order."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(work, items))
