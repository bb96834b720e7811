"""Several rasters to a folder of masks: the small ones in packs, the others in turns."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path

from tilenet.config import PredictConfig
from tilenet.engine.executor import Executor
from tilenet.engine.folderlock import folder_locked
from tilenet.engine.meter import Spans
from tilenet.engine.pack import PackItem, lose_pack, pack_task, split_pack
from tilenet.engine.request import Job, Request
from tilenet.engine.run import run_many
from tilenet.engine.turns import Work, take_turns
from tilenet.errors import (
    OutputError,
    TilenetError,
    UsageError,
    error_of_one,
    without_secrets,
)
from tilenet.events import Tracker
from tilenet.predicting.asking import (
    Clock,
    cluster_for,
    executor_for,
    meeting,
    request_for,
    seen,
    skip_finished,
)
from tilenet.predicting.single import item_result, run_large_one, tell_end
from tilenet.predicting.telling import Remarks, say_bottleneck, say_nonfinite
from tilenet.results import Failure, PredictResult, RunResult, times_of
from tilenet.sources import Input, RemoteName

__all__ = ["jobs_of", "predict_many"]

_logger = logging.getLogger(__name__)
_PACK = 64  # rasters per task at the most; a pack also ends when its pixels fill


def _shares(items: list[PackItem]) -> list[float]:
    """Return which part of a pack's time each raster took."""
    pixels = [
        item.plan.raster.height * item.plan.raster.width
        if item.plan is not None and item.done is not None and not item.resumed
        else 0
        for item in items
    ]
    return [part / (sum(pixels) or 1) for part in pixels]


def _own_share(inputs: list[Input], config: PredictConfig) -> list[Input]:
    """Return the inputs of a part: dealt out by their masks' names, in whatever order they come."""
    if config.part is None:
        return inputs
    own = list(config.part.every(sorted(inputs, key=lambda one: one.stem)))
    _logger.info("part %s: %d of %d inputs", config.part, len(own), len(inputs))
    return own


def jobs_of(inputs: list[Input], out: Path, config: PredictConfig) -> list[Job]:
    """Return what is to be made of several inputs, those of a part.

    Raises
    ------
    OutputError
        Their folder is a file, or two of them would have one mask.
    """
    if out.exists() and not out.is_dir():
        raise OutputError("the output is a file", out, "give a folder for several inputs")
    names = dict[str, Path | RemoteName]()
    for source in inputs:
        name = str(source.stem).casefold()
        if name in names:
            raise OutputError(
                f"two inputs would have one mask: {names[name]} and {source.path}",
                out / source.stem,
                "rename one of them",
            )
        names[name] = source.path
    folder = out.absolute()  # a worker may stand elsewhere
    return [
        Job(source.path.absolute(), folder / source.stem) for source in _own_share(inputs, config)
    ]


