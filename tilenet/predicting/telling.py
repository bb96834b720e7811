"""What a run says of itself: what is planned, what its reader remarks, what it waited for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.engine.savings import savings_of
from tilenet.results import RunResult
from tilenet.sinks import warnings_for

__all__ = [
    "say_bottleneck",
    "say_nonfinite",
    "say_notes",
    "say_plan",
    "say_savings",
    "say_strips",
]

_logger = logging.getLogger(__name__)
_GOOD_EFFICIENCY = 0.7  # share of the time with a forward running, below which a run says why
_MAX_NOTES = 20


def say_plan(plan: Plan) -> None:
    """Say what is going to be done."""
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
        say_savings(plan)
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


def say_nonfinite(scores: int) -> None:
    """Warn of scores that are no numbers."""
    if scores:
        _logger.warning("%d scores were not finite and count as 0", scores)


def say_notes(plans: Iterable[Plan | None]) -> None:
    """Pass on what the rasters' readers have to say, once each, and not by the thousand."""
    notes = [note for plan in plans if plan is not None for note in plan.raster.notes]
    for note in notes[:_MAX_NOTES]:
        _logger.warning("%s", note)
    if len(notes) > _MAX_NOTES:
        _logger.warning("and %d more remarks like these", len(notes) - _MAX_NOTES)


def say_savings(plan: Plan) -> None:
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


def say_bottleneck(result: RunResult) -> None:
    """Say in one line what a run waited for, if it was not the network."""
    if result.efficiency >= _GOOD_EFFICIENCY or result.seconds < 1:
        return
    spent = {"reading": result.read_seconds, "writing": result.write_seconds}
    most = max(spent, key=lambda name: spent[name])
    _logger.info(
        "the network ran %.0f %% of the time; %s took most beside it: %.1f s over its threads",
        100 * result.efficiency, most, spent[most],
    )  # fmt: skip
