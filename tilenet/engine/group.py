"""Small one-file masks that get their names together: one group of syncs for a whole pack.

Alone, each would take a run folder, a lock and four syncs of its own, which cost as much as a small
network. Writers of one folder take turns by the kernel's lock on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet import durable
from tilenet.engine.document import (
    Finished,
    encode_sidecar,
    file_document,
    plan_document,
    read_sidecar,
    sidecar,
)
from tilenet.engine.journal import BlockRecord
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import run_folder
from tilenet.errors import OutputError
from tilenet.sinks import encode_png

__all__ = ["FileGroup"]


class Place:
    """Where a mask goes, and what must not be there.

    Parameters
    ----------
    out : Path
        Its name.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.sidecar = out, sidecar(out)
        self._taken = (out, out.with_name(f"{out.name}.aux.xml"), run_folder(out))

    def is_free(self) -> bool:
        """Whether nothing is there but, after a crash, the document of a mask that is not."""
        if any(os.path.lexists(path) for path in self._taken):
            return False
        return not os.path.lexists(self.sidecar) or read_sidecar(self.out) is not None


@dataclass(frozen=True, slots=True)
class _File:
    place: Place
    data: bytes
    document: bytes
    done: Callable[[OutputError | None], None]


class FileGroup:
    """Masks of one block each, as PNG, that are encoded and wait to be written."""

    def __init__(self) -> None:
        self._files: list[_File] = []

    @staticmethod
    def place_for(plan: Plan, out: Path) -> Place | None:
        """Return the place of a mask that can be written here: a PNG where nothing is yet."""
        place = Place(out) if plan.format == "png" and not plan.probabilities else None
        return place if place is not None and place.is_free() else None

    def add(
        self,
        plan: Plan,
        mask: NDArray[np.uint8],
        figures: tuple[Finished, BlockRecord],
        place: Place,
        done: Callable[[OutputError | None], None],
    ) -> None:
        """Encode a mask; it gets its name with the others.

        Parameters
        ----------
        plan : Plan
            Its run.
        mask : ndarray, shape (h, w), uint8
            Its pixels.
        figures : (Finished, BlockRecord)
            What its document says of it.
        place : Place
            From `place_for`.
        done : callable
            Called with None once it is on disk, or with why it is not.
        """
        finished, record = figures
        data = encode_png(mask, plan.spec, place.out)
        written = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        document = file_document(plan_document(plan, finished), [record]) | written
        self._files.append(_File(place, data, encode_sidecar(document), done))

    def write(self) -> None:
        """Write all that wait.

        Raises
        ------
        OSError
            As the system says; nothing has got its name.
        """
        files, self._files = self._files, []
        for folder, same in groupby(files, key=lambda file: file.place.out.parent):
            with _turn(folder):
                free = []
                for file in same:
                    if file.place.is_free():
                        free.append(file)
                    else:
                        what = "another run writes this output"
                        file.done(OutputError(what, file.place.out, "run again"))
                # The document first: whatever a crash leaves is known as ours.
                durable.write_all(
                    [part for file in free
                     for part in (
                         (file.place.sidecar, file.document), (file.place.out, file.data)
                     )]
                )  # fmt: skip
            for file in free:
                file.done(None)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
