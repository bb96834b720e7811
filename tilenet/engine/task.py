"""What a worker does: forward a block, join a block. Pure tasks that find all they need on disk.

A task is named by its plan's file in the run folder and its blocks' numbers; results stay in files,
and only small reports travel. Doing a task twice, or in two places at once, gives the same files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.classes import NODATA
from tilenet.engine import spill
from tilenet.engine.admission import Admission
from tilenet.engine.block import BlockJob, Forwarded, drive, join
from tilenet.engine.decided import record_of, unreadable, write_block
from tilenet.engine.journal import NEIGHBOUR, BlockRecord
from tilenet.engine.lost import is_lost
from tilenet.engine.meter import Spans
from tilenet.engine.plan import Plan
from tilenet.engine.reading import read_window
from tilenet.engine.runfolder import STORE, STRIPS
from tilenet.errors import UnfitError
from tilenet.geometry import Window
from tilenet.memory import return_freed
from tilenet.models.session import Session, Setup, open_session
from tilenet.models.store import ModelFiles
from tilenet.sinks import MaskStore, StoredChunk
from tilenet.sources import Raster, open_handle
from tilenet.watchdog import watched

__all__ = [
    "Blocks",
    "Worker",
    "finish_block",
    "forget_run",
    "forward_task",
    "join_task",
    "mend_task",
    "session_for",
]

Blocks = tuple[int, ...]
"""The blocks of one task: one, or several small ones."""

_sessions: dict[tuple[str, Setup, str], Session] = {}
_sessions_lock = threading.Lock()
_workers: dict[tuple[str, str], Worker] = {}
_workers_lock = threading.Lock()
_MOST_SESSIONS, _MOST_WORKERS = 4, 8  # that are kept; whoever uses another one keeps it alive


def _kept[K, V](table: dict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """Return what a table has under a key, or make it when what was used longest ago has gone."""
    if (found := table.pop(key, None)) is None:
        while len(table) >= most:
            del table[next(iter(table))]
        found = make()
    table[key] = found
    return found


def session_for(
    files: ModelFiles, setup: Setup, dtype: str, admission: Admission | None = None
) -> Session:
    """Return this process's session for a model, loading it if it is none of the last few.

    Parameters
    ----------
    files : ModelFiles
        The model.
    setup : Setup
        The run's.
    dtype : str
        Numpy name of the pixels.
    admission : Admission, optional
        This worker's to the run.

    Raises
    ------
    UnfitError
        This worker cannot run it.
    """
    key = (files.sha256, setup, dtype)
    if admission is not None:
        admission.check_versions(setup.library)

    def load() -> Session:
        here, own = (files, setup) if admission is None else admission.network(files, setup)
        return open_session(here, own, dtype)

    with _sessions_lock:
        return _kept(_sessions, key, load, _MOST_SESSIONS)


def _decided(done: Forwarded) -> dict[str, NDArray[Any]]:
    """Return what of a block's half is no sums, as named arrays."""
    own = {"mask": done.mask, "tiles": np.array([done.tiles_forwarded, done.tiles_skipped])}
    if done.probabilities is not None:
        own["probabilities"] = done.probabilities
    if done.failed:
        own["unreadable"] = np.array([astuple(window) for window, _ in done.failed])
    return own


