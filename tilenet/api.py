"""The library's front door: named inputs in, a result dataclass out. The command adds nothing."""

from __future__ import annotations

import logging
import time
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
from tilenet.engine.item import has_item, write_item
from tilenet.engine.large import Copy, run_large
from tilenet.engine.meter import Meter, Spans
from tilenet.engine.output import check_output, plan_in_progress
from tilenet.engine.pack import Job, PackItem, Request, open_job, pack_task, plan_for
from tilenet.engine.plan import Plan, choose_tile, format_of
from tilenet.engine.room import needed_bytes
from tilenet.engine.run import run_many
from tilenet.engine.runfolder import outside
from tilenet.engine.savings import savings_of
from tilenet.errors import (
    InputError,
    ModelError,
    OutputError,
    TilenetError,
    UsageError,
    convert_errors,
    without_secrets,
)
from tilenet.models.session import Setup, choose, cores, network_shape
from tilenet.models.store import ModelFiles, find_model
from tilenet.results import Failure, PredictResult, RunResult, run_result
from tilenet.sinks import label_path, read_image, warnings_for
from tilenet.sources import Input, RemoteName, find_inputs, grid_of, named
from tilenet.strangers import exists, is_collection

__all__ = ["Failure", "PredictResult", "RunResult", "estimate", "predict"]

_logger = logging.getLogger(__name__)
_GOOD_EFFICIENCY = 0.7  # share of the time with a forward running, below which a run says why
_MAX_NOTES = 20
_PACK = 64  # rasters per task at the most; a pack also ends when its pixels fill

Progress = Callable[[int, int], None]
"""Called with finished pixels and all pixels known so far (0 while unknown)."""


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
    return len(paths) == 1 and (isinstance(paths[0], RemoteName) or not is_collection(paths[0]))


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
    found: list[Input], out: Path, config: PredictConfig, progress: Progress
) -> PredictResult:
    out = _named_output(out, config)
    known = plan_in_progress(out)
    setup = None if known is None else known.setup
    with _cluster(config) as cluster:
        request = _request(config, setup, _scenes(found, config), cluster)
        return _run_one(found[0], out, request, progress, cluster=cluster)


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
        [([item], spans)] = run_many(cluster, task, [([there], asked)])
    item.out = job.out
    return item, spans


def _run_one(
    source: Input,
    out: Path,
    request: Request,
    progress: Progress,
    copy: Copy | None = None,
    cluster: Executor | None = None,
) -> PredictResult:
    clock, config = _Clock(), request.config
    item, spans = _pack_one(Job(source.path, out), request, cluster)
    if item.error is not None:
        raise item.error
    assert item.plan is not None
    _say_notes([item.plan])
    total = item.plan.raster.height * item.plan.raster.width
    finished = 0

    def advance(pixels: int) -> None:
        nonlocal finished
        finished += pixels
        progress(finished, total)

    if item.done is not None:
        if config.dask_report is not None and cluster is None:
            _logger.warning("no Dask report: one block needs no cluster")
        if item.plan.area is not None and not item.resumed:
            _say_savings(item.plan)
        advance(total)
        run = _item_result(item, spans, clock.seconds)
    else:
        with _executor(config, item.plan.lattice.blocks, cluster) as executor:
            run = _large(item.plan, out, executor, config, advance, copy)
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
    if str(inputs[0]).rstrip("/") == str(out):
        raise UsageError("it is the input", out, "choose another --out")
    return RemoteOutput(out, config.scratch)


def _predict_remote(
    found: list[Input], place: RemoteOutput, config: PredictConfig, progress: Progress
) -> PredictResult:
    """Make a mask in a scratch folder, and its copy in an object store meanwhile."""
    with _cluster(config) as cluster:
        return _predict_copied(found, place, config, progress, cluster)


def _predict_copied(
    found: list[Input],
    place: RemoteOutput,
    config: PredictConfig,
    progress: Progress,
    cluster: Executor | None,
) -> PredictResult:
    clock, known = _Clock(), place.known()
    setup, source = None if known is None else known.setup, found[0]
    request = _request(config, setup, _scenes(found, config), cluster)
    plan = _plan_of(Job(source.path, place.local), request)
    done = place.check(plan, overwrite=config.overwrite)
    if done is not None:
        pixels = plan.raster.height * plan.raster.width
        _say_notes([plan])
        progress(pixels, pixels)
        out, blocks = place.place, done.blocks
        return _result(run_result(plan, out, done, Meter(), clock.seconds, resumed=blocks), clock)
    # What is in the scratch folder by then is this plan's.
    here = replace(request, config=config.model_copy(update={"overwrite": False}))
    with place.owned(plan, overwrite=config.overwrite) as mirror:
        result = _run_one(source, place.local, here, progress, mirror, cluster)
        mirror.finish(place.local, plan.zarr_format)
    [run] = result.runs
    return _result(replace(run, output=str(place.place)), clock)


def _plan_of(job: Job, request: Request) -> Plan:
    with closing(open_job(job, request)) as raster:
        return plan_for(raster.info, job, request, named=True)[0]


def _jobs(inputs: list[Input], out: Path) -> list[Job]:
    jobs, names = [], dict[str, Path | RemoteName]()
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
        jobs.append(Job(source.path.absolute(), (out / source.stem).absolute()))
    return jobs


