"""What a mask is before any pixel of it exists: size, classes, place, storage. No files here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter

from tilenet.classes import NODATA, ClassInfo
from tilenet.geometry import Georeference

__all__ = ["ArrayLayout", "Before", "LabelOf", "Level", "MaskSpec", "ZarrFormat", "zarr_format_for"]

ZarrFormat = Literal[2, 3]
Level = tuple[str, int, int, int]
"""Array path, factor, height, width of one pyramid level."""

Before = Callable[[dict[str, Any]], None]
"""Called with what is known of a file (`sha256`, `size`) just before it gets its name."""


def zarr_format_for(georeference: Georeference) -> ZarrFormat:
    """Return 3 for a grid on a map, else 2, which QuPath reads."""
    return 3 if georeference.is_georeferenced else 2


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """How one pixel array is stored.

    Parameters
    ----------
    path : str
        Place inside the store.
    shape, chunks : tuple of int
        (height, width), or (channels, height, width).
    fill : int
        Value of a chunk that is not stored.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    fill: int

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the axes."""
        return ("y", "x") if len(self.shape) == 2 else ("class", "y", "x")


@dataclass(frozen=True, slots=True)
class LabelOf:
    """What a mask that is a label of an OME-Zarr image shares with that image.

    Parameters
    ----------
    levels : int
        Pyramid levels: OME demands as many of a label.
    scale, offset : tuple of float
        Size of a pixel and place of the first one's centre, (y, x), in `units`.
    units : tuple of (str or None)
        Of the axes y and x.
    """

    levels: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    units: tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Everything that is known of a mask before it is computed.

    Parameters
    ----------
    height, width : int
        Pixels at full resolution, at least 1.
    classes : tuple of ClassInfo
        Values the mask may hold, beside 255.
    georeference : Georeference
        Of this grid, not of the source's.
    chunk : int
        Chunk side in pixels, at every level.
    channels : tuple of str
        Names of the probability planes; empty for a mask without probabilities.
    zarr_format : {2, 3}
        Storage format.
    title : str
        Shown by viewers.
    label : LabelOf or None
        The image that has this mask as a label; None for a mask of its own.
    """

    height: int
    width: int
    classes: tuple[ClassInfo, ...]
    georeference: Georeference
    chunk: int
    channels: tuple[str, ...] = ()
    zarr_format: ZarrFormat = 3
    title: str = "mask"
    label: LabelOf | None = None

    @property
    def levels(self) -> list[Level]:
        """(array path, factor, height, width) of each level, until one chunk holds it all.

        A label has as many as its image, and all in one group, as OME's readers know them.
        """
        inner = "/mask" if self.label is None else ""
        path, factor, height, width = "mask", 1, self.height, self.width
        levels = [(path, factor, height, width)]
        while (
            max(height, width) > self.chunk
            if self.label is None
            else len(levels) < self.label.levels
        ):
            factor, height, width = factor * 2, (height + 1) // 2, (width + 1) // 2
            levels.append((f"ovr_{factor}x{inner}", factor, height, width))
        return levels

    def stated_fill(self, layout: ArrayLayout) -> int | None:
        """Return what the metadata say that a chunk is which is not stored; None if nothing.

        xarray reads a fill value of format 2 as NaN: right for 255, not for a probability of 0.
        Where none is stated, every chunk is stored: the specification leaves others undefined.
        """
        return None if self.zarr_format == 2 and layout.path == "prob" else layout.fill

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """The pixel arrays by path: every level of the mask, and `prob` if there are channels."""
        # Never larger than level 0, so that a tiny raster does not pay for a whole chunk.
        chunks = (min(self.chunk, self.height), min(self.chunk, self.width))
        layouts = {
            path: ArrayLayout(path, (height, width), chunks, NODATA)
            for path, _, height, width in self.levels
        }
        if self.channels:
            shape = (len(self.channels), self.height, self.width)
            layouts["prob"] = ArrayLayout("prob", shape, (1, *chunks), 0)
        return layouts

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskSpec:
        """Return the spec that `as_dict` wrote, after a round trip through JSON.

        Raises
        ------
        TypeError, ValueError
            If a value is missing or of another kind.
        """
        spec = _adapter().validate_python(dict(values))
        if min(spec.height, spec.width, spec.chunk) < 1:
            raise ValueError("height, width and chunk are at least 1")
        return spec


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[MaskSpec]:
    return TypeAdapter(MaskSpec)
