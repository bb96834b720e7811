"""Which programs open which form of a mask, and what they miss of it.

Facts, not guesses: `tests/readers.toml` has the same table, and `tests/test_readers.py` asks every
reader that a machine has for the class at given coordinates, each "no" included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tilenet.geometry import Georeference

__all__ = ["FACTS", "MISSES", "READERS", "Misses", "readers_of"]

Misses = Mapping[str, tuple[str, ...]]
"""What each reader misses of a mask; nothing, if it opens and shows everything."""

MISSES = ("opening", "classes", "class ids", "CRS", "place", "pixel size")
"""What a reader can miss: to open it at all; the class at a pixel; its id (it shows colours); the
CRS; where on the map a pixel lies; how many µm it measures."""

_GENERAL = ("xarray", "rioxarray", "rasterio", "zarr")
_SYSTEM = ("GDAL 3.6", "QGIS 3.22")
_OME = ("napari", "ome-zarr", "ome-zarr-models")
_TIFF = ("rioxarray", "rasterio", *_SYSTEM, "tifffile", "rio-cogeo")
READERS = (*_GENERAL, *_SYSTEM, *_OME, "zarr-cm", "OpenSlide", "tifffile", "rio-cogeo", "Pillow")
"""Names of all readers; rasterio is its wheel with GDAL 3.12, the others are as `constraints.txt`
has them, GDAL 3.6 and QGIS 3.22 as Debian 12 has them."""


def _each(readers: tuple[str, ...], *misses: str) -> Misses:
    return dict.fromkeys(readers, misses)


_ZARR2_MAP = {**_each((*_GENERAL, *_SYSTEM)), **_each((*_OME, "zarr-cm"), "CRS", "place")}
_ZARR3_MAP = {**_each((*_GENERAL, "zarr-cm")), **_each(_OME, "CRS", "place")}
_PICTURE = {"OpenSlide": ("class ids", "CRS", "place"), "Pillow": ("CRS", "place")}
_TURNED = _each(("xarray", "rasterio", "zarr"), "place")

FACTS: Mapping[str, Misses] = {
    "zarr2-slide": {**_each((*_GENERAL, *_SYSTEM, *_OME)), "zarr-cm": ("pixel size",)},
    "zarr2-map": _ZARR2_MAP,
    "zarr2-south-up": _ZARR2_MAP,
    "zarr2-rotated": {**_ZARR2_MAP, **_TURNED, **_each(_SYSTEM, "place")},
    "zarr3-slide": {**_each((*_GENERAL, *_OME)), "zarr-cm": ("pixel size",)},
    "zarr3-map": _ZARR3_MAP,
    "zarr3-south-up": _ZARR3_MAP,
    "zarr3-rotated": {**_ZARR3_MAP, **_TURNED},
    "cog-slide": {
        **_each((*_TIFF, "Pillow")), "QGIS 3.22": ("pixel size",), "OpenSlide": ("class ids",)
    },
    "cog-map": {**_each(_TIFF), **_PICTURE},
    "cog-south-up": {**_each(_TIFF), **_PICTURE},
    "cog-rotated": {**_each(_TIFF), **_PICTURE, "rio-cogeo": ("place",)},
    "ometiff-slide": {
        **_each(("rioxarray", "rasterio", *_SYSTEM, "OpenSlide", "tifffile", "Pillow")),
        "QGIS 3.22": ("pixel size",),
    },
    "png": _each(("rioxarray", "rasterio", *_SYSTEM, "Pillow")),
}  # fmt: skip
"""What readers miss by form and reader; a reader that is not named does not open it."""


def readers_of(
    form: Literal["zarr2", "zarr3", "cog", "ometiff", "png"],
    place: Georeference,
    *,
    label: bool = False,
) -> Misses | None:
    """Return what every reader misses of a mask; None if that was never measured.

    Parameters
    ----------
    form : str
        How it is stored.
    place : Georeference
        Of its grid; what it does not have, no reader misses.
    label : bool
        It is a label of an image, all levels in one group: xarray does not open that.
    """
    name = form if form == "png" else f"{form}-{_kind(place)}"
    if name not in FACTS:
        return None
    known = FACTS[name]
    found = {reader: known.get(reader, ("opening",)) for reader in READERS}
    if label:
        found["xarray"] = ("opening",)
    if place.mpp is None or place.is_georeferenced:
        found = {r: tuple(m for m in misses if m != "pixel size") for r, misses in found.items()}
    return found


def _kind(place: Georeference) -> str:
    if place.transform is None:
        return "slide"  # or a plain picture, or one with control points: the same arrays
    if place.is_rotated:
        return "rotated"
    return "south-up" if place.transform[4] > 0 else "map"
