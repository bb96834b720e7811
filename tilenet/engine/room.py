"""Whether a run fits on the disk: refused before it begins if it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

from tilenet.engine.plan import Plan
from tilenet.errors import DISK_FULL, ResourceError

__all__ = ["check_room", "needed_bytes", "with_room"]

_RATIO = 64  # masks are stored in a hundredth of their pixels (measured); noise takes more
_FILE_COPIES = 3  # a GeoTIFF, its overviews, and the COG made of them
_WAITING = 4  # blocks that are forwarded and wait for a neighbour
_METADATA = 1 << 17


def needed_bytes(plan: Plan) -> int:
    """Return what a run takes on the disk at least: strips, and a mask that compresses well."""
    lattice, channels = plan.lattice, plan.channels
    core, reach = lattice.core(0), lattice.reach(0)
    below = lattice.strip(0, lattice.cols.blocks) if lattice.rows.blocks > 1 else None
    strips = 4 * channels * (0 if below is None else below.height) * lattice.cols.size
    frame_rows, frame_cols = lattice.shared(lattice.blocks - 1)
    frames = 4 * channels * (frame_rows * core.width + frame_cols * core.height)
    waiting = 4 * channels * max(0, reach.pixels - core.pixels) + frames + core.pixels
    pixels = lattice.rows.size * lattice.cols.size
    planes = 1 + (channels if plan.probabilities else 0)
    mask = pixels * planes // _RATIO * (1 if plan.format == "zarr" else 1 + _FILE_COPIES)
    return strips + min(_WAITING, lattice.blocks) * waiting + mask + _METADATA


def _mega(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def check_room(plan: Plan, out: Path) -> None:
    """Raise ResourceError if a new run of this plan cannot fit beside its output."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, needed_bytes(plan)
    if free < needed:
        raise ResourceError(
            f"the disk has {_mega(free)} free, and the run needs {_mega(needed)} or more",
            folder,
            "free space, or choose another --out",
        )


def with_room(error: ResourceError, plan: Plan, out: Path) -> ResourceError:
    """Return the error of a full disk with what is needed and free, any other as it is."""
    if error.what != DISK_FULL:
        return error
    free = shutil.disk_usage(out.absolute().parent).free
    what = f"{DISK_FULL}: {_mega(free)} free, and the run needs {_mega(needed_bytes(plan))} or more"
    return ResourceError(what, error.where, error.do)
