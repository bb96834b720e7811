"""A part of one raster of many blocks, made beside other parts in one run folder.

Each part has its own blocks, journal, plan file and lock. Nobody waits for another's blocks: what
they would have given and is not there yet is made again. Whoever finds every block in the journals
finishes the mask, as a whole run with nothing left to forward would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from tilenet import durable
from tilenet.engine.document import Finished
from tilenet.engine.executor import Executor
from tilenet.engine.journal import Journal, Tally, records_of
from tilenet.engine.large import LargeResult, check_unchanged, complete, journals, set_up
from tilenet.engine.lost import mark_lost
from tilenet.engine.meter import Meter
from tilenet.engine.output import check_output, sweep
from tilenet.engine.plan import Plan
from tilenet.engine.room import check_room, with_room
from tilenet.engine.run import Progress, run_blocks
from tilenet.engine.runfolder import part_locked, run_folder, set_up_alone
from tilenet.engine.state import Share
from tilenet.engine.task import forget_run
from tilenet.errors import OutputError, ResourceError, convert_errors
from tilenet.part import Part

__all__ = ["run_part"]


def run_part(
    plan: Plan, out: Path, part: Part, executor: Executor, progress: Progress
) -> LargeResult:
    """Make a part's blocks; finish the mask if it has every block then.

    Parameters
    ----------
    plan : Plan
        The run.
    out : Path
        The mask's final name.
    part : Part
        Which share of the blocks.
    executor : Executor
        Where the tasks run.
    progress : callable
        Called with finished pixels of this part.

    Raises
    ------
    OutputError
        A whole run owns the output, another process has this part, or there is another plan's work.
    ResourceError
        The run does not fit on the disk.
    """
    try:
        return _unless_done(lambda: _run(plan, out, part, executor, progress), plan, out)
    except ResourceError as error:
        raise with_room(error, plan, out) from error


def _unless_done(run: Callable[[], LargeResult], plan: Plan, out: Path) -> LargeResult:
    """Run, unless the mask is there or appears meanwhile: its run folder is gone then."""
    done = check_output(out, plan, overwrite=False)
    if done is None:
        try:
            with convert_errors(out):
                return run()
        except OutputError:
            done = check_output(out, plan, overwrite=False)
            if done is None:
                raise
    with suppress(OutputError):  # who has just finished it is still there
        sweep(out, plan)
    return LargeResult(done, done.blocks, Meter())


@dataclass(frozen=True, slots=True)
class _Made:
    """What a part has made: so many blocks, and what all journals list now."""

    plan: Plan
    meter: Meter
    blocks: int
    found: Tally


def _run(plan: Plan, out: Path, part: Part, executor: Executor, progress: Progress) -> LargeResult:
    if plan.lattice.blocks == 1:  # a small raster is made in one go, without a run folder
        return LargeResult(Finished({}, 0, 0, 1), 0, Meter(), missing=1)
    folder = run_folder(out)
    if not folder.exists():
        check_room(plan, out)
    folder.mkdir(parents=True, exist_ok=True)
    made = _make(plan, out, folder, part, executor, progress)
    missing = made.plan.lattice.blocks - len(made.found.blocks)
    resumed = len(made.found.blocks) - made.blocks
    if missing:
        return LargeResult(_figures(made, part), resumed, made.meter, missing)

    def finish() -> LargeResult:
        with made.meter.writing():
            done = complete(made.plan, out, folder, executor.check_wanted)
        return LargeResult(done, resumed, made.meter)

    return replace(_unless_done(finish, made.plan, out), resumed=resumed, meter=made.meter)


def _make(
    plan: Plan, out: Path, folder: Path, part: Part, executor: Executor, progress: Progress
) -> _Made:
    """Make what is left of a part's blocks."""
    file, journal_file = f"plan.{part.name}.json", f"journal.{part.name}.jsonl"
    with part_locked(folder, part) as owner:
        if check_output(out, plan, overwrite=False) is not None:
            raise OutputError("another run has just finished this output", out, "look at it")
        with set_up_alone(folder):
            plan = set_up(plan, out, folder)
        durable.write(folder / file, plan.dump())
        own = part.range_of(plan.lattice.blocks)
        found = _tally(folder)
        mark_lost(folder, found.invalid, own)
        progress(sum(plan.lattice.core(block).pixels for block in found.blocks & set(own)))
        share = Share(own, frozenset(found.blocks), file)
        with Journal(folder / journal_file, owner.check) as journal:
            before = len(journal.blocks)
            try:
                meter = run_blocks(plan, folder, journal, executor, progress, share)
            finally:
                forget_run(folder)
            check_unchanged(plan)
            owner.check()
            return _Made(plan, meter, len(journal.blocks) - before, _tally(folder))


def _tally(folder: Path) -> Tally:
    """Return what the journals of all parts and of whole runs list."""
    return Tally(record for record in records_of(journals(folder)) if record.block >= 0)


def _figures(made: _Made, part: Part) -> Finished:
    """Return the figures of an unfinished mask; of what failed, what is this part's."""
    found, blocks = made.found, made.plan.lattice.blocks
    own = part.range_of(blocks)
    invalid = tuple(sorted((one for one in found.invalid if one.block in own), key=astuple))
    return Finished(dict(found.pixels), found.tiles, found.tiles_skipped, blocks, invalid)
