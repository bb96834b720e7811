"""A plan: everything that decides the bytes of one mask, as parameters, made once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from tilenet.blend import Blend, Decision
from tilenet.config import PredictConfig
from tilenet.engine.reading import amplification
from tilenet.engine.tiling import TileChoice, choose_tile
from tilenet.errors import ModelError, UsageError
from tilenet.lattice import Axis, Lattice
from tilenet.models.session import NetworkShape, Setup
from tilenet.models.store import ModelFiles
from tilenet.sinks import LabelOf, MaskSpec, check_slides, zarr_format_for
from tilenet.sources import CACHE_BYTES, Area, RasterInfo

__all__ = [
    "Format",
    "Plan",
    "block_levels",
    "check_png",
    "format_of",
    "hash_of",
    "make_plan",
]

SCHEMA = 1
"""Version of the arithmetic: two tilenet releases with one number give the same bytes."""

Format = Literal["zarr", "cog", "png", "ome-tiff"]

_ENDINGS: dict[str, Format] = {
    ".ome.tif": "ome-tiff", ".ome.tiff": "ome-tiff",  # before the endings that these end in
    ".zarr": "zarr", ".tif": "cog", ".tiff": "cog", ".png": "png",
}  # fmt: skip

_BLOCK_CHUNKS, _MOST_ROWS = (4, 2), 6
_REREAD = 0.15  # of a block's rows, that the one above has decoded too
_MAX_BLOCK_SUMS_BYTES = 1 << 30
_MAX_PNG_PIXELS = 1 << 26


def format_of(out: Path) -> Format | None:
    """Return the format that an output's ending names, None if it names none."""
    name = out.name.lower()
    return next((one for ending, one in _ENDINGS.items() if name.endswith(ending)), None)


def hash_of(identity: dict[str, Any]) -> str:
    """Return the hash of a plan's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def block_levels(lattice: Lattice, spec: MaskSpec) -> int:
    """Return how many pyramid levels a block makes alone: those in which it is whole chunks."""
    cores, levels = (lattice.rows.core, lattice.cols.core), 0
    while all(core % (spec.chunk << (levels + 1)) == 0 for core in cores):
        levels += 1
    return min(levels, len(spec.levels) - 1)


def check_png(height: int, width: int, where: object) -> None:
    """Raise UsageError if a mask is too large for a PNG."""
    if height * width > _MAX_PNG_PIXELS:
        raise UsageError("too large for a PNG, which is made in memory", where, "use .tif")


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of one mask.

    Parameters
    ----------
    raster : RasterInfo
        The input at its level.
    model : ModelFiles
        The network.
    channels : int
        Its output channels, K.
    setup : Setup
        What it runs on.
    lattice : Lattice
        Tiles and blocks.
    blend : Blend
        Window.
    probabilities : bool
        Whether they are stored.
    format : {"zarr", "cog", "png", "ome-tiff"}
        Output.
    zarr_format : {2, 3}
        Of the store.
    chunk : int
        Chunk side in pixels.
    skip_nodata : bool
        Whether tiles without kept pixels are skipped.
    strict : bool
        Whether a native block that cannot be read ends the run.
    read_timeout : float
        Seconds after which a read counts as stuck.
    label : LabelOf or None
        The OME-Zarr image that gets the mask as a label.
    area : Area or None
        Where the work matters; None: everywhere.
    lowered : bool
        Whether memory made the tile smaller than it would be.
    """

    raster: RasterInfo
    model: ModelFiles
    channels: int
    setup: Setup
    lattice: Lattice
    blend: Blend
    probabilities: bool
    format: Format
    zarr_format: Literal[2, 3]
    chunk: int
    skip_nodata: bool
    strict: bool = False
    read_timeout: float = 600.0
    label: LabelOf | None = None
    area: Area | None = None
    lowered: bool = False

    def automatic_tile(self, files: ModelFiles, usual: int) -> int | None:
        """Return the tile if the model is this one, and "auto" means it; else None."""
        tile = self.lattice.rows.tile
        meant = tile == usual or self.lowered
        return tile if meant and self.model.sha256 == files.sha256 else None

    @cached_property
    def decision(self) -> Decision:
        """How sums become classes."""
        card = self.model.card
        return Decision(card.activation, card.threshold, self.blend is Blend.CROP)

    @cached_property
    def spec(self) -> MaskSpec:
        """What the mask looks like on disk."""
        card = self.model.card
        return MaskSpec(
            height=self.raster.height,
            width=self.raster.width,
            classes=card.class_infos(),
            georeference=self.raster.georeference,
            chunk=self.chunk,
            channels=card.channel_names(self.channels) if self.probabilities else (),
            zarr_format=self.zarr_format,
            title=card.name,
            label=self.label,
        )

    @property
    def block_levels(self) -> int:
        """How many pyramid levels a block makes alone: those in which it is whole chunks."""
        return block_levels(self.lattice, self.spec)

    @property
    def read_amplification(self) -> float:
        """Pixels decoded per pixel of the raster, if neighbours are read one after another."""
        raster, margin = self.raster, self.model.card.margin
        return amplification(
            self.lattice, raster.native_block, margin, raster.pixel_bytes, CACHE_BYTES
        )

    def identity(self) -> dict[str, Any]:
        """Return what makes this run this run; not how it is cut, scheduled or where it lies."""
        rows, raster = self.lattice.rows, self.raster
        card, grid, like = self.model.card, raster.resampling, raster.view.like
        return {
            "schema": SCHEMA,
            "input": raster.fingerprint,
            "size": [raster.height, raster.width],
            "bands": list(raster.bands),
            "level": raster.level,
            "resampling": None if grid is None else [*grid.step, *grid.size],
            "like": None
            if like is None
            else [like.crs_wkt, *like.transform, like.height, like.width],
            "mosaic": [[w.row, w.col, w.height, w.width] for _, w in raster.scenes],
            "scaling": None if raster.scaling is None else [list(one) for one in raster.scaling],
            "source_mpp": raster.view.source_mpp,
            "plane": [list(one) for one in raster.plane],
            "area": None if self.area is None else self.area.sha256,
            "model": self.model.sha256,
            "classes": [c.name for c in card.class_infos()],
            "threshold": card.threshold,
            "tile": rows.tile,
            "overlap": rows.tile - rows.stride,
            "divisor": rows.divisor,
            "blend": str(self.blend),
            "backend": self.setup.backend,
            "device": self.setup.device_class,
            "precision": self.setup.precision,
            "format": self.format,
            "zarr_format": self.zarr_format,
            "chunk": self.chunk,
            "probabilities": self.probabilities,
            **self._label_identity(),
            **self._batch_identity(),
        }

    def _label_identity(self) -> dict[str, Any]:
        if self.label is None:
            return {}
        label = self.label
        return {"label": [label.levels, *label.scale, *label.offset, *label.units]}

    def _batch_identity(self) -> dict[str, Any]:
        """On a GPU the library chooses its kernels by the batch, and with them the last bits."""
        return {} if self.setup.device_class == "cpu" else {"batch_size": self.setup.batch_size}

    @cached_property
    def hash(self) -> str:
        """The hash of the identity."""
        return hash_of(self.identity())

    def dump(self) -> bytes:
        """Return the plan as JSON."""
        return _adapter().dump_json(self)

    @classmethod
    def load(cls, text: bytes) -> Plan:
        """Return the plan from its JSON; ValueError if it is none."""
        return _adapter().validate_json(text)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def _core(chunk: int, tile: int, channels: int, shared: int) -> tuple[int, int]:
    """Return the height and width of a block: whole chunks, at least a tile.

    Tall blocks, taken row by row: the columns that neighbours share are still in GDAL's cache, so
    only shared rows are decoded twice, taller ones where these are many; and the sums, one tile
    high, stay narrow. Many classes take smaller blocks.
    """
    rows, cols = _BLOCK_CHUNKS
    while rows < _MOST_ROWS and shared > _REREAD * rows * chunk:
        rows += 2
    while rows > cols and 4 * channels * rows * cols * chunk * chunk > _MAX_BLOCK_SUMS_BYTES:
        rows -= 2
    while rows * chunk < tile:
        rows *= 2
    while cols * chunk < tile:
        cols *= 2
    return rows * chunk, cols * chunk


