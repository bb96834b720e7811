"""The library's front door: named inputs in, a result dataclass out. The command adds nothing."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

from tilenet.config import PredictConfig
from tilenet.engine.admission import admitting, meeting_place
from tilenet.engine.cluster import (
    Executor,
    check_device,
    is_elsewhere,
    open_executor,
    worker_count,
)
from tilenet.engine.elsewhere import RemoteOutput
from tilenet.engine.folderlock import folder_locked
from tilenet.engine.item import has_item, write_item
from tilenet.engine.large import Copy, run_large
from tilenet.engine.meter import Meter, Spans
from tilenet.engine.output import check_output, plan_in_progress
from tilenet.engine.pack import (
    Job,
    PackItem,
    Request,
    lose_pack,
    open_job,
    pack_task,
    plan_for,
    split_pack,
)
from tilenet.engine.part import run_part
from tilenet.engine.plan import Plan, choose_tile, format_of
from tilenet.engine.room import needed_bytes
from tilenet.engine.run import run_many
from tilenet.engine.runfolder import outside
from tilenet.engine.savings import savings_of
from tilenet.engine.skipping import finished_mask
from tilenet.engine.turns import Work, take_turns
from tilenet.errors import (
    InputError,
    ModelError,
    OutputError,
    TilenetError,
    UsageError,
    convert_errors,
    error_of_one,
    without_secrets,
)
from tilenet.events import Listener, Tracker
from tilenet.models.session import Setup, choose, cores, network_shape
from tilenet.models.store import ModelFiles, find_model
from tilenet.part import Part
from tilenet.results import Failure, PredictResult, RunResult, Skipped, run_result
from tilenet.sinks import label_path, read_image, warnings_for
from tilenet.sources import Input, RemoteName, find_inputs, grid_of, named, read_manifest
from tilenet.strangers import exists, is_collection, is_pattern

__all__ = ["Failure", "PredictResult", "RunResult", "Skipped", "estimate", "is_single", "predict"]

_logger = logging.getLogger(__name__)
_GOOD_EFFICIENCY = 0.7  # share of the time with a forward running, below which a run says why
_MAX_NOTES = 20
_PACK = 64  # rasters per task at the most; a pack also ends when its pixels fill

Progress = Callable[[int, int], None]
"""Called with finished pixels and all pixels (0 while unknown)."""


@dataclass(slots=True)
class _Clock:
    meter: Meter = field(default_factory=Meter)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def _request(
    config: PredictConfig,
    known: Setup | None,
    scenes: tuple[str, ...] = (),
    cluster: Executor | None = None,
) -> Request:
    """Find the model and choose what it runs on; what is "auto" follows an unfinished run.

    Workers on other machines choose, not this one.
    """
    files = find_model(config.model, config.model_config_file, config.card_overrides())
    shape = network_shape(files)
    tile = choose_tile(files, shape, config).tile
    workers = worker_count(config.scheduler)
    check_device(config.scheduler, config.device)
    auto = (config.device, config.backend, config.precision)
    device, backend, precision = auto
    if known is not None:
        resumed = (known.device, known.backend, known.precision)
        device, backend, precision = (
            old if new == "auto" else new for new, old in zip(auto, resumed, strict=True)
        )
    wanted: dict[str, Any] = {
        "device": device, "backend": backend, "precision": precision,
        "batch_size": config.batch_size, "tile_pixels": tile * tile,
    }  # fmt: skip
    if cluster is not None:
        setup = cluster.choose(files, wanted)
    else:
        setup = choose(files, **wanted, threads=max(1, cores() // workers))
    _logger.info(
        "model %s on %s, %s %s: %s",
        files.card.name, setup.device, setup.backend, setup.precision, setup.why,
    )  # fmt: skip
    like = None if config.like is None else grid_of(config.like)
    return Request(config, files, shape, setup, like, scenes)


def _is_single(paths: Sequence[Path | RemoteName], config: PredictConfig) -> bool:
    if config.mosaic:
        return True
    if config.manifest is not None or len(paths) != 1:
        return False
    [path] = paths
    return isinstance(path, RemoteName) or not (is_collection(path) or is_pattern(path))


def is_single(inputs: Sequence[Path | RemoteName | str], config: PredictConfig) -> bool:
    """Return whether `predict` makes one mask of these inputs, and not a folder of masks."""
    return _is_single([named(name) for name in inputs], config)


def _find(names: Sequence[Path | RemoteName], out: Path, config: PredictConfig) -> list[Input]:
    """Return all inputs that are named."""
    found = find_inputs(names, out, several=config.manifest is not None)
    if config.manifest is not None:
        known = {one.path.absolute() for one in found}
        for one in read_manifest(config.manifest, out):
            if one.path.absolute() not in known:
                known.add(one.path.absolute())
                found.append(one)
    return found


def _named_inputs(
    inputs: Sequence[Path | RemoteName | str], config: PredictConfig
) -> list[Path | RemoteName]:
    if not inputs and config.manifest is None:
        raise UsageError("no inputs", "INPUTS", "name rasters or folders, or give --manifest")
    return [named(name) for name in inputs]


def _scenes(found: list[Input], config: PredictConfig) -> tuple[str, ...]:
    """Return the rasters that are seen as one; () if each is its own."""
    return tuple(str(one.path.absolute()) for one in found) if config.mosaic else ()


def _named_output(out: Path, config: PredictConfig) -> Path:
    if config.into is None and config.format is None and format_of(out) is None:
        raise UsageError(
            "the output's ending gives no format", out, "end it in .zarr, .tif, .ome.tif or .png"
        )
    if not out.name:
        raise UsageError("the output has no name", out, "give a file or store to write")
    return out


def _say_plan(plan: Plan) -> None:
    lattice = plan.lattice
    height, width = lattice.tile_shape
    _logger.info(
        "%d × %d pixels: %d tiles of %d × %d, overlap %d (%.2f × the pixels), %d blocks; "
        "at best %.2f × the pixels are decoded",
        plan.raster.height, plan.raster.width, lattice.tiles, height, width,
        lattice.rows.tile - lattice.rows.stride, lattice.redundancy, lattice.blocks,
        plan.read_amplification,
    )  # fmt: skip
    if len(plan.raster.files) > 1:
        _logger.info("used: %s", ", ".join(plan.raster.files))
    if plan.raster.resampling is not None:
        step = plan.raster.resampling.step
        _logger.info(
            "resampled from level %d, %.3g × %.3g of its pixels to one", plan.raster.level, *step
        )
    if plan.area is not None:
        _say_savings(plan)
    if plan.raster.warp is not None:
        _logger.info("brought to the grid of --like, from level %d", plan.raster.level)
    if plan.format == "zarr":
        for line in warnings_for(plan.spec):
            _logger.warning("%s", line)
    if plan.format == "ome-tiff" and plan.spec.georeference.is_georeferenced:
        _logger.warning("an OME-TIFF has no place on a map; a COG (.tif) or a Zarr store has")
    lo, hi = plan.model.card.value_range
    if plan.raster.dtype in ("uint16", "int16") and hi <= 255:
        _logger.warning(
            "pixels are %s, but the model expects values %g to %g: give --value-range if its "
            "numbers are not yours",
            plan.raster.dtype, lo, hi,
        )  # fmt: skip


def _say_notes(plans: Iterable[Plan | None]) -> None:
    """Pass on what the rasters' readers have to say, once each, and not by the thousand."""
    notes = [note for plan in plans if plan is not None for note in plan.raster.notes]
    for note in notes[:_MAX_NOTES]:
        _logger.warning("%s", note)
    if len(notes) > _MAX_NOTES:
        _logger.warning("and %d more remarks like these", len(notes) - _MAX_NOTES)


