"""One raster to a mask in an object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tilenet.config import PredictConfig
from tilenet.engine.elsewhere import RemoteOutput
from tilenet.engine.executor import Executor
from tilenet.engine.meter import Meter
from tilenet.engine.request import Job, Request
from tilenet.errors import UsageError
from tilenet.events import Tracker
from tilenet.predicting.asking import Clock, cluster_for, makes_one, plan_of, request_for, scenes_of
from tilenet.predicting.single import make_one, result_of, tell_end, telling_failure
from tilenet.predicting.telling import say_remarks
from tilenet.results import PredictResult, run_result
from tilenet.sources import Input, RemoteName

__all__ = ["predict_remote", "remote_output", "with_tile_there"]


def remote_output(
    inputs: Sequence[Path | RemoteName], out: RemoteName, config: PredictConfig
) -> RemoteOutput:
    """Return the place of a mask in an object store, if such a mask is possible."""
    if not config.allow_remote:
        raise UsageError("lies on another machine", out, "to write there, give --allow-remote")
    other = config.into or config.stac or config.format not in (None, "zarr")
    if other or not makes_one(inputs, config):
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


def with_tile_there(request: Request, place: RemoteOutput) -> Request:
    """Return the request with the tile of a mask that is there, unless another is asked for."""
    if not request.follows:
        return request
    return replace(request, tile=place.tile(request.files, request.usual_tile) or request.tile)


def predict_remote(
    found: list[Input], place: RemoteOutput, config: PredictConfig, tracker: Tracker
) -> PredictResult:
    """Make a mask in a scratch folder, and its copy in an object store meanwhile."""
    with cluster_for(config) as cluster:
        return _predict_copied(found, place, config, tracker, cluster)


def _predict_copied(
    found: list[Input],
    place: RemoteOutput,
    config: PredictConfig,
    tracker: Tracker,
    cluster: Executor | None,
) -> PredictResult:
    clock, known, source = Clock(), place.known(), found[0]
    path = source.path.absolute()
    tracker.begin([path])
    setup = None if known is None else known.setup
    request = request_for(config, setup, scenes_of(found, config), cluster)
    request = with_tile_there(request, place)
    with telling_failure(tracker, path):
        plan = plan_of(Job(source.path, place.local), request)
        done = place.check(plan, overwrite=config.overwrite)
        if done is not None:
            say_remarks(plan)
            tracker.expect(path, plan.raster.height * plan.raster.width)
            there = run_result(plan, place.place, done, Meter(), clock.seconds, resumed=done.blocks)
            tell_end(tracker, path, there, resumed=True)
            return result_of(there, clock)
        # What is in the scratch folder by then is this plan's.
        here = replace(request, config=config.model_copy(update={"overwrite": False}))
        with place.owned(plan, overwrite=config.overwrite) as mirror:
            run, resumed = make_one(
                source, place.local, place.place, here, tracker, clock, cluster, mirror
            )
            mirror.finish(place.local, plan.zarr_format)
        there = replace(run, output=str(place.place))
        tell_end(tracker, path, there, resumed=resumed)
    return result_of(there, clock)
