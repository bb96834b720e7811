"""What a run says of itself: what is planned, what its reader remarks, what it waited for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.engine.savings import savings_of
from tilenet.results import PredictResult, RunResult
from tilenet.sinks import warnings_for

__all__ = [
    "Remarks",
    "say_bottleneck",
    "say_nonfinite",
    "say_plan",
    "say_remarks",
    "say_strips",
]

_logger = logging.getLogger(__name__)
_GOOD_EFFICIENCY = 0.7  # share of the time with a forward running, below which a run says why
_MAX_REMARKS = 20


def say_plan(plan: Plan) -> None:
    """Say how a raster is cut and read, and what its reader should know."""
    say_remarks(plan)
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


def _remarks(plan: Plan) -> Iterator[str]:
    """Yield what the reader of a mask should know of it."""
    yield from plan.raster.notes
    if plan.format == "zarr":
        yield from warnings_for(plan.spec)
    if plan.format == "ome-tiff" and plan.spec.georeference.is_georeferenced:
        yield "an OME-TIFF has no place on a map; a COG (.tif) or a Zarr store has"
    lo, hi = plan.model.card.value_range
    dtype = np.dtype(plan.raster.stored_dtype)
    if dtype.kind in "iu" and dtype.itemsize > 1 and plan.raster.scaling is None and hi <= 255:
        yield (
            f"pixels are {dtype}, but the model expects values {lo:g} to {hi:g}: give "
            "--value-range if its numbers are not yours"
        )


def say_remarks(plan: Plan) -> None:
    """Say what the reader of a mask should know of it."""
    remarks = Remarks()
    remarks.take(plan)
    remarks.say()


class Remarks:
    """What there is to say of many rasters: once each, and not by the thousand."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._pixels = self._forwarded = self._rasters = 0

    def take(self, plan: Plan) -> None:
        """Keep what there is to say of a raster."""
        height, width = plan.lattice.tile_shape
        self._counts.update(_remarks(plan))
        self._rasters += 1
        self._pixels += plan.raster.height * plan.raster.width
        self._forwarded += plan.lattice.tiles * height * width

    def say(self) -> None:
        """Say it."""
        if self._rasters > 1:
            _logger.info(
                "%d rasters of one block: tiles of %.2f × their pixels",
                self._rasters, self._forwarded / self._pixels,
            )  # fmt: skip
        for remark, count in self._counts.most_common(_MAX_REMARKS):
            _logger.warning("%s", remark if count == 1 else f"{remark} ({count} rasters)")
        if len(self._counts) > _MAX_REMARKS:
            _logger.warning("and %d more remarks like these", len(self._counts) - _MAX_REMARKS)


def say_nonfinite(scores: int) -> None:
    """Warn of scores that are no numbers."""
    if scores:
        _logger.warning("%d scores were not finite and count as 0", scores)


def _say_savings(plan: Plan) -> None:
    """Say what an area spares; of very many blocks, by a sample."""
    saved = savings_of(plan)
    _logger.info(
        "area: %.2f %% of the pixels are kept; %d of %d tiles are skipped, "
        "%d of %d blocks are not read",
        100 * saved.kept_share, saved.tiles - saved.tiles_to_forward, saved.tiles,
        saved.blocks - saved.blocks_to_read, saved.blocks,
    )  # fmt: skip


def say_strips(meter: Meter) -> None:
    """Say what it cost that blocks are done apart."""
    there = "strips took %.1f MB of the run folder"
    if meter.strip_bytes_moved:
        there += "; %.1f MB were read on another host than wrote them"
        _logger.info(there, meter.strip_bytes / 1e6, meter.strip_bytes_moved / 1e6)
    else:
        _logger.info(there, meter.strip_bytes / 1e6)


def say_bottleneck(result: RunResult | PredictResult) -> None:
    """Say in one line what a run of a second or more waited for, if it was not the network."""
    if result.efficiency >= _GOOD_EFFICIENCY or result.seconds < 1 or not result.forward_seconds:
        return
    spent = {
        "reading": result.read_seconds,
        "writing": result.write_seconds,
        "adding up": result.blend_seconds,
        "preparing the network": result.prepare_seconds,
    }
    most = max(spent, key=lambda name: spent[name])
    _logger.info(
        "the network ran %.0f %% of the time; %s took most beside it: %.1f s over its threads",
        100 * result.efficiency, most, spent[most],
    )  # fmt: skip
