"""What is asked for: a run's rasters and options, and the plan of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilenet.config import PredictConfig
from tilenet.engine.output import plan_in_progress, tile_there
from tilenet.engine.plan import Format, Plan, format_of, make_plan
from tilenet.engine.tiling import choose_tile
from tilenet.errors import InputError, UsageError
from tilenet.models.session import NetworkShape, Setup, choose
from tilenet.models.store import ModelFiles
from tilenet.sinks import read_image
from tilenet.sources import Grid, Raster, RasterInfo, RemoteName, View, area_of, open_raster
from tilenet.watchdog import watched

__all__ = ["ENDINGS", "Job", "Request", "asked_of", "open_job", "plan_for"]

_CHOSEN = ("device", "backend", "precision")
_ZARR_SIDE = 4096  # pixels; larger masks whose format nobody says are Zarr


@dataclass(frozen=True, slots=True)
class Request:
    """What all rasters of one run have in common.

    Parameters
    ----------
    config : PredictConfig
        Options.
    files : ModelFiles
        The model.
    shape : NetworkShape
        What it takes and gives.
    setup : Setup
        What it runs on.
    like : Grid or None
        The grid that `config.like` names.
    scenes : tuple of str
        Rasters that are seen as one; () if each is its own.
    meeting : tuple of (str, str) or None
        Folder and token by which workers on other machines show that they see what we see.
    tile : int or None
        What memory allows, if that is less than usual; a mask that is there goes on with its own.
    """

    config: PredictConfig
    files: ModelFiles
    shape: NetworkShape
    setup: Setup
    like: Grid | None = None
    scenes: tuple[str, ...] = ()
    meeting: tuple[str, str] | None = None
    tile: int | None = None

    @property
    def follows(self) -> bool:
        """Whether a mask that is there decides the tile."""
        return self.config.tile is None and not self.config.overwrite

    @property
    def usual_tile(self) -> int:
        """The tile where memory is no matter."""
        return choose_tile(self.files, self.shape, self.config).tile


@dataclass(frozen=True, slots=True)
class Job:
    """One raster and where its mask goes.

    Parameters
    ----------
    path : Path or RemoteName
        The raster.
    out : Path
        The mask; without an ending if the raster decides its format.
    seen : bool
        It is there, as whoever asks sees it: a worker that does not is unfit.
    """

    path: Path | RemoteName
    out: Path
    seen: bool = False


ENDINGS: dict[Format, str] = {
    "zarr": ".zarr", "cog": ".tif", "png": ".png", "ome-tiff": ".ome.tif"
}  # fmt: skip
"""Of masks whose name the raster decides, by format."""


def _format(info: RasterInfo, config: PredictConfig) -> Format:
    if config.format is not None:
        return config.format
    if max(info.height, info.width) > _ZARR_SIDE:
        return "zarr"
    return "cog" if info.georeference.is_georeferenced else "png"


def _view(request: Request) -> View:
    """Return how the run looks at its rasters."""
    config, card = request.config, request.files.card
    return View(
        bands=config.bands,
        level=config.level,
        mpp=config.mpp,
        resolution=config.resolution,
        source_mpp=config.source_mpp,
        plane=config.plane,
        variable=config.variable,
        allow_remote=config.allow_remote,
        like=request.like,
        mosaic=request.scenes,
        scaling=config.scaling,
        trained_bands=() if isinstance(card.bands, int) else card.bands,
        trained_mpp=card.mpp,
        trained_resolution=card.ground_resolution,
    )


def open_job(job: Job, request: Request) -> Raster:
    """Open a raster at the bands and the level that the run asks for; close it after use."""
    with watched(str(job.path), request.config.read_timeout):
        return open_raster(job.path, _view(request), keep_open=True)


def plan_for(info: RasterInfo, job: Job, request: Request, *, named: bool) -> tuple[Plan, Path]:
    """Plan the mask of a raster.

    Parameters
    ----------
    info : RasterInfo
        What `open_job` found.
    job : Job
        The raster and where its mask goes.
    request : Request
        The run.
    named : bool
        `job.out` is the mask's own name, whose ending gives the format.

    Returns
    -------
    plan : Plan
    out : Path
        The mask's name.

    Raises
    ------
    ModelError, UsageError
        The raster does not fit.
    InputError
        The area does not read, or lies elsewhere.
    """
    config = request.config
    if named:
        named_format = "zarr" if config.into else config.format or format_of(job.out)
        assert named_format is not None, "an output without a format was refused before"
        output: Format = named_format
        out = job.out
    else:
        output = _format(info, config)
        out = job.out.with_name(job.out.name + ENDINGS[output])
    area = area_of(info, config.aoi, config.within, config.read_timeout)
    tile = request.tile
    if request.follows:
        tile = tile_there(out, request.files, request.usual_tile) or tile
    known = plan_in_progress(out, overwrite=config.overwrite)
    setup = _setup_for(known, request)
    plan = make_plan(info, request.files, request.shape, setup, config, output, area, tile)
    if config.into is not None:
        plan = _as_label(plan, config, config.into)
    if known is not None and known.hash == plan.hash:
        plan = replace(plan, lattice=known.lattice)  # its blocks stay as they were cut
    return plan, out


def asked_of(config: PredictConfig, known: Setup | None, threads: int) -> dict[str, Any]:
    """Return what `choose` is asked; "auto" follows what an unfinished run of a mask was begun on.

    Threads and batch are part of that, where they decide the last bits: torch's kernels follow the
    threads, a GPU's the batch.
    """
    keys = (*_CHOSEN, "batch_size")
    asked = {key: getattr(config, key) for key in keys} | {"threads": threads}
    if known is None:
        return asked
    asked |= {key: getattr(known, key) for key in _CHOSEN if asked[key] == "auto"}
    if known.library == "torch":
        asked["threads"] = known.threads
    if known.device != "cpu" and config.batch_size is None:
        asked["batch_size"] = known.batch_size
    return asked


def _setup_for(known: Plan | None, request: Request) -> Setup:
    """Return what the run of a mask goes on with, if its plan is known, or is begun on.

    Raises
    ------
    ModelError
        This machine does not have it.
    """
    setup = request.setup
    asked = asked_of(request.config, None if known is None else known.setup, setup.threads)
    if all(value in ("auto", None, getattr(setup, key)) for key, value in asked.items()):
        return setup
    return choose(request.files, **asked)


def _as_label(plan: Plan, config: PredictConfig, into: Path) -> Plan:
    """Return the plan of a mask that an OME-Zarr image gets as a label."""
    image = read_image(into)
    if (image.height, image.width) != (plan.raster.height, plan.raster.width):
        raise InputError(
            f"the image has {image.height} × {image.width} pixels, the mask would have "
            f"{plan.raster.height} × {plan.raster.width}",
            into,
            "give the raster that it was made from",
        )
    if config.zarr_format not in ("auto", str(image.zarr_format)):
        raise UsageError(
            f"the image has Zarr format {image.zarr_format}", "--zarr-format", "leave it out"
        )
    return replace(plan, zarr_format=image.zarr_format, label=image.label)