def _say_savings(plan: Plan) -> None:
    """Say what an area spares; of very many blocks, by a sample."""
    saved = savings_of(plan)
    _logger.info(
        "area: %.2f %% of the pixels are kept; %d of %d tiles are skipped, "
        "%d of %d blocks are not read",
        100 * saved.kept_share, saved.tiles - saved.tiles_to_forward, saved.tiles,
        saved.blocks - saved.blocks_to_read, saved.blocks,
    )  # fmt: skip


def _large(
    plan: Plan,
    out: Path,
    executor: Executor,
    config: PredictConfig,
    progress: Callable[[int], None],
    copy: Copy | None = None,
) -> RunResult:
    start = time.perf_counter()
    _say_plan(plan)
    large = run_large(plan, out, executor, progress, overwrite=config.overwrite, copy=copy)
    if large.meter.nonfinite:
        _logger.warning("%d scores were not finite and count as 0", large.meter.nonfinite)
    _say_strips(large.meter)
    seconds = time.perf_counter() - start
    result = run_result(plan, out, large.done, large.meter, seconds, resumed=large.resumed)
    _say_bottleneck(result)
    return result


def _say_strips(meter: Meter) -> None:
    """Say what it cost that blocks are done apart."""
    moved = meter.strip_bytes_moved
    _logger.info(
        "strips took %.1f MB of the run folder; %.1f MB were read on another host than wrote them",
        meter.strip_bytes / 1e6, moved / 1e6,
    )  # fmt: skip


