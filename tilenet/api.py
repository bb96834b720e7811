"""The library's front door: named inputs in, a result dataclass out. The command adds nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilenet.config import PredictConfig
from tilenet.engine.item import check_item, has_item, write_item
from tilenet.engine.output import check_output
from tilenet.engine.plan import Plan
from tilenet.engine.request import Job, open_job, plan_for
from tilenet.engine.room import needed_bytes
from tilenet.engine.savings import savings_of
from tilenet.engine.skipping import finished_mask
from tilenet.errors import (
    OutputError,
    TilenetError,
    UsageError,
    convert_errors,
    error_of_one,
    without_secrets,
)
from tilenet.events import Listener, Tracker
from tilenet.models.store import ModelFiles, find_model
from tilenet.part import Part
from tilenet.predicting.afar import predict_remote, remote_output, with_tile_there
from tilenet.predicting.asking import makes_one, named_output, plan_of, request_for, scenes_of
from tilenet.predicting.several import jobs_of, predict_many
from tilenet.predicting.single import predict_one
from tilenet.results import Failure, PredictResult, RunResult, Skipped
from tilenet.sinks import label_path, read_image
from tilenet.sources import Input, RemoteName, find_inputs, given, read_manifest

__all__ = ["Failure", "PredictResult", "RunResult", "Skipped", "estimate", "is_single", "predict"]

_logger = logging.getLogger(__name__)
type Inputs = Sequence[Path | RemoteName | str] | Path | RemoteName | str
"""Names of rasters, folders and patterns, or one of them as it is."""
Progress = Callable[[int, int], None]
"""Called with finished pixels and all pixels (0 while unknown)."""


def _names(inputs: Inputs) -> list[Path | RemoteName]:
    """Return what the inputs stand for."""
    listed = [inputs] if isinstance(inputs, str | Path | RemoteName) else inputs
    return [given(name) for name in listed]


def is_single(inputs: Inputs, config: PredictConfig) -> bool:
    """Return whether `predict` makes one mask of these inputs, and not a folder of masks."""
    return makes_one(_names(inputs), config)


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


def _named_inputs(inputs: Inputs, config: PredictConfig) -> list[Path | RemoteName]:
    if not inputs and config.manifest is None:
        raise UsageError("no inputs", "INPUTS", "name rasters or folders, or give --manifest")
    return _names(inputs)


def _destination(
    inputs: list[Path | RemoteName], out: Path | RemoteName | None, config: PredictConfig
) -> Path | RemoteName:
    """Return where masks go: `out`, or the label's place in an image."""
    if config.scratch is not None and not isinstance(out, RemoteName):
        raise UsageError("only for a mask that goes to s3://…", "--scratch", "leave it out")
    if config.part is not None and config.overwrite and makes_one(inputs, config):
        raise UsageError(
            "parts of one mask would replace each other's work", "--overwrite",
            "remove the old mask, then run the parts",
        )  # fmt: skip
    if config.into is None and out is not None:
        return out
    if config.into is None or out is not None:
        raise UsageError("one of them says where the mask goes", "--out, --into", "give one")
    if not makes_one(inputs, config):
        raise UsageError("an image takes the mask of one raster", "--into", "name one input")
    read_image(config.into)  # before the model is looked for, which may take long
    files = find_model(config.model, config.model_config_file, config.card_overrides())
    return label_path(config.into, files.card.name)


def predict(
    inputs: Inputs,
    out: Path | RemoteName | str | None,
    config: PredictConfig,
    progress: Progress | None = None,
    listener: Listener | None = None,
) -> PredictResult:
    """Segment one raster, or several and whole folders, into masks.

    Parameters
    ----------
    inputs : Path or str, or a list of these
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
        out = _destination(names, None if out is None else given(out, written=True), config)
        if isinstance(out, RemoteName):
            place = remote_output(names, out, config)
            return predict_remote(_find(names, place.local, config), place, config, tracker)
        found = _find(names, out, config)
        if makes_one(names, config):
            if config.stac:
                check_item(out)  # before hours of work
            result = predict_one(found, out, config, tracker)
            _write_items(result.runs, config)
            return result
        result = predict_many(found, out, config, tracker)
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
            for note in write_item(out, allow_remote=config.allow_remote):
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
    inputs: Inputs,
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
        out = _destination(names, None if out is None else given(out, written=True), config)
        if isinstance(out, RemoteName):
            place = remote_output(names, out, config)
            found = _find(names, place.local, config)
            request = request_for(config, None, scenes_of(found, config))
            request = with_tile_there(request, place)
            plan = plan_of(Job(found[0].path, place.local), request)
            finished = place.look(plan, overwrite=config.overwrite) is not None
            yield _estimate(plan, request.files) | {"output": str(out), "finished": finished}
            return
        found = _find(names, out, config)
        single = makes_one(names, config)
        if single:
            out = named_output(out, config)
        request = request_for(config, None, scenes_of(found, config))
        skipping = config.skip_finished and not single
        for job in [Job(found[0].path, out)] if single else jobs_of(found, out, config):
            there = finished_mask(job, config.format, named=False) if skipping else None
            if there is not None:
                known = {"input": without_secrets(str(job.path)), "output": str(there)}
                yield known | {"finished": True, "skipped": True}
                continue
            try:
                with closing(open_job(job, request)) as raster:
                    plan, name = plan_for(raster.info, job, request, named=single)
                finished = check_output(name, plan, overwrite=config.overwrite) is not None
                share = _estimate_part(plan, config.part) if single and config.part else {}
                found_out = {"output": str(name), "finished": finished}
                yield _estimate(plan, request.files) | share | found_out
            except TilenetError as error:
                if single or error_of_one(error, job.path) is None:
                    raise
                yield {"input": without_secrets(str(job.path)), "error": error.as_dict()}
