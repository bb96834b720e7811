"""Packs: several small rasters handled as one block, their tiles sharing batches."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tilenet.config import PredictConfig
from tilenet.engine.admission import Admission
from tilenet.engine.block import BlockJob, Forwarded, drive
from tilenet.engine.decided import files_of, record_of, unreadable
from tilenet.engine.document import Finished, encode_document, plan_document
from tilenet.engine.group import FileGroup
from tilenet.engine.journal import BlockRecord, encode
from tilenet.engine.large import check_unchanged
from tilenet.engine.meter import Spans
from tilenet.engine.output import (
    check_in_progress,
    check_output,
    export,
    publish,
    sweep,
    upper_levels,
)
from tilenet.engine.plan import Plan
from tilenet.engine.reading import read_window
from tilenet.engine.replaced import put_back
from tilenet.engine.request import Job, Request, open_job, plan_for
from tilenet.engine.runfolder import STORE, locked, remove_run_folder, run_folder
from tilenet.engine.task import session_for
from tilenet.errors import (
    InputError,
    TilenetError,
    UnfitError,
    error_of_one,
)
from tilenet.geometry import Window
from tilenet.sinks import MaskStore
from tilenet.sources import Raster, environment, is_as_found
from tilenet.stops import is_stopping
from tilenet.strangers import exists
from tilenet.watchdog import watched

__all__ = [
    "PackItem",
    "lose_pack",
    "pack_task",
    "split_pack",
]

_PACK_BYTES = 1 << 24  # of pixels held at a time; a larger raster is read alone


@dataclass(slots=True)
class PackItem:
    """What became of one raster of a pack.

    Parameters
    ----------
    job : Job
        The raster.
    plan : Plan or None
        None if it could not be planned.
    out : Path or None
        Its mask's final name.
    done : Finished or None
        Figures; None if it failed or is too large for a pack.
    resumed : bool
        The mask was there already.
    error : TilenetError or None
        Why it failed.
    nonfinite : int
        Scores that count as 0.
    """

    job: Job
    plan: Plan | None = None
    out: Path | None = None
    done: Finished | None = None
    resumed: bool = False
    error: TilenetError | None = None
    nonfinite: int = 0


@dataclass(slots=True)
class _Loaded:
    item: PackItem
    plan: Plan
    out: Path
    pixels: NDArray[Any]
    block: BlockJob = field(repr=False)
    failed: tuple[tuple[Window, str], ...]


def _load(item: PackItem, raster: Raster, plan: Plan, out: Path, spans: Spans) -> _Loaded:
    damaged: list[Window] = []
    with spans.reading(), watched(plan.raster.path, plan.read_timeout):
        pixels, valid = raster.read(
            read_window(plan.lattice, 0, plan.model.card.margin),
            plan.model.card.offset,
            None if plan.strict else damaged,
        )
    if not is_as_found(raster.info):
        check_unchanged(plan)
    block = BlockJob(
        plan.lattice,
        0,
        valid,
        channels=plan.channels,
        blend=plan.blend,
        decision=plan.decision,
        probabilities=plan.probabilities,
        skip=plan.skip_nodata,
        margin=plan.model.card.margin,
    )
    return _Loaded(item, plan, out, pixels, block, unreadable(damaged, plan.lattice.core(0)))


def _group(loaded: _Loaded) -> tuple[str, tuple[int, int]]:
    return loaded.plan.raster.dtype, loaded.plan.lattice.tile_shape


def _forward(pack: list[_Loaded], request: Request, spans: Spans) -> None:
    admission = None if request.meeting is None else _admission(*request.meeting)
    for (dtype, shape), same in groupby(sorted(pack, key=_group), key=_group):
        with spans.preparing():
            session = session_for(request.files, request.setup, dtype, admission)
        jobs = [(one.block, session.load(one.pixels)) for one in same if one.block.parts]
        with spans.using(session.lock):
            drive(session, jobs, shape, spans)


def _write(
    loaded: _Loaded, config: PredictConfig, spans: Spans, group: FileGroup
) -> Finished | None:
    """Write a mask, or leave it to the group; return its figures once it is there."""
    plan, out = loaded.plan, loaded.out
    done = replace(loaded.block.finish(), failed=loaded.failed)
    spans.forwarded += done.tiles_forwarded
    spans.nonfinite += done.nonfinite
    loaded.item.nonfinite = done.nonfinite
    record = record_of(0, done, (), len(plan.spec.classes))
    finished = Finished(record.pixels, record.tiles, record.tiles_skipped, 1, record.invalid)
    finished.check(plan)
    place = group.place_for(plan, out)
    if place is not None:
        told = partial(_note, loaded.item, finished)
        group.add(plan, done.mask, (finished, record), place, told)
        return None
    folder = run_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        put_back(out)
        check_in_progress(out, plan, overwrite=config.overwrite)
        try:
            if check_output(out, plan, overwrite=config.overwrite) is not None:
                return finished  # another run of this plan was quicker: the same bytes
            if plan.format == "zarr":
                _write_store(plan, done, finished, record, folder)
                publish(
                    folder / STORE, out, overwrite=config.overwrite, label=plan.label is not None
                )
            else:
                export(
                    plan_document(plan, finished),
                    plan.spec,
                    lambda window: done.mask[window.slices()],
                    lambda window: _planes(done, window),
                    out,
                    [record],
                    overwrite=config.overwrite,
                )
        finally:
            put_back(out)  # if that fails, the old mask stays where it is
            remove_run_folder(folder)
    return finished


def _note(item: PackItem, finished: Finished, error: Exception | None) -> None:
    with _noting(item):
        if error is not None:
            raise error
        item.done = finished


def _planes(done: Forwarded, window: Window) -> NDArray[Any]:
    assert done.probabilities is not None
    return done.probabilities[(slice(None), *window.slices())]


def _write_store(
    plan: Plan, done: Forwarded, finished: Finished, record: BlockRecord, folder: Path
) -> None:
    root = folder / STORE
    if root.exists():
        shutil.rmtree(root)
    store = MaskStore(root, plan.spec, lasting=False)
    store.create()
    stored = store.write("mask", done.mask, 0, 0)
    if done.probabilities is not None:
        stored += store.write("prob", done.probabilities, 0, 0)
    stored += upper_levels(store, 1)
    document = encode_document(plan_document(plan, finished))
    journal = encode(replace(record, files=files_of(stored)))
    store.finish(finished.pixels, {"plan": document, "journal": journal})


def _read_pack(
    jobs: Iterator[Job], request: Request, items: list[PackItem], spans: Spans, *, named: bool
) -> list[_Loaded]:
    """Take rasters until so many pixels are read, and note each; [] once there are no more."""
    pack, size, config = list[_Loaded](), 0, request.config
    # One for all of them: each that is opened would set GDAL anew.
    with environment(elsewhere=config.allow_remote):
        for job in jobs:
            if is_stopping():
                break
            if job.seen and not exists(str(job.path)):
                do = "let all workers share that disk"
                raise UnfitError("does not see the input", job.path, do)
            item = PackItem(job)
            items.append(item)
            with _noting(item), closing(open_job(job, request)) as raster:
                plan, out = plan_for(raster.info, job, request, named=named)
                item.plan, item.out, raster.area = plan, out, plan.area
                item.done = check_output(out, plan, overwrite=config.overwrite)
                item.resumed = item.done is not None
                if item.resumed:
                    sweep(out, plan)
                elif plan.lattice.blocks == 1:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    pack.append(_load(item, raster, plan, out, spans))
                    size += pack[-1].pixels.nbytes
            if size > _PACK_BYTES:
                break
    return pack


def _write_pack(pack: list[_Loaded], config: PredictConfig, spans: Spans) -> None:
    group = FileGroup()
    with spans.writing():
        for loaded in pack:
            with _noting(loaded.item):
                loaded.item.done = _write(loaded, config, spans, group)
        group.write()


def pack_task(
    jobs: Iterable[Job], request: Request, *, named: bool = False
) -> tuple[list[PackItem], Spans]:
    """Segment small rasters, sharing batches; each succeeds or fails alone.

    A raster of more than one block is planned and handed back.

    Parameters
    ----------
    jobs : iterable of Job
        The rasters.
    request : Request
        What they have in common.
    named : bool
        See `plan_for`.
    """
    items, spans = list[PackItem](), Spans()
    if request.meeting is not None:
        _admission(*request.meeting)
        _look_for_area(request.config)
    left = iter(jobs)
    while pack := _read_pack(left, request, items, spans, named=named):
        _forward(pack, request, spans)
        _write_pack(pack, request.config, spans)
        pack.clear()  # before the next is read
    spans.pixels = sum(
        item.plan.raster.height * item.plan.raster.width
        for item in items
        if item.plan is not None and item.done is not None and not item.resumed
    )
    return items, spans.close()


@lru_cache(maxsize=8)
def _admission(folder: str, token: str) -> Admission:
    return Admission.check_in(Path(folder), token)


def _look_for_area(config: PredictConfig) -> None:
    """Raise UnfitError if this worker does not see the files that say where the work matters."""
    within = None if config.within in ("none", "auto") else config.within
    for path in (config.aoi, within):
        if path is not None and not exists(path):
            raise UnfitError("does not see", path, "let all workers share that disk")


def split_pack(jobs: Iterable[Job], request: Request) -> list[tuple[tuple[Job, ...], Request]]:
    """Return the arguments of `pack_task` for each raster by itself."""
    return [((job,), request) for job in jobs]


def lose_pack(jobs: Iterable[Job], request: Request) -> tuple[list[PackItem], Spans]:
    """Return what `pack_task` would of rasters under which workers die."""
    del request
    what, do = "every process that worked on it died", "look at the file"
    return [PackItem(job, error=InputError(what, job.path, do)) for job in jobs], Spans().close()


class _noting:
    """Keep an error with its raster, so that the others go on."""

    def __init__(self, item: PackItem) -> None:
        self._item = item

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        own = error_of_one(error, self._item.job.path) if isinstance(error, Exception) else None
        if own is not None:
            self._item.error = own
        return own is not None