@dataclass(frozen=True)
class Worker:
    """One run as a worker process sees it.

    Parameters
    ----------
    folder : Path
        The run folder.
    plan : Plan
        Read from it.
    raster : Raster
        The input.
    store : MaskStore
        The store in progress.
    admission : Admission or None
        None without a cluster.
    """

    folder: Path
    plan: Plan
    raster: Raster
    store: MaskStore
    admission: Admission | None = None

    @classmethod
    def at(cls, file: Path, admission: Admission | None = None) -> Worker:
        """Return the worker of a plan's file in a run folder."""
        plan, folder = Plan.load(file.read_bytes()), file.parent
        return cls(
            folder,
            plan,
            Raster(plan.raster, open_handle, area=plan.area),
            MaskStore(folder / STORE, plan.spec),
            admission,
        )

    @property
    def session(self) -> Session:
        """The network, shared by all runs of this process."""
        plan = self.plan
        return session_for(plan.model, plan.setup, plan.raster.dtype, self.admission)

    def strips(self, name: str) -> Path:
        """Return the path of a spilled file."""
        return self.folder / STRIPS / name

    def forward(
        self, block: int, spans: Spans, only: Window | None = None, allocate: Any = None
    ) -> Forwarded:
        """Read a block and forward its own tiles."""
        plan = self.plan
        damaged: list[Window] = []
        with spans.reading(), watched(plan.raster.path, plan.read_timeout):
            pixels, valid = self.raster.read(
                read_window(plan.lattice, block, plan.model.card.margin),
                plan.model.card.offset,
                None if plan.strict else damaged,
            )
        with spans.preparing():
            session = self.session
        job = BlockJob(
            plan.lattice,
            block,
            valid,
            channels=plan.channels,
            blend=plan.blend,
            decision=plan.decision,
            probabilities=plan.probabilities and only is None,
            skip=plan.skip_nodata,
            only=only,
            margin=plan.model.card.margin,
            **({} if allocate is None else {"allocate": allocate}),
        )
        loaded = session.load(pixels) if job.parts else None
        with spans.using(session.lock):
            drive(session, [(job, loaded)], plan.lattice.tile_shape, spans)
            done = job.finish()
        spans.forwarded += done.tiles_forwarded
        spans.nonfinite += done.nonfinite
        return replace(done, failed=unreadable(damaged, plan.lattice.core(block)))

    def forward_to_files(self, block: int, spans: Spans) -> None:
        """Forward a block into the run folder: strips, frames and, last, what is decided."""
        lattice = self.plan.lattice
        own = spill.name_for(lattice, block, block)
        files: dict[str, spill.SpillWriter] = {}

        def allocate(part: str | int, shape: tuple[int, int, int]) -> spill.RowsWriter:
            taker = block if isinstance(part, str) else part
            return files[spill.name_for(lattice, block, taker)].rows(str(part), shape)

        try:
            for name in spill.needed_by(lattice, block):
                files[name] = spill.SpillWriter(self.strips(name))
            done = self.forward(block, spans, allocate=allocate)
            self._check_current()
            with spans.writing():
                for name in sorted(files, key=own.__eq__):  # where it is, the other one is
                    spans.strip_bytes += files[name].close(_decided(done) if name == own else {})
        except BaseException:
            for file in files.values():
                file.abandon()
            raise

    def _check_current(self) -> None:
        if self.admission is not None:
            self.admission.check_current()

    def _spilled(self, giver: int, taker: int, files: ExitStack) -> spill.SpillReader:
        name = spill.name_for(self.plan.lattice, giver, taker)
        return files.enter_context(closing(spill.SpillReader(self.strips(name))))

    def own_half(self, block: int, spans: Spans, files: ExitStack) -> Forwarded:
        """Return a block's half, made again if its file is lost."""
        lattice, channels = self.plan.lattice, self.plan.channels
        core, (rows, cols) = lattice.core(block), lattice.shared(block)
        try:
            found = self._spilled(block, block, files)
            upper = found.rows("top", (channels, rows, core.width))
            lower = found.rows("left", (channels, core.height - rows, cols))
            mask, probabilities = found.array("mask"), found.array("probabilities")
            tiles, damaged = found.array("tiles"), found.array("unreadable")
        except ValueError:
            return self.forward(block, spans)
        assert mask is not None
        assert tiles is not None
        windows = [Window(*map(int, one)) for one in (() if damaged is None else damaged)]
        failed = unreadable(windows, core)
        forwarded, skipped = tiles.tolist()
        return Forwarded(mask, probabilities, upper, lower, {}, forwarded, skipped, 0, failed)

    def strip(self, giver: int, taker: int, spans: Spans, files: ExitStack) -> Any:
        """Return a strip's rows, remade from its owner's edge tiles if its file is lost."""
        window = self.plan.lattice.strip(giver, taker)
        shape = (self.plan.channels, window.height, window.width)
        try:
            return self._spilled(giver, taker, files).rows(str(taker), shape)
        except ValueError:
            return self.forward(giver, spans, window).strips[taker]

    def write(
        self, block: int, mask: NDArray[np.uint8], probabilities: NDArray[np.uint8] | None
    ) -> list[StoredChunk]:
        """Store a decided block: chunks, probabilities, and the pyramid levels it makes alone."""
        self._check_current()
        return write_block(self.store, self.plan.lattice, block, mask, probabilities)