class _Many:
    """What becomes of several inputs, by their paths; told from the threads of their runs."""

    def __init__(self, jobs: list[Job], request: Request, clock: Clock, tracker: Tracker) -> None:
        self._jobs, self._request, self._clock, self._tracker = jobs, request, clock, tracker
        self._remarks, self._nonfinite = Remarks(), 0
        self._large: dict[Path | RemoteName, PackItem] = {}
        self._works: deque[Work] = deque([self._packs])
        self.runs: dict[Path | RemoteName, RunResult] = {}
        self.failed: dict[Path | RemoteName, TilenetError] = {}

    def drive(self, executor: Executor) -> None:
        """Drive packs and larger rasters to their end; one that fails does not stop the others."""
        with closing(take_turns(executor, self._works, self._clock.meter.add)) as ended:
            for _, error in ended:
                if error is not None:
                    raise error

    def _packs(self, executor: Executor) -> None:
        """Plan all inputs and run the small ones; each of the others gets a run of its own."""
        known = self.runs.keys() | self.failed.keys() | self._large.keys()
        left = [job for job in self._jobs if job.path not in known]

        def packs() -> Iterator[tuple[tuple[Job, ...], Request]]:
            for pack in batched(left, _PACK):
                yield pack, self._request
            executor.handed_out()

        before = self._clock.seconds
        for items, spans in run_many(executor, pack_task, packs(), split_pack, lose_pack):
            now = self._clock.seconds
            for item, share in zip(items, _shares(items), strict=True):
                self._take(item, spans.part(share), share * (now - before))
            self._nonfinite += sum(item.nonfinite for item in items)
            before = now
        self._tracker.all_known()
        self._remarks.say()
        say_nonfinite(self._nonfinite)

    def _take(self, item: PackItem, spans: Spans, seconds: float) -> None:
        path = item.job.path
        if item.error is not None:
            self._fail(path, item.error)
            return
        assert item.plan is not None
        pixels = item.plan.raster.height * item.plan.raster.width
        self._tracker.expect(path, pixels)
        if item.done is None:
            self._large[path] = item
            self._works.append(partial(self._alone, item))
            return
        self._remarks.take(item.plan)
        self._tracker.start(path, item.out, 1)
        self._tracker.advance(path, pixels)
        self._finish(path, item_result(item, spans, seconds), resumed=item.resumed)

    def _alone(self, item: PackItem, executor: Executor) -> None:
        """Run a raster of many blocks."""
        path, plan, out = item.job.path, item.plan, item.out
        assert plan is not None
        assert out is not None
        self._tracker.start(path, out, plan.lattice.blocks)
        try:
            run = run_large_one(
                plan, out, executor, self._request.config,
                partial(self._tracker.advance, path), Clock(),
            )  # fmt: skip
        except Exception as error:
            own = error_of_one(error, path)
            if own is None:
                raise
            self._fail(path, own)
        else:
            self._finish(path, run, resumed=False)

    def _fail(self, path: Path | RemoteName, error: TilenetError) -> None:
        self.failed[path] = error
        self._tracker.fail(path, error.code, str(error))

    def _finish(self, path: Path | RemoteName, run: RunResult, *, resumed: bool) -> None:
        self.runs[path] = run
        tell_end(self._tracker, path, run, resumed=resumed)


def predict_many(
    inputs: list[Input], out: Path, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    """Make a mask of each raster that can be read, in a folder that no other run writes to."""
    clock = Clock()
    jobs = jobs_of(inputs, out, config)
    with folder_locked(out, shared=config.part is not None):
        tracker.begin(job.path for job in jobs)
        skipped = skip_finished(jobs, config, tracker)
        left = [job for job in jobs if job.path not in skipped]
        if not left:
            return PredictResult((), skipped=tuple(skipped.values()), seconds=clock.seconds)
        with ExitStack() as stack:
            cluster = stack.enter_context(cluster_for(config))
            request = request_for(config, None, cluster=cluster)
            request = stack.enter_context(meeting(request, cluster, out.absolute()))
            tasks, device = len(left) // _PACK, request.setup.device_class
            executor = stack.enter_context(executor_for(config, tasks, cluster, device))
            many = _Many(seen(left, cluster), request, clock, tracker)
            many.drive(executor)
    wrong = [error for error in many.failed.values() if isinstance(error, UsageError)]
    if len(wrong) == len(left):
        raise wrong[0]  # not the inputs are wrong, but what is asked of them
    failed = {
        path: Failure(without_secrets(str(path)), e.code, str(e)) for path, e in many.failed.items()
    }
    found = _gather([job.path for job in jobs], many.runs, failed, clock)
    say_bottleneck(found)
    return replace(found, skipped=tuple(skipped.values()))


def _gather(
    order: list[Path | RemoteName],
    runs: dict[Path | RemoteName, RunResult],
    failed: dict[Path | RemoteName, Failure],
    clock: Clock,
) -> PredictResult:
    """Return the figures of several inputs, all of which are on the clock's meter."""
    failed |= {path: failure for path, run in runs.items() if (failure := run.failure())}
    return PredictResult(
        runs=tuple(runs[path] for path in order if path in runs),
        failed=tuple(failed[path] for path in order if path in failed),
        pixels=sum(run.pixels for run in runs.values()),
        **times_of(clock.meter, clock.seconds),
        peak_rss_bytes=max(
            [clock.meter.note_memory().peak_rss_bytes, *(r.peak_rss_bytes for r in runs.values())]
        ),
    )