def _predict_many(
    inputs: list[Input], out: Path, config: PredictConfig, progress: Progress
) -> PredictResult:
    clock = _Clock()
    if out.exists() and not out.is_dir():
        raise OutputError("the output is a file", out, "give a folder for several inputs")
    jobs = _jobs(inputs, out)
    runs: dict[Path | RemoteName, RunResult] = {}
    failed: dict[Path | RemoteName, Failure] = {}
    large: list[PackItem] = []
    finished, plans = 0, list[Plan | None]()

    def fail(path: Path | RemoteName, error: TilenetError) -> None:
        failed[path] = Failure(str(path), error.code, str(error))

    def advance(pixels: int) -> None:
        nonlocal finished
        finished += pixels
        progress(finished, 0)

    with ExitStack() as stack:
        cluster = stack.enter_context(_cluster(config))
        request = _request(config, None, cluster=cluster)
        request = stack.enter_context(_meeting(request, cluster, out.absolute()))
        jobs = _seen(jobs, cluster)
        executor = stack.enter_context(_executor(config, len(jobs) // _PACK, cluster))
        packs = ((pack, request) for pack in batched(jobs, _PACK))
        for items, spans in run_many(executor, pack_task, packs):
            clock.meter.add(spans)
            plans += [item.plan for item in items if item.plan and item.plan.raster.notes]
            for item, share in zip(items, _shares(items), strict=True):
                if item.error is not None:
                    fail(item.job.path, item.error)
                elif item.done is None:
                    large.append(item)
                else:
                    part = spans.part(share)
                    runs[item.job.path] = _item_result(item, part, part.seconds)
                    advance(runs[item.job.path].pixels)
        _say_notes(plans)
        for item in large:
            assert item.plan is not None
            assert item.out is not None
            try:
                run = _large(item.plan, item.out, executor, config, advance)
                runs[item.job.path] = run
            except (InputError, OutputError) as error:
                fail(item.job.path, error)
    alone = [runs[item.job.path] for item in large if item.job.path in runs]
    return _gather([job.path for job in jobs], runs, failed, alone, clock)


def _gather(
    order: list[Path | RemoteName],
    runs: dict[Path | RemoteName, RunResult],
    failed: dict[Path | RemoteName, Failure],
    alone: list[RunResult],
    clock: _Clock,
) -> PredictResult:
    """Return the figures of several inputs; those in `alone` are not on the clock's meter."""
    failed |= {path: failure for path, run in runs.items() if (failure := run.failure())}
    return PredictResult(
        runs=tuple(runs[path] for path in order if path in runs),
        failed=tuple(failed[path] for path in order if path in failed),
        pixels=sum(run.pixels for run in runs.values()),
        seconds=clock.seconds,
        forward_seconds=clock.meter.forward_seconds + sum(r.forward_seconds for r in alone),
        read_seconds=clock.meter.read_seconds + sum(r.read_seconds for r in alone),
        write_seconds=clock.meter.write_seconds + sum(r.write_seconds for r in alone),
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
) -> PredictResult:
    """Segment one raster, or several and whole folders, into masks.

    Parameters
    ----------
    inputs : list of Path or str
        Rasters and folders (searched recursively); URLs as str, since a `Path` would change them.
    out : Path, str or None
        For one raster the mask: ``x.zarr``, ``x.tif`` (a COG), ``x.ome.tif`` or ``x.png``; or a
        str ``s3://bucket/x.zarr``. Otherwise a folder, one mask per input under the same stem. None
        if `config.into` says where.
    config : PredictConfig
        Options.
    progress : callable, optional
        Called with finished pixels and all pixels known so far.

    Returns
    -------
    PredictResult

    Raises
    ------
    TilenetError
        See `tilenet.errors`. With several inputs, one that fails does not stop the others.
    """
    notify = progress or (lambda _done, _all: None)
    with convert_errors(out or config.into):
        names = [named(name) for name in inputs]
        out = _destination(names, None if out is None else named(out), config)
        if isinstance(out, RemoteName):
            place = _remote_output(names, out, config)
            return _predict_remote(find_inputs(names, place.local), place, config, notify)
        found = find_inputs(names, out)
        if _is_single(names, config):
            result = _predict_one(found, out, config, notify)
            _write_items(result.runs, config)
            return result
        result = _predict_many(found, out, config, notify)
        lost = _write_items(result.runs, config, keep_going=True)
        runs = tuple(run for run in result.runs if run.input not in {one.input for one in lost})
        return replace(result, runs=runs, failed=(*result.failed, *lost)) if lost else result


def _write_items(
    runs: Iterable[RunResult], config: PredictConfig, *, keep_going: bool = False
) -> list[Failure]:
    """Write the STAC items that are asked for; one that is there is kept true anyway."""
    failed = []
    for run in runs:
        out = Path(run.output)
        if not (config.stac or has_item(out)):
            continue
        try:
            for note in write_item(out):
                _logger.warning("%s", note)
        except OutputError as error:
            if not keep_going:
                raise
            failed.append(Failure(run.input, error.code, str(error)))
    return failed


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
        names = [named(name) for name in inputs]
        out = _destination(names, None if out is None else named(out), config)
        if isinstance(out, RemoteName):
            place = _remote_output(names, out, config)
            found = find_inputs(names, place.local)
            request = _request(config, None, _scenes(found, config))
            plan = _plan_of(Job(found[0].path, place.local), request)
            finished = place.look(plan, overwrite=config.overwrite) is not None
            yield _estimate(plan, request.files) | {"output": str(out), "finished": finished}
            return
        found = find_inputs(names, out)
        single = _is_single(names, config)
        if single:
            out = _named_output(out, config)
        request = _request(config, None, _scenes(found, config))
        for source in found[:1] if single else found:
            job = Job(source.path, out if single else out / source.stem)
            try:
                with closing(open_job(job, request)) as raster:
                    plan, name = plan_for(raster.info, job, request, named=single)
                finished = check_output(name, plan, overwrite=config.overwrite) is not None
                yield _estimate(plan, request.files) | {"output": str(name), "finished": finished}
            except (InputError, ModelError, OutputError) as error:
                if single:
                    raise
                yield {"input": str(source.path), "error": error.as_dict()}