def _worker(file: str, run: str) -> Worker:
    """Return this process's worker of a run; a later run of its folder is another one."""
    with _workers_lock:
        return _kept(_workers, (file, run), lambda: _admitted(Path(file), run), _MOST_WORKERS)


def _admitted(file: Path, run: str) -> Worker:
    admission = Admission.check_in(file.parent, run)
    worker = Worker.at(file, admission)
    admission.check_raster(worker.plan.raster, worker.plan.area, worker.plan.read_timeout)
    return worker


def forget_run(folder: Path) -> None:
    """Close the input of a run folder's runs that this process has worked on."""
    with _workers_lock:
        for key in [key for key in _workers if Path(key[0]).parent == folder.absolute()]:
            del _workers[key]


def forward_task(file: str, run: str, blocks: Blocks) -> tuple[Blocks, Spans]:
    """Forward blocks into the run folder's strips."""
    worker, spans = _worker(file, run), Spans()
    for block in blocks:
        worker.forward_to_files(block, spans)
    return blocks, spans.close()


def join_task(file: str, run: str, blocks: Blocks) -> tuple[list[BlockRecord], Spans]:
    """Join blocks and store them; their records are true when this returns.

    One that needs a lost strip, where this worker cannot run the network, has no record.
    """
    worker, spans = _worker(file, run), Spans()
    records = []
    for block in blocks:
        with suppress(UnfitError):
            records.append(_join(worker, block, spans))
    return_freed()
    return records, spans.close()


def mend_task(file: str, run: str, blocks: Blocks) -> tuple[list[BlockRecord], Spans]:
    """Join blocks of which strips are lost, on a worker that runs the network."""
    worker, spans = _worker(file, run), Spans()
    return [_join(worker, block, spans) for block in blocks], spans.close()


def finish_block(worker: Worker, block: int, spans: Spans) -> Forwarded:
    """Return a block joined with its neighbours' strips, each from its file or made again."""
    lattice = worker.plan.lattice
    core = lattice.core(block)
    with ExitStack() as files:
        own, strips = worker.own_half(block, spans, files), {}
        for giver in lattice.givers(block):
            if is_lost(worker.folder, giver):
                window = lattice.strip(giver, block)
                own.mask[window.slices(core.row, core.col)] = NODATA
                own = replace(own, failed=(*own.failed, (window, NEIGHBOUR)))
            else:
                strips[giver] = worker.strip(giver, block, spans, files)
        read = [(block, own.top), (block, own.left), *strips.items()]
        spans.strip_reads += [
            (giver, rows.size) for giver, rows in read if isinstance(rows, spill.RowsReader)
        ]
        with spans.writing():
            join(lattice, block, own, strips, worker.plan.decision)
    return own


def _join(worker: Worker, block: int, spans: Spans) -> BlockRecord:
    own = finish_block(worker, block, spans)
    with spans.writing():
        stored = worker.write(block, own.mask, own.probabilities)
        spans.pixels += own.mask.size
        return record_of(block, own, stored, len(worker.plan.spec.classes))
