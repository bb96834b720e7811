"""One raster of many blocks, from an empty or half-done run folder to its finished mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tilenet import durable
from tilenet.engine.admission import revoke
from tilenet.engine.decided import files_of
from tilenet.engine.document import Finished, encode_document, plan_document
from tilenet.engine.executor import Executor
from tilenet.engine.journal import UPPER, BlockRecord, Journal, drop, records_of
from tilenet.engine.leftovers import remove_leftovers
from tilenet.engine.lost import mark_lost
from tilenet.engine.meter import Meter
from tilenet.engine.output import (
    check_in_progress,
    check_output,
    export,
    publish,
    upper_levels,
)
from tilenet.engine.plan import Plan
from tilenet.engine.replaced import put_back
from tilenet.engine.room import check_room, with_room
from tilenet.engine.run import Progress, run_blocks
from tilenet.engine.runfolder import (
    PLAN,
    STORE,
    STRIPS,
    Owner,
    locked,
    remove_run_folder,
    run_folder,
)
from tilenet.engine.task import forget_run
from tilenet.errors import OutputError, ResourceError, convert_errors
from tilenet.geometry import Window
from tilenet.sinks import MaskStore
from tilenet.sources import open_raster
from tilenet.watchdog import watched

__all__ = [
    "JOURNAL",
    "Copy",
    "LargeResult",
    "check_unchanged",
    "complete",
    "journals",
    "run_large",
    "set_up",
]

_logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
_MERGED = 1024  # records at a time


@dataclass(frozen=True, slots=True)
class LargeResult:
    """What became of a raster of many blocks.

    Parameters
    ----------
    done : Finished
        Figures.
    resumed : int
        Blocks that an earlier run had finished.
    meter : Meter
        What this run took.
    missing : int
        Blocks that are left to other parts.
    """

    done: Finished
    resumed: int
    meter: Meter
    missing: int = 0


class Copy(Protocol):
    """Where a copy of the store grows, block by block."""

    def take(self, root: Path, records: Iterable[BlockRecord]) -> None:
        """Copy blocks of the store at `root`, now or soon."""

    def drain(self) -> None:
        """Return when all that was taken is copied."""


def journals(folder: Path) -> list[Path]:
    """Return the journals in a run folder: that of whole runs and those of parts."""
    return sorted(folder.glob("journal*.jsonl"))


def _adopt(plan: Plan, out: Path, folder: Path, *, overwrite: bool) -> Plan:
    """Return the plan to go on with; empties the folder for a new one.

    A resume keeps the blocks as they were cut; where raster and model lie may have changed.
    """
    known = check_in_progress(out, plan, overwrite=overwrite)
    # Without its store, a journal is that of a run which was finished but for this folder.
    if known is not None and known.hash == plan.hash and (folder / STORE).exists():
        return replace(plan, lattice=known.lattice)
    revoke(folder)
    (folder / PLAN).unlink(missing_ok=True)
    for path in journals(folder):
        path.unlink()
    for name in (STORE, STRIPS):
        if (folder / name).exists():
            durable.remove_folder(folder / name)
    return plan


def set_up(plan: Plan, out: Path, folder: Path, *, overwrite: bool = False) -> Plan:
    """Prepare a run folder, or take up what is in it; return the plan to go on with.

    Raises
    ------
    OutputError
        An unfinished run there has another plan.
    """
    plan = _adopt(plan, out, folder, overwrite=overwrite)
    (folder / STRIPS).mkdir(exist_ok=True)
    store = MaskStore(folder / STORE, plan.spec)
    if not store.root.exists():
        store.create()
    durable.write(folder / PLAN, plan.dump())
    return plan


def check_unchanged(plan: Plan) -> None:
    """Raise unless the source is what was planned."""
    # A mosaic opens all its scenes.
    with watched(plan.raster.path, plan.read_timeout * max(1, len(plan.raster.scenes))):
        now = open_raster(plan.raster.path, plan.raster.view).info
    if now.fingerprint != plan.raster.fingerprint:
        raise OutputError(
            "the source changed while it was read",
            plan.raster.path,
            "run again with --overwrite once it is at rest",
            code=3,
        )
    if plan.area is not None:
        plan.area.check()


def run_large(
    plan: Plan,
    out: Path,
    executor: Executor,
    progress: Progress,
    *,
    overwrite: bool,
    copy: Copy | None = None,
) -> LargeResult:
    """Run a plan to its finished output, going on where an earlier run stopped.

    Parameters
    ----------
    plan : Plan
        The run.
    out : Path
        The mask's final name.
    executor : Executor
        Where the tasks run.
    progress : callable
        Called with finished pixels.
    overwrite : bool
        Replace an output or an unfinished run of ours.
    copy : Copy, optional
        Gets what is done.

    Raises
    ------
    OutputError
        Another run owns the output, or an unfinished one has another plan.
    ResourceError
        The run does not fit on the disk.
    """
    folder = run_folder(out)
    if not folder.exists():
        check_room(plan, out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with convert_errors(out):
            return _run(plan, out, folder, executor, progress, overwrite=overwrite, copy=copy)
    except ResourceError as error:
        raise with_room(error, plan, out) from error


def _run(
    plan: Plan,
    out: Path,
    folder: Path,
    executor: Executor,
    progress: Progress,
    *,
    overwrite: bool,
    copy: Copy | None,
) -> LargeResult:
    with locked(folder) as owner:
        put_back(out)
        done = _finished_meanwhile(plan, out, folder, overwrite=overwrite)
        if done is not None:
            progress(plan.raster.height * plan.raster.width)
            return LargeResult(done, plan.lattice.blocks, Meter())
        plan = set_up(plan, out, folder, overwrite=overwrite)
        with _journal(plan, folder, owner, copy) as journal:
            resumed = len([b for b in journal.blocks if b >= 0])
            progress(sum(journal.pixels.values()))
            try:
                meter = run_blocks(plan, folder, journal, executor, progress)
            finally:
                forget_run(folder)
            check_unchanged(plan)
            owner.check()
            with meter.writing():
                done = _finish(
                    plan, folder, out, journal, executor.check_wanted,
                    overwrite=overwrite, copy=copy,
                )  # fmt: skip
        remove_run_folder(folder)
    return LargeResult(done, resumed, meter)


def _finished_meanwhile(plan: Plan, out: Path, folder: Path, *, overwrite: bool) -> Finished | None:
    """Return the figures of the output if another run made it since this one looked."""
    try:
        done = check_output(out, plan, overwrite=overwrite)
    except OutputError:
        if not (folder / PLAN).exists():  # the folder is ours, and empty
            remove_run_folder(folder)
        raise
    if done is not None:
        remove_run_folder(folder)
    return done


def _is_gone(root: Path, record: BlockRecord) -> bool:
    """Whether a file that a journal lists is not there: nothing else would tell it from 255."""
    try:
        return any(
            digest is not None and (root / path).stat().st_size != size
            for path, digest, size in record.files
        )
    except FileNotFoundError:
        return True


def _drop_gone(folder: Path) -> None:
    """Take blocks whose files somebody has removed out of the journals: they are made again."""
    gone = partial(_is_gone, folder / STORE)
    dropped = sum(drop(path, gone) for path in journals(folder))
    if dropped:
        _logger.warning("%d finished blocks have lost files, and are made again", dropped)
        for path in journals(folder):
            drop(path, lambda record: record.block == UPPER)


@contextmanager
def _journal(plan: Plan, folder: Path, owner: Owner, copy: Copy | None) -> Iterator[Journal]:
    """Open the journal of a whole run; what parts have made becomes its own."""
    _drop_gone(folder)
    store = MaskStore(folder / STORE, plan.spec)
    after = _nothing if copy is None else partial(copy.take, store.root)
    with Journal(folder / JOURNAL, owner.check, after) as journal:
        if copy is not None:
            copy.take(store.root, journal.records())
        for path in journals(folder):
            if path.name != JOURNAL:
                for records in batched(records_of([path]), _MERGED):
                    journal.append(records)
        remove_leftovers(folder, plan.lattice, journal.blocks)
        mark_lost(folder, journal.invalid, range(plan.lattice.blocks))
        yield journal


def complete(plan: Plan, out: Path, folder: Path, check: Callable[[], None]) -> Finished:
    """Finish a mask of which parts have made every block, when none of them is at work any more.

    Raises
    ------
    OutputError
        Another run has taken the folder away.
    """
    with locked(folder, last_part=True) as owner:
        put_back(out)
        done = check_output(out, plan, overwrite=False)  # one that was killed had just finished it
        if done is None:
            plan = set_up(plan, out, folder)
            with _journal(plan, folder, owner, None) as journal:
                if len(journal.blocks - {UPPER}) < plan.lattice.blocks:
                    raise OutputError("finished blocks have gone", folder, "run all parts again")
                owner.check()
                done = _finish(plan, folder, out, journal, check, overwrite=False, copy=None)
        remove_run_folder(folder)
    return done


def _nothing(_records: Iterable[BlockRecord]) -> None:
    pass


def _finish(
    plan: Plan,
    folder: Path,
    out: Path,
    journal: Journal,
    check: Callable[[], None],
    *,
    overwrite: bool,
    copy: Copy | None,
) -> Finished:
    """Upper levels, metadata, export, final name: each may be done again after a crash.

    What takes long asks now and then, by `check`, whether it is still wanted.
    """
    store = MaskStore(folder / STORE, plan.spec)
    if any(_is_gone(store.root, record) for record in records_of([folder / JOURNAL])):
        raise ResourceError("files of finished blocks have gone", store.root, "a rerun resumes")

    def read(array: str, window: Window) -> NDArray[np.uint8]:
        check()
        return store.read(array, window)

    if UPPER not in journal.blocks:
        stored = upper_levels(store, plan.block_levels + 1)
        journal.append([BlockRecord(UPPER, files_of(stored), {}, 0, 0)])
    blocks = plan.lattice.blocks
    invalid = tuple(sorted(journal.invalid, key=astuple))  # the same for any order of work
    done = Finished(dict(journal.pixels), journal.tiles, journal.tiles_skipped, blocks, invalid)
    done.check(plan)
    if copy is not None:
        copy.drain()  # before the store gets another name
    if plan.format == "zarr":
        document = encode_document(plan_document(plan, done))
        store.finish(done.pixels, {"plan": document, "journal": journal.dump()})
        publish(store.root, out, overwrite=overwrite, label=plan.label is not None)
    else:
        export(
            plan_document(plan, done),
            plan.spec,
            partial(read, "mask"),
            partial(read, "prob"),
            out,
            journal.records(),
            overwrite=overwrite,
        )
    return done
