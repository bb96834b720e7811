"""Pixel rectangles and where they lie on the ground. Pure arithmetic: no files, no arrays read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Georeference", "Window", "reflect"]

Affine6 = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """An integer pixel rectangle at one level, rows first.

    Parameters
    ----------
    row, col : int
        First row and column.
    height, width : int
        Size in pixels; an empty window has a zero.
    """

    row: int
    col: int
    height: int
    width: int

    @property
    def row_stop(self) -> int:
        """First row below the window."""
        return self.row + self.height

    @property
    def col_stop(self) -> int:
        """First column right of the window."""
        return self.col + self.width

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @classmethod
    def from_bounds(cls, row: int, col: int, row_stop: int, col_stop: int) -> Window:
        """Return the window between two corners; empty where they cross."""
        return cls(row, col, max(0, row_stop - row), max(0, col_stop - col))

    def intersection(self, other: Window) -> Window:
        """Return the common part, possibly empty."""
        return Window.from_bounds(
            max(self.row, other.row),
            max(self.col, other.col),
            min(self.row_stop, other.row_stop),
            min(self.col_stop, other.col_stop),
        )

    def halves(self) -> tuple[Window, Window]:
        """Return its two halves along the longer side."""
        if self.height >= self.width:
            cut = self.height // 2
            return (
                Window(self.row, self.col, cut, self.width),
                Window(self.row + cut, self.col, self.height - cut, self.width),
            )
        cut = self.width // 2
        return (
            Window(self.row, self.col, self.height, cut),
            Window(self.row, self.col + cut, self.height, self.width - cut),
        )

    def slices(self, row: int = 0, col: int = 0) -> tuple[slice, slice]:
        """Return slices into an array whose first pixel is (`row`, `col`)."""
        return (
            slice(self.row - row, self.row_stop - row),
            slice(self.col - col, self.col_stop - col),
        )


@dataclass(frozen=True, slots=True)
class Georeference:
    """Where a pixel grid lies: copied from the source exactly, nothing invented.

    Parameters
    ----------
    crs_wkt : str or None
        Coordinate reference system as WKT; None if the source has none.
    transform : tuple of 6 float or None
        Affine (a, b, c, d, e, f): x = a·col + b·row + c, y = d·col + e·row + f, in CRS units, of
        pixel corners; None if the source has none.
    gcps : tuple
        Ground control points (row, col, x, y, z) in pixels and units of `gcp_crs_wkt`.
    gcp_crs_wkt : str or None
        CRS of the control points.
    rpcs : tuple of (str, str)
        Rational polynomial coefficients as GDAL's metadata items.
    mpp : tuple of float or None
        Micrometres per pixel (y, x).
    """

    crs_wkt: str | None = None
    transform: Affine6 | None = None
    gcps: tuple[tuple[float, float, float, float, float], ...] = ()
    gcp_crs_wkt: str | None = None
    rpcs: tuple[tuple[str, str], ...] = ()
    mpp: tuple[float, float] | None = None

    @property
    def is_georeferenced(self) -> bool:
        """Whether the grid has a place on a map."""
        return self.crs_wkt is not None or self.transform is not None or bool(self.gcps)

    @property
    def is_rotated(self) -> bool:
        """Whether rows and columns are not parallel to the CRS axes."""
        return self.transform is not None and (self.transform[1] != 0 or self.transform[3] != 0)

    @property
    def ground_resolution(self) -> tuple[float, float] | None:
        """CRS units per pixel (y, x); None without an affine."""
        if self.transform is None:
            return None
        a, b, _, d, e, _ = self.transform
        return math.hypot(b, e), math.hypot(a, d)

    def at_mpp(self, mpp: float) -> Georeference:
        """Return the same place with other micrometres per pixel."""
        return replace(self, mpp=(mpp, mpp))

    def scaled(self, factor_y: float, factor_x: float) -> Georeference:
        """Return the reference of a grid whose pixels are `factor` times as large, same corner."""
        transform = None
        if self.transform is not None:
            a, b, c, d, e, f = self.transform
            transform = (a * factor_x, b * factor_y, c, d * factor_x, e * factor_y, f)
        gcps = tuple((r / factor_y, c / factor_x, x, y, z) for r, c, x, y, z in self.gcps)
        mpp = None if self.mpp is None else (self.mpp[0] * factor_y, self.mpp[1] * factor_x)
        # RPCs are tied to full-resolution line and sample offsets, so a scaled grid drops them.
        rpcs = self.rpcs if factor_y == factor_x == 1 else ()
        return replace(self, transform=transform, gcps=gcps, mpp=mpp, rpcs=rpcs)


def reflect(start: int, stop: int, size: int) -> NDArray[np.intp]:
    """Return the source index of every position in [start, stop), reflected at the borders.

    The border pixel itself is not repeated (numpy's ``reflect``); the reflection goes on for as
    long as needed, so a single pixel is repeated for ever.

    Parameters
    ----------
    start, stop : int
        Range of positions, which may lie beyond the axis.
    size : int
        Pixels on the axis, at least 1.
    """
    positions = np.arange(start, stop)
    if size == 1:
        return np.zeros_like(positions)
    period = 2 * size - 2
    folded = np.abs(positions) % period
    return np.where(folded < size, folded, period - folded)
