"""A pixel grid on a map, of another raster than the one that is read."""

from __future__ import annotations

from dataclasses import dataclass

from tilenet.geometry import Affine6

__all__ = ["Grid"]


@dataclass(frozen=True, slots=True)
class Grid:
    """A pixel grid on a map.

    Parameters
    ----------
    crs_wkt : str
        Coordinate reference system as WKT.
    transform : tuple of 6 float
        As in `Georeference`.
    height, width : int
        In pixels.
    """

    crs_wkt: str
    transform: Affine6
    height: int
    width: int
