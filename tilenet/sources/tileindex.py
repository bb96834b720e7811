"""Tile indexes (GDAL's GTI): footprints that name the scenes of a mosaic. No pixels.

By pyogrio (extra `vector`); GDAL's documentation of the driver GTI says what they hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tilenet.errors import InputError, UsageError
from tilenet.sources.ogr import ogr
from tilenet.sources.remote import is_remote

__all__ = ["is_index", "scenes_of"]

_ENDINGS = (".gti", ".gti.gpkg", ".gti.fgb", ".gti.parquet", ".gti.geojson")
_KNOWN = {"IndexDataset", "IndexLayer", "LocationField", "SortField", "SortFieldAsc"}
_MOST = 1 << 20  # bytes of an index in XML
_FOLLOWED = {
    "LOCATION_FIELD": "LocationField", "SORT_FIELD": "SortField", "SORT_FIELD_ASC": "SortFieldAsc",
    "TILE_INDEX_LAYER": "IndexLayer",
}  # fmt: skip
"""Metadata of a table, and what an index in XML calls them."""
_OTHER = re.compile(
    r"RES[XY]|(MIN|MAX)[XY]|SRS(_BEHAVIOR)?|BAND_.*|DATA_TYPE|NODATA|COLOR_INTERPRETATION|"
    r"MASK_BAND|FILTER|RESAMPLING|TILE_INDEX_SQL(_DIALECT)?"
)
"""What else GDAL heeds there, overviews apart."""


def is_index(name: str) -> bool:
    """Return whether a file is called as tile indexes are."""
    return name.lower().endswith(_ENDINGS)


def _in_metadata(name: str, pyogrio: Any) -> dict[str, str]:
    """Return what the metadata of a table say, by the names that an index in XML has for it."""
    try:
        info = pyogrio.read_info(name)
        layer = (info.get("dataset_metadata") or {}).get("TILE_INDEX_LAYER")
        if layer is not None:
            info = pyogrio.read_info(name, layer=layer)
    except Exception as error:  # GDAL's classes, by way of pyogrio's
        raise InputError(f"not a tile index: {error}", name, "check the file") from error
    said = (info.get("dataset_metadata") or {}) | (info.get("layer_metadata") or {})
    _refuse([key for key in said if _FOLLOWED.get(key) is None and _OTHER.fullmatch(key)], name)
    return {_FOLLOWED[key]: str(value) for key, value in said.items() if key in _FOLLOWED}


def _refuse(keys: list[str], name: str) -> None:
    if keys:
        raise InputError(
            f"sets {', '.join(sorted(keys))}, which is not followed", name,
            "leave it out, or make a VRT: gdalbuildvrt",
        )  # fmt: skip


def _described(name: str, pyogrio: Any) -> dict[str, str]:
    """Return what an index says of itself, and where its table is."""
    path = Path(name)
    if not name.lower().endswith(".gti"):
        return _in_metadata(name, pyogrio) | {"IndexDataset": name}
    if path.stat().st_size > _MOST:
        raise InputError("too large for a tile index in XML", name)
    try:
        root = ElementTree.fromstring(path.read_bytes())  # noqa: S314 - small; Expat stops bombs
    except ElementTree.ParseError as error:
        raise InputError(f"no XML: {error}", name, "give a tile index") from error
    found = {one.tag: (one.text or "").strip() for one in root}
    if root.tag != "GDALTileIndexDataset" or "IndexDataset" not in found:
        raise InputError("not a tile index", name, "make one: gdaltindex -gti_filename")
    _refuse(list(set(found) - _KNOWN), name)
    found["IndexDataset"] = str(path.parent / found["IndexDataset"])
    return found


def _rank(value: Any) -> tuple[bool, Any]:
    """Return what to sort a field's value by; those that are not there come first, as in SQL."""
    missing = value is None or value != value
    return not missing, 0 if missing else value


def scenes_of(name: str) -> tuple[str, ...]:
    """Return the rasters that a tile index names, the one on top first.

    Raises
    ------
    InputError
        It is none, or asks for what is not done here.
    UsageError
        The extra is not installed.
    """
    try:
        pyogrio = ogr()
    except ImportError as error:
        raise UsageError(
            "tile indexes need the extra vector", name, "pip install 'tilenet[vector]'"
        ) from error
    said = _described(name, pyogrio)
    field, sort = said.get("LocationField", "location"), said.get("SortField")
    columns = [field] if sort is None else [field, sort]
    try:
        meta, _, _, values = pyogrio.raw.read(
            said["IndexDataset"], layer=said.get("IndexLayer"), columns=columns, read_geometry=False
        )
    except Exception as error:  # GDAL's classes, by way of pyogrio's
        raise InputError(f"not a tile index: {error}", name, "check the file") from error
    table = dict(zip(meta["fields"], values, strict=True))
    if set(table) < set(columns):
        raise InputError(f"has no field {' or '.join(columns)}", name, "gdaltindex writes location")
    order = list(range(len(table[field])))
    if sort is not None:
        down = said.get("SortFieldAsc", "true").lower() in ("false", "no", "0")
        order.sort(key=lambda row: _rank(table[sort][row]), reverse=down)
    places = [str(table[field][row]) for row in reversed(order)]  # later ones lie on top
    if not places:
        raise InputError("names no raster", name, "check the file")
    folder = Path(said["IndexDataset"]).parent
    return tuple(p if is_remote(p) else str((folder / p).absolute()) for p in places)
