"""What is asked for: the network and what runs it, where tasks go, which masks are left alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tilenet.blend import has_threshold
from tilenet.config import PredictConfig
from tilenet.engine.admission import admitting, meeting_place
from tilenet.engine.cluster import open_executor
from tilenet.engine.executor import Executor
from tilenet.engine.launch import check_device, is_elsewhere, worker_count
from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan, format_of
from tilenet.engine.request import Job, Request, asked_of, open_job, plan_for
from tilenet.engine.skipping import finished_mask
from tilenet.engine.tiling import choose_tile, smaller_tiles
from tilenet.errors import UsageError, without_secrets
from tilenet.events import Tracker
from tilenet.models.devices import cores
from tilenet.models.session import Setup, network_shape
from tilenet.models.sizes import Wanted, choose_sizes
from tilenet.models.store import find_model
from tilenet.results import Skipped
from tilenet.sources import Input, RemoteName, grid_of
from tilenet.strangers import exists, is_collection, is_pattern

__all__ = [
    "Clock",
    "cluster_for",
    "executor_for",
    "makes_one",
    "meeting",
    "named_output",
    "plan_of",
    "request_for",
    "scenes_of",
    "seen",
    "skip_finished",
]

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Clock:
    """What a run takes."""

    meter: Meter = field(default_factory=Meter)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Return the wall time since it began."""
        return time.perf_counter() - self.start


def request_for(
    config: PredictConfig,
    known: Setup | None,
    scenes: tuple[str, ...] = (),
    cluster: Executor | None = None,
) -> Request:
    """Find the model, choose what it runs on and its sizes; "auto" follows an unfinished run.

    Workers on other machines choose, not this one.
    """
    files = find_model(config.model, config.model_config_file, config.card_overrides())
    shape = network_shape(files)
    choice = choose_tile(files, shape, config)
    tiles = (choice.tile, *smaller_tiles(choice, files.card.context, config))
    check_device(config.scheduler, config.device)
    asked = asked_of(config, known, max(1, cores() // worker_count(config.scheduler)))
    threads = asked.pop("threads")
    wanted = Wanted(tiles, shape.channels, **asked)
    if cluster is not None:
        sizes = cluster.choose(files, wanted)
    else:
        sizes = choose_sizes(files, wanted, threads)
    lowered = None if sizes.tile == choice.tile else sizes.tile
    if lowered is not None:
        _logger.warning("tile %d, not %d: %s", lowered, choice.tile, sizes.why)
    setup = sizes.setup
    _logger.info(
        "model %s on %s, %s %s: %s",
        files.card.name, setup.device, setup.backend, setup.precision, setup.why,
    )  # fmt: skip
    activation = files.card.activation
    if config.threshold is not None and not has_threshold(activation, shape.channels):
        _logger.warning("--threshold has no effect: the class is that of the highest score")
    elif config.threshold is not None and activation != "none" and not 0 <= config.threshold <= 1:
        what = f"{config.threshold:g} is no probability, and {activation} gives these"
        raise UsageError(what, "--threshold", "give 0 to 1")
    like = None if config.like is None else grid_of(config.like)
    return Request(config, files, shape, setup, like, scenes, tile=lowered)


def makes_one(paths: Sequence[Path | RemoteName], config: PredictConfig) -> bool:
    """Return whether inputs become one mask, and not a folder of masks."""
    if config.mosaic:
        return True
    if config.manifest is not None or len(paths) != 1:
        return False
    [path] = paths
    return isinstance(path, RemoteName) or not (is_collection(path) or is_pattern(path))


def scenes_of(found: list[Input], config: PredictConfig) -> tuple[str, ...]:
    """Return the rasters that are seen as one; () if each is its own."""
    return tuple(str(one.path.absolute()) for one in found) if config.mosaic else ()


def named_output(out: Path, config: PredictConfig) -> Path:
    """Return the mask's place; raises UsageError if its name gives no format, or nothing."""
    if config.into is None and config.format is None and format_of(out) is None:
        raise UsageError(
            "the output's ending gives no format", out, "end it in .zarr, .tif, .ome.tif or .png"
        )
    said = format_of(out)
    if config.format is not None and said is not None and said != config.format:
        tiffs = {said, config.format} == {"cog", "ome-tiff"}  # .tif is an ending of both
        if not tiffs:
            raise UsageError(
                f"the output's ending says {said}, --format {config.format}", out, "leave one out"
            )
    if not out.name:
        raise UsageError("the output has no name", out, "give a file or store to write")
    return out


def executor_for(
    config: PredictConfig, tasks: int, cluster: Executor | None, device_class: str = "cpu"
) -> AbstractContextManager[Executor]:
    """Return what runs so many tasks: the cluster that is open, or one of our own to be opened.

    That one is made for a kind of device.
    """
    if cluster is not None:
        return nullcontext(cluster)
    return open_executor(
        config.scheduler,
        tasks,
        device_class=device_class,
        insecure=config.insecure_cluster,
        report=config.dask_report,
    )


@contextmanager
def cluster_for(config: PredictConfig) -> Iterator[Executor | None]:
    """Open a cluster of other machines, which choose what the network runs on; else None."""
    if not is_elsewhere(config.scheduler):
        yield None
        return
    # What is wrong with it is not to be found when jobs have come out of their queue.
    find_model(config.model, config.model_config_file, config.card_overrides())
    with executor_for(config, 0, None) as executor:
        yield executor


@contextmanager
def meeting(request: Request, cluster: Executor | None, place: Path) -> Iterator[Request]:
    """Let workers on other machines show that they see a folder; yields the request for them."""
    if cluster is None:
        yield request
        return
    with (
        meeting_place(place) as folder,
        admitting(folder, request.files, cluster.versions, elsewhere=True) as token,
    ):
        yield replace(request, meeting=(str(folder), token))


def seen(jobs: list[Job], cluster: Executor | None) -> list[Job]:
    """Note, for workers on other machines, which inputs are there."""
    if cluster is None:
        return jobs
    return [
        replace(job, seen=not isinstance(job.path, RemoteName) and exists(job.path)) for job in jobs
    ]


def plan_of(job: Job, request: Request) -> Plan:
    """Return the plan of one raster whose mask is named."""
    with closing(open_job(job, request)) as raster:
        return plan_for(raster.info, job, request, named=True)[0]


def skip_finished(
    jobs: list[Job],
    config: PredictConfig,
    tracker: Tracker,
    scenes: tuple[str, ...] = (),
    *,
    named: bool = False,
) -> dict[Path | RemoteName, Skipped]:
    """Return the inputs to leave alone, if that is asked for."""
    skipped = {}
    for job in jobs if config.skip_finished else ():
        mask = finished_mask(job, config.format, scenes, named=named)
        if mask is not None:
            skipped[job.path] = Skipped(without_secrets(str(job.path)), str(mask))
            tracker.skip(job.path, mask)
    if skipped:
        _logger.info("%d of %d inputs skipped: their masks are there", len(skipped), len(jobs))
    return skipped