def _say_bottleneck(result: RunResult) -> None:
    """Say in one line what a run waited for, if it was not the network."""
    if result.efficiency >= _GOOD_EFFICIENCY or result.seconds < 1:
        return
    spent = {"reading": result.read_seconds, "writing": result.write_seconds}
    most = max(spent, key=lambda name: spent[name])
    _logger.info(
        "the network ran %.0f %% of the time; %s took most beside it: %.1f s over its threads",
        100 * result.efficiency, most, spent[most],
    )  # fmt: skip


def _item_result(item: PackItem, spans: Spans, seconds: float) -> RunResult:
    """Return the figures of one raster of a pack.

    Those of time are its share, by pixels, of what the pack took.
    """
    assert item.plan is not None
    assert item.out is not None
    assert item.done is not None
    meter = Meter()
    meter.add(spans)
    meter.tiles_forwarded = 0 if item.resumed else item.done.tiles - item.done.tiles_skipped
    blocks = item.done.blocks if item.resumed else 0
    return run_result(item.plan, item.out, item.done, meter, seconds, resumed=blocks)


def _shares(items: list[PackItem]) -> list[float]:
    """Return which part of a pack's time each raster took."""
    pixels = [
        item.plan.raster.height * item.plan.raster.width
        if item.plan is not None and item.done is not None and not item.resumed
        else 0
        for item in items
    ]
    return [part / (sum(pixels) or 1) for part in pixels]


def _executor(
    config: PredictConfig, tasks: int, cluster: Executor | None
) -> AbstractContextManager[Executor]:
    if cluster is not None:
        return nullcontext(cluster)
    return open_executor(
        config.scheduler, tasks, insecure=config.insecure_cluster, report=config.dask_report
    )


@contextmanager
def _cluster(config: PredictConfig) -> Iterator[Executor | None]:
    """Open a cluster of other machines, which choose what the network runs on; else None."""
    if not is_elsewhere(config.scheduler):
        yield None
        return
    # What is wrong with it is not to be found when jobs have come out of their queue.
    find_model(config.model, config.model_config_file, config.card_overrides())
    with _executor(config, 0, None) as executor:
        yield executor


@contextmanager
def _meeting(request: Request, cluster: Executor | None, place: Path) -> Iterator[Request]:
    """Let workers on other machines show that they see a folder; yields the request for them."""
    if cluster is None:
        yield request
        return
    with (
        meeting_place(place) as folder,
        admitting(folder, request.files, cluster.versions, elsewhere=True) as token,
    ):
        yield replace(request, meeting=(str(folder), token))


