"""What became of inputs: the figures that `--json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tilenet.classes import NODATA
from tilenet.engine.document import Finished
from tilenet.engine.journal import Invalid
from tilenet.engine.meter import Meter
from tilenet.engine.plan import Plan
from tilenet.errors import InvalidError, without_secrets
from tilenet.ground import AreaUnit, pixel_area
from tilenet.part import Part

__all__ = [
    "ClassPixels",
    "Failure",
    "PredictResult",
    "RunResult",
    "Skipped",
    "run_result",
    "times_of",
]

_MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class ClassPixels:
    """How many pixels of a mask are of one class.

    Parameters
    ----------
    id : int
        Value in the mask.
    name : str
        Its name.
    pixels : int
        How many.
    area : float or None
        Of all these pixels, in `area_unit`; None where the grid does not tell.
    area_unit : {"mm2", "ha"} or None
        Square millimetres of a slide, hectares of a map.
    """

    id: int
    name: str
    pixels: int
    area: float | None = None
    area_unit: AreaUnit | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON: with ``area_mm2`` or ``area_ha``, where it is known."""
        entry: dict[str, Any] = {"id": self.id, "name": self.name, "pixels": self.pixels}
        if self.area is not None:
            entry[f"area_{self.area_unit}"] = self.area
        return entry


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that failed.

    Parameters
    ----------
    input : str
        Its path.
    code : int
        The exit code it would have had alone.
    error : str
        What is wrong, where, what to do.
    """

    input: str
    code: int
    error: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input whose mask was there, and nothing else was asked (`--skip-finished`).

    Parameters
    ----------
    input, output : str
        Raster and mask.
    """

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """One finished mask; fields are the keys of `--json` (see `as_dict`).

    `blocks_invalid` are the blocks in which something failed, `invalid` says where and what (the
    first 1,000 places): those pixels are 255, and the exit code is 7.
    `forward_seconds` is wall time with a forward running, `wait_seconds` the rest, in which the
    network waited; `read_seconds`, `write_seconds` (export included), `queue_seconds` (pixels that
    waited for the network), `blend_seconds` (scores were added up) and `prepare_seconds` (the
    network was converted, loaded or compiled) are added up over threads. `efficiency` is the share
    of the time with a forward. `mpixels_per_second` is of what this run made, not of what it found.
    Of many small rasters, each has its share by pixels.
    `redundancy` is how many pixels of tiles there are for one of the raster.
    `strip_bytes` of strips and halves of blocks went to the run folder; `strip_bytes_moved` of them
    were read on another host than wrote them.
    `read_amplification` is planned, not measured: see `tilenet.engine.reading`.
    A `part` of a mask is `complete` when every other one is done too. Until then nothing is at
    `output`; `classes` are those of the blocks that are done, `invalid` what failed in this part.
    """

    output: str
    complete: bool
    width: int
    height: int
    classes: tuple[ClassPixels, ...]
    nodata_pixels: int
    pixels: int
    tile: int
    overlap: int
    tiles: int
    tiles_skipped: int
    tiles_forwarded: int
    blocks: int
    blocks_done: int
    blocks_resumed: int
    blocks_invalid: tuple[int, ...]
    invalid: tuple[Invalid, ...]
    nonfinite_scores: int
    strip_bytes: int
    strip_bytes_moved: int
    seconds: float
    forward_seconds: float
    read_seconds: float
    write_seconds: float
    wait_seconds: float
    queue_seconds: float
    blend_seconds: float
    prepare_seconds: float
    redundancy: float
    read_amplification: float
    mpixels_per_second: float
    efficiency: float
    peak_rss_bytes: int
    device: str
    backend: str
    precision: str
    batch_size: int
    plan_hash: str
    input: str
    files: tuple[str, ...]
    part: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of one run."""
        return asdict(self) | {"classes": [one.as_dict() for one in self.classes]}

    def failure(self) -> Failure | None:
        """Return what is wrong with the mask in words, None if nothing is."""
        if not self.invalid:
            return None
        first = self.invalid[0]
        place = f"rows {first.row} to {first.row + first.height}, "
        place += f"columns {first.col} to {first.col + first.width}"
        error = InvalidError(
            f"{len(self.blocks_invalid)} of {self.blocks} blocks have pixels without an answer "
            f"(255), the first at {place}: {first.why}",
            self.input,
            "--json lists them",
        )
        return Failure(self.input, error.code, str(error))


@dataclass(frozen=True, slots=True)
class PredictResult:
    """What became of one or many inputs.

    Parameters
    ----------
    runs : tuple of RunResult
        The finished masks, in the order of the inputs.
    failed : tuple of Failure
        The inputs that failed; with code 7, those of `runs` of which a part failed.
    pixels : int
        Pixels of all finished masks.
    seconds, forward_seconds, read_seconds, write_seconds, wait_seconds, queue_seconds, \
    blend_seconds, prepare_seconds, mpixels_per_second, efficiency : float
        As in `RunResult`, of all of it.
    peak_rss_bytes : int
        Of all processes.
    skipped : tuple of Skipped
        The inputs whose masks were there, with `--skip-finished`.
    """

    runs: tuple[RunResult, ...]
    failed: tuple[Failure, ...] = ()
    pixels: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    wait_seconds: float = 0.0
    queue_seconds: float = 0.0
    blend_seconds: float = 0.0
    prepare_seconds: float = 0.0
    mpixels_per_second: float = 0.0
    efficiency: float = 0.0
    peak_rss_bytes: int = 0
    skipped: tuple[Skipped, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all masks are there: of a raster made in parts, others may be at work."""
        return all(run.complete for run in self.runs)

    @property
    def exit_code(self) -> int:
        """0, or 7 if an input failed, or a part of one."""
        return 7 if self.failed else 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """The masks that are there."""
        made = tuple(run.output for run in self.runs if run.complete)
        return made + tuple(one.output for one in self.skipped)

    @property
    def inputs(self) -> int:
        """How many inputs there were."""
        failed = sum(failure.code != InvalidError.code for failure in self.failed)
        return len(self.runs) + len(self.skipped) + failed

    def first_as_dict(self) -> dict[str, Any]:
        """Return the JSON document of the only run."""
        if self.runs:
            return self.runs[0].as_dict()
        [one] = self.skipped
        return {**asdict(one), "complete": True, "skipped": True}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of several runs."""
        runs = [run.as_dict() for run in self.runs]
        return asdict(self) | {"runs": runs, "exit_code": self.exit_code}


def run_result(
    plan: Plan,
    out: object,
    done: Finished,
    meter: Meter,
    seconds: float,
    *,
    resumed: int,
    part: Part | None = None,
    missing: int = 0,
) -> RunResult:
    """Return the figures of a finished mask, or of one that others finish.

    Parameters
    ----------
    plan : Plan
        Its run.
    out : Path or RemoteName
        Where it lies.
    done : Finished
        What it holds.
    meter : Meter
        What this run took.
    seconds : float
        Wall time.
    resumed : int
        Blocks that an earlier run had finished, or another part.
    part : Part, optional
        Which one of the raster's this run was.
    missing : int
        Blocks that are left to others.
    """
    rows = plan.lattice.rows
    return RunResult(
        output=str(out),
        complete=not missing,
        width=plan.raster.width,
        height=plan.raster.height,
        classes=_classes(plan, done),
        nodata_pixels=done.pixels.get(NODATA, 0),
        pixels=plan.raster.height * plan.raster.width,
        tile=rows.tile,
        overlap=rows.tile - rows.stride,
        tiles=plan.lattice.tiles,
        tiles_skipped=done.tiles_skipped,
        tiles_forwarded=meter.tiles_forwarded,
        blocks=done.blocks,
        blocks_done=done.blocks - missing,
        blocks_resumed=resumed,
        blocks_invalid=tuple(sorted({one.block for one in done.invalid})),
        invalid=done.invalid[:_MAX_LISTED],
        nonfinite_scores=meter.nonfinite,
        strip_bytes=meter.strip_bytes,
        strip_bytes_moved=meter.strip_bytes_moved,
        **times_of(meter, seconds),
        redundancy=round(plan.lattice.redundancy, 4),
        read_amplification=round(plan.read_amplification, 4),
        peak_rss_bytes=meter.peak_rss_bytes,
        device=plan.setup.device,
        backend=plan.setup.backend,
        precision=plan.setup.precision,
        batch_size=plan.setup.tiles_per_call,
        plan_hash=plan.hash,
        input=without_secrets(plan.raster.path),
        files=plan.raster.files,
        part=None if part is None else str(part),
    )


def times_of(meter: Meter, seconds: float) -> dict[str, Any]:
    """Return what a run of so many seconds took, by the names of the results' fields."""
    # Rasters of a pack have a share of its forwards, and of the time until its end is known.
    forward = min(meter.forward_seconds, seconds)
    figures = {
        "seconds": seconds,
        "forward_seconds": forward,
        "read_seconds": meter.read_seconds,
        "write_seconds": meter.write_seconds,
        "wait_seconds": seconds - forward,
        "queue_seconds": meter.queue_seconds,
        "blend_seconds": meter.blend_seconds,
        "prepare_seconds": meter.prepare_seconds,
        "mpixels_per_second": meter.pixels / 1e6 / seconds if seconds else 0.0,
        "efficiency": forward / seconds if seconds else 0.0,
    }
    return {name: round(value, 4) for name, value in figures.items()}


def _classes(plan: Plan, done: Finished) -> tuple[ClassPixels, ...]:
    spec = plan.spec
    one = pixel_area(spec.georeference, spec.height, spec.width)
    found = []
    for c in spec.classes:
        pixels = done.pixels.get(c.id, 0)
        # Twelve digits: the rest is the rounding of a product, and a table is to be read.
        area = None if one is None else float(f"{pixels * one.value:.12g}")
        found.append(ClassPixels(c.id, c.name, pixels, area, None if one is None else one.unit))
    return tuple(found)