def _check_bands(raster: RasterInfo, files: ModelFiles, shape: NetworkShape) -> None:
    """Raise ModelError unless the raster has as many bands as the network takes."""
    if len(raster.bands) == shape.bands:
        return
    wanted = files.card.bands
    named = "" if isinstance(wanted, int) else f" ({', '.join(wanted)})"
    own = ", ".join(name or "?" for name in raster.names) if any(raster.names) else ""
    raise ModelError(
        f"the raster has {len(raster.bands)} bands (of {raster.count}{own and ': ' + own}), the "
        f"model {files.card.name} wants {shape.bands}{named}",
        raster.path,
        "choose with --bands, by name or counted from 1",
    )


@lru_cache(maxsize=8)  # small images of one size share one, and what its axes have worked out
def _lattice(sizes: tuple[int, int], cores: tuple[int, int], choice: TileChoice) -> Lattice:
    stride = choice.tile - choice.overlap
    rows, cols = (
        Axis(size, choice.tile, stride, choice.divisor, core, choice.fixed)
        for size, core in zip(sizes, cores, strict=True)
    )
    return Lattice(rows, cols)


def make_plan(
    raster: RasterInfo,
    files: ModelFiles,
    shape: NetworkShape,
    setup: Setup,
    config: PredictConfig,
    output: Format,
    area: Area | None = None,
    tile: int | None = None,
) -> Plan:
    """Make the plan of one raster; `tile` is what is settled of it (see `choose_tile`).

    Raises
    ------
    ModelError
        The raster's bands are not the model's.
    UsageError
        Tile and overlap do not fit, or the format does not.
    """
    _check_bands(raster, files, shape)
    if output == "png":
        check_png(raster.height, raster.width, raster.path)
    if output == "ome-tiff":
        check_slides("--out")
    choice = choose_tile(files, shape, config, tile)
    if config.block is not None:
        core_rows = core_cols = config.block
    else:
        native = raster.native_block[0]
        shared = -(-(choice.overlap + sum(files.card.margin)) // native) * native
        core_rows, core_cols = _core(config.chunk, choice.tile, shape.channels, shared)
    formats: dict[str, Literal[2, 3]] = {"2": 2, "3": 3}  # else it follows the raster
    return Plan(
        raster=raster,
        model=files,
        channels=shape.channels,
        setup=setup,
        lattice=_lattice((raster.height, raster.width), (core_rows, core_cols), choice),
        blend=config.blend,
        probabilities=config.probabilities,
        format=output,
        zarr_format=formats.get(config.zarr_format) or zarr_format_for(raster.georeference),
        chunk=config.chunk,
        skip_nodata=config.skip_nodata,
        strict=config.strict,
        read_timeout=config.read_timeout,
        area=area,
        lowered=config.tile is None and choice.tile != choose_tile(files, shape, config).tile,
    )