def _predict_one(
    found: list[Input], out: Path, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    out = _named_output(out, config)
    job = Job(found[0].path.absolute(), out)
    tracker.begin([job.path])
    if skipped := _skipped([job], config, tracker, named=True):
        return PredictResult((), skipped=tuple(skipped.values()))
    known = plan_in_progress(out)
    setup = None if known is None else known.setup
    with _cluster(config) as cluster:
        request = _request(config, setup, _scenes(found, config), cluster)
        if config.part is None:
            return _run_one(found[0], out, request, tracker, cluster=cluster)
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
    clock, plan = _Clock(), _plan_of(Job(source.path, out), request)
    own = part.range_of(plan.lattice.blocks)
    if plan.lattice.blocks == 1 and own:
        result = _run_one(source, out, request, tracker, cluster=cluster)
        return replace(result, runs=tuple(replace(run, part=str(part)) for run in result.runs))
    _say_notes([plan])
    _say_plan(plan)
    _logger.info("part %s: %d of %d blocks", part, len(own), plan.lattice.blocks)
    path = source.path.absolute()
    tracker.expect(path, sum(band.pixels for band in plan.lattice.bands(own)))
    tracker.all_known()
    tracker.start(path, out, len(own))
    # A part needs no cluster, however large it is.
    with _executor(request.config, 1, cluster) as executor:
        large = run_part(plan, out, part, executor, partial(tracker.advance, path))
    if large.meter.nonfinite:
        _logger.warning("%d scores were not finite and count as 0", large.meter.nonfinite)
    run = run_result(
        plan, out, large.done, large.meter, clock.seconds,
        resumed=large.resumed, part=part, missing=large.missing,
    )  # fmt: skip
    _say_bottleneck(run)
    if run.complete:
        tracker.finish(path, out, seconds=run.seconds, resumed=not large.meter.tiles_forwarded)
    return _result(run, clock)


def _seen(jobs: list[Job], cluster: Executor | None) -> list[Job]:
    """Note, for workers on other machines, which inputs are there."""
    if cluster is None:
        return jobs
    return [
        replace(job, seen=not isinstance(job.path, RemoteName) and exists(job.path)) for job in jobs
    ]


def _pack_one(job: Job, request: Request, cluster: Executor | None) -> tuple[PackItem, Spans]:
    """Plan a raster, and segment it if it is small: here, or where the network can run."""
    task = partial(pack_task, named=True)
    if cluster is None:
        [item], spans = task([job], request)
        return item, spans
    config = request.config
    if config.into is not None:  # a worker may stand elsewhere
        config = config.model_copy(update={"into": config.into.absolute()})
    [there] = _seen([Job(job.path.absolute(), job.out.absolute())], cluster)
    place = outside(there.out).parent
    with _meeting(replace(request, config=config), cluster, place) as asked:
        work = [([there], asked)]
        [([item], spans)] = run_many(cluster, task, work, split_pack, lose_pack)
    item.out = job.out
    return item, spans


def _run_one(
    source: Input,
    out: Path,
    request: Request,
    tracker: Tracker,
    copy: Copy | None = None,
    cluster: Executor | None = None,
) -> PredictResult:
    clock, config = _Clock(), request.config
    item, spans = _pack_one(Job(source.path, out), request, cluster)
    if item.error is not None:
        raise item.error
    assert item.plan is not None
    _say_notes([item.plan])
    path, pixels = source.path.absolute(), item.plan.raster.height * item.plan.raster.width
    tracker.expect(path, pixels)
    tracker.all_known()
    tracker.start(path, out, item.plan.lattice.blocks)
    advance = partial(tracker.advance, path)
    if item.done is not None:
        if config.dask_report is not None and cluster is None:
            _logger.warning("no Dask report: one block needs no cluster")
        if item.plan.area is not None and not item.resumed:
            _say_savings(item.plan)
        advance(pixels)
        run = _item_result(item, spans, clock.seconds)
    else:
        with _executor(config, item.plan.lattice.blocks, cluster) as executor:
            run = _large(item.plan, out, executor, config, advance, copy)
    tracker.finish(path, out, seconds=run.seconds, resumed=item.resumed)
    return _result(run, clock)


def _result(run: RunResult, clock: _Clock) -> PredictResult:
    failure = run.failure()
    return PredictResult(
        (run,), () if failure is None else (failure,), pixels=run.pixels, seconds=clock.seconds
    )


def _remote_output(
    inputs: Sequence[Path | RemoteName], out: RemoteName, config: PredictConfig
) -> RemoteOutput:
    """Return the place of a mask in an object store, if such a mask is possible."""
    if not config.allow_remote:
        raise UsageError("lies on another machine", out, "to write there, give --allow-remote")
    other = config.into or config.stac or config.format not in (None, "zarr")
    if other or not _is_single(inputs, config):
        raise UsageError(
            "elsewhere goes the Zarr mask of one raster, without --into, --stac or --format",
            out,
            "write to a disk",
        )
    if config.skip_finished:
        raise UsageError("only for masks on a disk", "--skip-finished", "leave it out")
    if str(out) in [str(one).rstrip("/") for one in inputs]:
        raise UsageError("it is the input", out, "choose another --out")
    if config.part is not None:
        raise UsageError("parts of a mask need a disk they share", "--part", "write to a disk")
    return RemoteOutput(out, config.scratch)


def _predict_remote(
    found: list[Input], place: RemoteOutput, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    """Make a mask in a scratch folder, and its copy in an object store meanwhile."""
    with _cluster(config) as cluster:
        return _predict_copied(found, place, config, tracker, cluster)


def _predict_copied(
    found: list[Input],
    place: RemoteOutput,
    config: PredictConfig,
    tracker: Tracker,
    cluster: Executor | None,
) -> PredictResult:
    clock, known = _Clock(), place.known()
    tracker.begin([found[0].path.absolute()])
    setup, source = None if known is None else known.setup, found[0]
    request = _request(config, setup, _scenes(found, config), cluster)
    plan = _plan_of(Job(source.path, place.local), request)
    done = place.check(plan, overwrite=config.overwrite)
    if done is not None:
        pixels = plan.raster.height * plan.raster.width
        _say_notes([plan])
        path = source.path.absolute()
        tracker.expect(path, pixels)
        tracker.finish(path, place.place, seconds=clock.seconds, resumed=True)
        out, blocks = place.place, done.blocks
        return _result(run_result(plan, out, done, Meter(), clock.seconds, resumed=blocks), clock)
    # What is in the scratch folder by then is this plan's.
    here = replace(request, config=config.model_copy(update={"overwrite": False}))
    with place.owned(plan, overwrite=config.overwrite) as mirror:
        result = _run_one(source, place.local, here, tracker, mirror, cluster)
        mirror.finish(place.local, plan.zarr_format)
    [run] = result.runs
    return _result(replace(run, output=str(place.place)), clock)


def _plan_of(job: Job, request: Request) -> Plan:
    with closing(open_job(job, request)) as raster:
        return plan_for(raster.info, job, request, named=True)[0]


def _own(inputs: list[Input], config: PredictConfig) -> list[Input]:
    """Return the inputs of a part: dealt out by their masks' names, in whatever order they come."""
    if config.part is None:
        return inputs
    own = list(config.part.every(sorted(inputs, key=lambda one: one.stem)))
    _logger.info("part %s: %d of %d inputs", config.part, len(own), len(inputs))
    return own


def _jobs(inputs: list[Input], out: Path, config: PredictConfig) -> list[Job]:
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
    # A worker may stand elsewhere.
    return [
        Job(source.path.absolute(), (out / source.stem).absolute())
        for source in _own(inputs, config)
    ]


class _Many:
    """What becomes of several inputs, by their paths; told from the threads of their runs."""

    def __init__(self, jobs: list[Job], request: Request, clock: _Clock, tracker: Tracker) -> None:
        self._jobs, self._request, self._clock, self._tracker = jobs, request, clock, tracker
        self._plans: list[Plan | None] = []
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

        for items, spans in run_many(executor, pack_task, packs(), split_pack, lose_pack):
            self._plans += [item.plan for item in items if item.plan and item.plan.raster.notes]
            for item, share in zip(items, _shares(items), strict=True):
                self._take(item, spans.part(share))
        self._tracker.all_known()
        _say_notes(self._plans)

    def _take(self, item: PackItem, spans: Spans) -> None:
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
        self._tracker.start(path, item.out, 1)
        self._tracker.advance(path, pixels)
        self._finish(path, _item_result(item, spans, spans.seconds), resumed=item.resumed)

    def _alone(self, item: PackItem, executor: Executor) -> None:
        """Run a raster of many blocks."""
        path, plan, out = item.job.path, item.plan, item.out
        assert plan is not None
        assert out is not None
        self._tracker.start(path, out, plan.lattice.blocks)
        try:
            run = _large(
                plan, out, executor, self._request.config, partial(self._tracker.advance, path)
            )
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
        self._tracker.finish(path, run.output, seconds=run.seconds, resumed=resumed)
        if (failure := run.failure()) is not None:
            self._tracker.fail(path, failure.code, failure.error)


def _predict_many(
    inputs: list[Input], out: Path, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    clock = _Clock()
    if out.exists() and not out.is_dir():
        raise OutputError("the output is a file", out, "give a folder for several inputs")
    jobs = _jobs(inputs, out, config)
    with folder_locked(out, shared=config.part is not None):
        tracker.begin(job.path for job in jobs)
        skipped = _skipped(jobs, config, tracker)
        left = [job for job in jobs if job.path not in skipped]
        if not left:
            return PredictResult((), skipped=tuple(skipped.values()), seconds=clock.seconds)
        with ExitStack() as stack:
            cluster = stack.enter_context(_cluster(config))
            request = _request(config, None, cluster=cluster)
            request = stack.enter_context(_meeting(request, cluster, out.absolute()))
            executor = stack.enter_context(_executor(config, len(left) // _PACK, cluster))
            many = _Many(_seen(left, cluster), request, clock, tracker)
            many.drive(executor)
    wrong = [error for error in many.failed.values() if isinstance(error, UsageError)]
    if len(wrong) == len(left):
        raise wrong[0]  # not the inputs are wrong, but what is asked of them
    failed = {path: Failure(str(path), e.code, str(e)) for path, e in many.failed.items()}
    found = _gather([job.path for job in jobs], many.runs, failed, clock)
    return replace(found, skipped=tuple(skipped.values()))


def _skipped(
    jobs: list[Job], config: PredictConfig, tracker: Tracker, *, named: bool = False
) -> dict[Path | RemoteName, Skipped]:
    """Return the inputs to leave alone, if that is asked for."""
    skipped = {}
    for job in jobs if config.skip_finished else ():
        mask = finished_mask(job, config.format, named=named)
        if mask is not None:
            skipped[job.path] = Skipped(without_secrets(str(job.path)), str(mask))
            tracker.skip(job.path, mask)
    if skipped:
        _logger.info("%d of %d inputs skipped: their masks are there", len(skipped), len(jobs))
    return skipped


def _gather(
    order: list[Path | RemoteName],
    runs: dict[Path | RemoteName, RunResult],
    failed: dict[Path | RemoteName, Failure],
    clock: _Clock,
) -> PredictResult:
    """Return the figures of several inputs, all of which are on the clock's meter."""
    failed |= {path: failure for path, run in runs.items() if (failure := run.failure())}
    return PredictResult(
        runs=tuple(runs[path] for path in order if path in runs),
        failed=tuple(failed[path] for path in order if path in failed),
        pixels=sum(run.pixels for run in runs.values()),
        seconds=clock.seconds,
        forward_seconds=clock.meter.forward_seconds,
        read_seconds=clock.meter.read_seconds,
        write_seconds=clock.meter.write_seconds,
        peak_rss_bytes=max(
            [clock.meter.peak_rss_bytes, *(r.peak_rss_bytes for r in runs.values())]
        ),
    )


def _destination(
    inputs: list[Path | RemoteName], out: Path | RemoteName | None, config: PredictConfig
) -> Path | RemoteName:
    """Return where masks go: `out`, or the label's place in an image."""
    if config.scratch is not None and not isinstance(out, RemoteName):
        raise UsageError("only for a mask that goes to s3://…", "--scratch", "leave it out")
    if config.part is not None and config.overwrite and _is_single(inputs, config):
        raise UsageError(
            "parts of one mask would replace each other's work", "--overwrite",
            "remove the old mask, then run the parts",
        )  # fmt: skip
    if config.into is None and out is not None:
        return out
    if config.into is None or out is not None:
        raise UsageError("one of them says where the mask goes", "--out, --into", "give one")
    if not _is_single(inputs, config):
        raise UsageError("an image takes the mask of one raster", "--into", "name one input")
    read_image(config.into)  # before the model is looked for, which may take long
    files = find_model(config.model, config.model_config_file, config.card_overrides())
    return label_path(config.into, files.card.name)


def predict(
    inputs: Sequence[Path | RemoteName | str],
    out: Path | RemoteName | str | None,
    config: PredictConfig,
    progress: Progress | None = None,
    listener: Listener | None = None,
) -> PredictResult:
    """Segment one raster, or several and whole folders, into masks.

    Parameters
    ----------
    inputs : list of Path or str
        Rasters, folders (searched recursively) and patterns; URLs as str, since a `Path` would
        change them. `config.manifest` may name more.
    out : Path, str or None
        For one raster the mask: ``x.zarr``, ``x.tif`` (a COG), ``x.ome.tif`` or ``x.png``; or a
        str ``s3://bucket/x.zarr``. Otherwise a folder, one mask per input under the same stem. None
        if `config.into` says where.
    config : PredictConfig
        Options.
    progress : callable, optional
        Called with finished pixels and all pixels (0 while unknown).
    listener : callable, optional
        Called with all that happens to the inputs: see `tilenet.events`.

    Returns
    -------
    PredictResult

    Raises
    ------
    TilenetError
        See `tilenet.errors`. With several inputs, one that fails does not stop the others.
    """
    tracker = Tracker(progress or (lambda _done, _all: None), listener or (lambda _event: None))
    with convert_errors(out or config.into):
        names = _named_inputs(inputs, config)
        out = _destination(names, None if out is None else named(out), config)
        if isinstance(out, RemoteName):
            place = _remote_output(names, out, config)
            return _predict_remote(_find(names, place.local, config), place, config, tracker)
        found = _find(names, out, config)
        if _is_single(names, config):
            result = _predict_one(found, out, config, tracker)
            _write_items(result.runs, config)
            return result
        result = _predict_many(found, out, config, tracker)
        lost = _write_items(result.runs, config, keep_going=True)
        for failure in lost:
            tracker.fail(failure.input, failure.code, failure.error)
        runs = tuple(run for run in result.runs if run.input not in {one.input for one in lost})
        return replace(result, runs=runs, failed=(*result.failed, *lost)) if lost else result


def _write_items(
    runs: Iterable[RunResult], config: PredictConfig, *, keep_going: bool = False
) -> list[Failure]:
    """Write the STAC items that are asked for; one that is there is kept true anyway."""
    failed = []
    for run in runs:
        out = Path(run.output)
        if not run.complete or not (config.stac or has_item(out)):
            continue
        try:
            for note in write_item(out):
                _logger.warning("%s", note)
        except OutputError as error:
            if not keep_going:
                raise
            failed.append(Failure(run.input, error.code, str(error)))
    return failed


def _estimate_part(plan: Plan, part: Part) -> dict[str, Any]:
    own = part.range_of(plan.lattice.blocks)
    tiles = plan.lattice.tiles_in(own)
    return {"part": str(part), "part_blocks": len(own), "part_tiles": tiles}


def _estimate(plan: Plan, files: ModelFiles) -> dict[str, Any]:
    lattice, raster = plan.lattice, plan.raster
    pixels = raster.height * raster.width
    core = lattice.core(0)
    reach = lattice.reach(0)
    tile_height, _ = lattice.tile_shape
    saved = savings_of(plan)
    return {
        "input": without_secrets(raster.path),
        "width": raster.width,
        "height": raster.height,
        "pixels": pixels,
        "tile": lattice.rows.tile,
        "overlap": lattice.rows.tile - lattice.rows.stride,
        "tiles": lattice.tiles,
        "tiles_to_forward": saved.tiles_to_forward,
        "kept_share": round(saved.kept_share, 6),
        "redundancy": round(lattice.redundancy, 4),
        "read_amplification": round(plan.read_amplification, 4),
        "blocks": lattice.blocks,
        "blocks_to_read": saved.blocks_to_read,
        "block": [lattice.rows.core, lattice.cols.core],
        "chunk": plan.chunk,
        "levels": len(plan.spec.levels),
        "mask_bytes_at_most": pixels * 4 // 3 + pixels * plan.channels * plan.probabilities,
        "disk_bytes_at_least": needed_bytes(plan),
        "strip_bytes_per_block": 4 * plan.channels * (reach.pixels - core.pixels),
        "sums_bytes": 4 * plan.channels * tile_height * reach.width,
        "model": files.card.name,
        "device": plan.setup.device,
        "backend": plan.setup.backend,
        "precision": plan.setup.precision,
        "batch_size": plan.setup.batch_size,
        "why": plan.setup.why,
        "plan_hash": plan.hash,
        "files": list(raster.files),
    }


def estimate(
    inputs: Sequence[Path | RemoteName | str],
    out: Path | RemoteName | str | None,
    config: PredictConfig,
) -> Iterator[dict[str, Any]]:
    """Yield what `predict` would do with each input, without doing it.

    Parameters
    ----------
    inputs, out, config
        As for `predict`.

    Raises
    ------
    TilenetError
        As `predict` would, before it begins. One of several inputs that fails has an ``error``.
    """
    with convert_errors(out or config.into):
        names = _named_inputs(inputs, config)
        out = _destination(names, None if out is None else named(out), config)
        if isinstance(out, RemoteName):
            place = _remote_output(names, out, config)
            found = _find(names, place.local, config)
            request = _request(config, None, _scenes(found, config))
            plan = _plan_of(Job(found[0].path, place.local), request)
            finished = place.look(plan, overwrite=config.overwrite) is not None
            yield _estimate(plan, request.files) | {"output": str(out), "finished": finished}
            return
        found = _find(names, out, config)
        single = _is_single(names, config)
        if single:
            out = _named_output(out, config)
        request = _request(config, None, _scenes(found, config))
        for source in found[:1] if single else _own(found, config):
            job = Job(source.path, out if single else out / source.stem)
            try:
                with closing(open_job(job, request)) as raster:
                    plan, name = plan_for(raster.info, job, request, named=single)
                finished = check_output(name, plan, overwrite=config.overwrite) is not None
                share = _estimate_part(plan, config.part) if single and config.part else {}
                found_out = {"output": str(name), "finished": finished}
                yield _estimate(plan, request.files) | share | found_out
            except (InputError, ModelError, OutputError) as error:
                if single:
                    raise
                yield {"input": str(source.path), "error": error.as_dict()}
