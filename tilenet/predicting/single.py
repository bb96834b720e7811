"""One raster, or one part of it, to its mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from tilenet.config import PredictConfig
from tilenet.engine.executor import Executor
from tilenet.engine.large import Copy, run_large
from tilenet.engine.meter import Meter, Spans
from tilenet.engine.output import plan_in_progress
from tilenet.engine.pack import PackItem, lose_pack, pack_task, split_pack
from tilenet.engine.part import run_part
from tilenet.engine.plan import Plan
from tilenet.engine.request import Job, Request
from tilenet.engine.run import run_many
from tilenet.engine.runfolder import outside
from tilenet.errors import error_of_one
from tilenet.events import Tracker
from tilenet.part import Part
from tilenet.predicting.asking import (
    Clock,
    cluster_for,
    executor_for,
    meeting,
    named_output,
    plan_of,
    request_for,
    scenes_of,
    seen,
    skip_finished,
)
from tilenet.predicting.telling import (
    say_bottleneck,
    say_nonfinite,
    say_plan,
    say_remarks,
    say_strips,
)
from tilenet.results import PredictResult, RunResult, run_result
from tilenet.sources import Input, RemoteName

__all__ = [
    "item_result",
    "predict_one",
    "result_of",
    "run_large_one",
    "run_one",
    "tell_end",
    "telling_failure",
]

_logger = logging.getLogger(__name__)


def run_large_one(
    plan: Plan,
    out: Path,
    executor: Executor,
    config: PredictConfig,
    progress: Callable[[int], None],
    clock: Clock,
    copy: Copy | None = None,
) -> RunResult:
    """Run a raster of many blocks to its finished mask, and say what it waited for."""
    say_plan(plan)
    large = run_large(plan, out, executor, progress, overwrite=config.overwrite, copy=copy)
    say_nonfinite(large.meter.nonfinite)
    say_strips(large.meter)
    result = run_result(
        plan, out, large.done, large.meter.note_memory(), clock.seconds, resumed=large.resumed
    )
    say_bottleneck(result)
    return result


def item_result(item: PackItem, spans: Spans, seconds: float) -> RunResult:
    """Return the figures of one raster of a pack.

    Those of time are its share, by pixels, of what the pack took.
    """
    assert item.plan is not None
    assert item.out is not None
    assert item.done is not None
    meter = Meter()
    meter.add(spans)
    meter.nonfinite, raster = item.nonfinite, item.plan.raster
    meter.pixels = 0 if item.resumed else raster.height * raster.width
    meter.tiles_forwarded = 0 if item.resumed else item.done.tiles - item.done.tiles_skipped
    blocks = item.done.blocks if item.resumed else 0
    return run_result(item.plan, item.out, item.done, meter, seconds, resumed=blocks)


def tell_end(tracker: Tracker, path: object, run: RunResult, *, resumed: bool) -> None:
    """Tell that a mask is complete, and whether a part of it has no answer."""
    if run.complete:
        tracker.finish(path, run.output, seconds=run.seconds, resumed=resumed)
    if (failure := run.failure()) is not None:
        tracker.fail(path, failure.code, failure.error)


@contextmanager
def telling_failure(tracker: Tracker, path: object) -> Iterator[None]:
    """Tell of an error that is the only input's own; what any would meet leaves it open."""
    try:
        yield
    except Exception as error:
        own = error_of_one(error, path)
        if own is not None:
            tracker.fail(path, own.code, str(own))
        raise


