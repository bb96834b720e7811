"""Small one-file masks that get their names together: one group of syncs for a whole pack.

Alone, each would take a run folder, a lock and four syncs of its own, which cost as much as a small
network. Writers of one folder take turns by the kernel's lock on it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
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
from tilenet.errors import OutputError, error_of_one
from tilenet.filelock import turn
from tilenet.sinks import encode_png

__all__ = ["FileGroup"]

Done = Callable[[Exception | None], None]
"""Called with None once a mask is on disk, or with why it is not; raises what concerns all."""


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
    done: Done

    def parts(self) -> tuple[tuple[Path, bytes], ...]:
        """Return what is written; the document first: whatever a crash leaves is known as ours."""
        return (self.place.sidecar, self.document), (self.place.out, self.data)


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
        done: Done,
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
            See `Done`.
        """
        finished, record = figures
        data = encode_png(mask, plan.spec, place.out)
        written = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        document = file_document(plan_document(plan, finished), [record]) | written
        self._files.append(_File(place, data, encode_sidecar(document), done))

    def write(self) -> None:
        """Write all that wait; those that cannot be are told of, and are in nobody's way.

        Raises
        ------
        OSError
            As the system says, if it concerns all; some may have got their names by then.
        """
        files, self._files = self._files, []
        for folder, same in groupby(files, key=lambda file: file.place.out.parent):
            _write_folder(folder, list(same))


def _write_folder(folder: Path, files: list[_File]) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(turn(folder))
        except (OSError, OutputError) as error:
            for file in files:
                file.done(error)
            return
        free = list[_File]()
        for file in files:
            if file.place.is_free():
                free.append(file)
            else:
                what = "another run writes this output"
                file.done(OutputError(what, file.place.out, "run again"))
        _write(free)


def _write(files: list[_File]) -> None:
    """Write files of one folder together; if some cannot be, find out by halves which."""
    try:
        durable.write_all([part for file in files for part in file.parts()])
    except OSError as error:
        if error_of_one(error, "") is None:
            raise
        if len(files) > 1:
            half = len(files) // 2
            _write(files[:half])
            _write(files[half:])
        else:
            # Of a rename, the new name says more than the temporary one.
            where = error.filename2 or error.filename
            files[0].done(OSError(error.errno, error.strerror, where))
    else:
        for file in files:
            file.done(None)