def predict_one(
    found: list[Input], out: Path, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    """Make one mask, or the part of it that is asked for."""
    out = named_output(out, config)
    job = Job(found[0].path.absolute(), out)
    tracker.begin([job.path])
    scenes = scenes_of(found, config)
    if skipped := skip_finished([job], config, tracker, scenes, named=True):
        return PredictResult((), skipped=tuple(skipped.values()))
    known = plan_in_progress(out, overwrite=config.overwrite)
    setup = None if known is None else known.setup
    with cluster_for(config) as cluster:
        request = request_for(config, setup, scenes, cluster)
        with telling_failure(tracker, job.path):
            if config.part is None:
                return run_one(found[0], out, request, tracker, cluster=cluster)
            return _run_part(found[0], out, request, config.part, tracker, cluster)


def _run_part(
    source: Input,
    out: Path,
    request: Request,
    part: Part,
    tracker: Tracker,
    cluster: Executor | None,
) -> PredictResult:
    """Make a part of a mask; of a small one, all of it or nothing."""
    clock, plan = Clock(), plan_of(Job(source.path, out), request)
    own = part.range_of(plan.lattice.blocks)
    if plan.lattice.blocks == 1 and own:
        result = run_one(source, out, request, tracker, cluster=cluster)
        return replace(result, runs=tuple(replace(run, part=str(part)) for run in result.runs))
    say_plan(plan)
    _logger.info("part %s: %d of %d blocks", part, len(own), plan.lattice.blocks)
    path = source.path.absolute()
    tracker.expect(path, sum(band.pixels for band in plan.lattice.bands(own)))
    tracker.all_known()
    tracker.start(path, out, len(own))
    # A part needs no cluster, however large it is.
    with executor_for(request.config, 1, cluster, plan.setup.device_class) as executor:
        large = run_part(plan, out, part, executor, partial(tracker.advance, path))
    meter = large.meter.note_memory()
    say_nonfinite(meter.nonfinite)
    run = run_result(
        plan, out, large.done, meter, clock.seconds,
        resumed=large.resumed, part=part, missing=large.missing,
    )  # fmt: skip
    say_bottleneck(run)
    tell_end(tracker, path, run, resumed=not meter.tiles_forwarded)
    return result_of(run, clock)


def _pack_one(job: Job, request: Request, cluster: Executor | None) -> tuple[PackItem, Spans]:
    """Plan a raster, and segment it if it is small: here, or where the network can run."""
    task = partial(pack_task, named=True)
    if cluster is None:
        [item], spans = task([job], request)
        return item, spans
    config = request.config
    if config.into is not None:  # a worker may stand elsewhere
        config = config.model_copy(update={"into": config.into.absolute()})
    [there] = seen([Job(job.path.absolute(), job.out.absolute())], cluster)
    place = outside(there.out).parent
    with meeting(replace(request, config=config), cluster, place) as asked:
        work = [([there], asked)]
        [([item], spans)] = run_many(cluster, task, work, split_pack, lose_pack)
    item.out = job.out
    return item, spans


def run_one(
    source: Input,
    out: Path,
    request: Request,
    tracker: Tracker,
    cluster: Executor | None = None,
) -> PredictResult:
    """Make one mask: in one go if it is small, else block by block."""
    clock = Clock()
    run, resumed = make_one(source, out, out, request, tracker, clock, cluster)
    tell_end(tracker, source.path.absolute(), run, resumed=resumed)
    return result_of(run, clock)


def make_one(
    source: Input,
    out: Path,
    told: Path | RemoteName,
    request: Request,
    tracker: Tracker,
    clock: Clock,
    cluster: Executor | None = None,
    copy: Copy | None = None,
) -> tuple[RunResult, bool]:
    """Make one mask; return what became of it, and whether it was there.

    Parameters
    ----------
    source : Input
        The raster.
    out : Path
        The mask.
    told : Path or RemoteName
        What it is called to those who listen; who asks tells them the end.
    request : Request
        The run.
    tracker : Tracker
        Tells them.
    clock : Clock
        When it began.
    cluster : Executor, optional
        One that is open.
    copy : Copy, optional
        Takes blocks as they are done.
    """
    config = request.config
    item, spans = _pack_one(Job(source.path, out), request, cluster)
    if item.error is not None:
        raise item.error
    assert item.plan is not None
    path, pixels = source.path.absolute(), item.plan.raster.height * item.plan.raster.width
    tracker.expect(path, pixels)
    tracker.all_known()
    tracker.start(path, told, item.plan.lattice.blocks)
    advance = partial(tracker.advance, path)
    if item.done is not None:
        if config.dask_report is not None and cluster is None:
            _logger.warning("no Dask report: one block needs no cluster")
        say_remarks(item.plan) if item.resumed else say_plan(item.plan)
        advance(pixels)
        say_nonfinite(item.nonfinite)
        run = item_result(item, spans, clock.seconds)
        say_bottleneck(run)
    else:
        blocks, device = item.plan.lattice.blocks, item.plan.setup.device_class
        with executor_for(config, blocks, cluster, device) as executor:
            run = run_large_one(item.plan, out, executor, config, advance, clock, copy)
    return run, item.resumed


def result_of(run: RunResult, clock: Clock) -> PredictResult:
    """Return what became of the only input."""
    failure = run.failure()
    figures = {f.name: getattr(run, f.name) for f in fields(PredictResult) if hasattr(run, f.name)}
    failed = () if failure is None else (failure,)
    return PredictResult(**figures | {"runs": (run,), "failed": failed, "seconds": clock.seconds})
