"""Where an array of a Zarr store lies: by GeoZarr's keys, CF's grid mapping or its coordinates."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import CRSError

from tilenet.errors import InputError
from tilenet.geometry import Affine6, Georeference
from tilenet.sources.decoding import open_array
from tilenet.sources.nodes import Keys, Node, read_node

__all__ = ["Placed", "check_no_scaling", "metres_of", "micrometres", "nodata_of", "place"]

_MICROMETRES = {
    "meter": 1e6, "metre": 1e6, "m": 1e6, "decimeter": 1e5, "centimeter": 1e4, "cm": 1e4,
    "millimeter": 1e3, "mm": 1e3, "micrometer": 1.0, "micrometre": 1.0, "micron": 1.0, "um": 1.0,
    "µm": 1.0, "nanometer": 1e-3, "nm": 1e-3, "angstrom": 1e-4, "picometer": 1e-6,
    "inch": 25_400.0, "foot": 304_800.0,
}  # fmt: skip
_SMALL = {"micrometer", "micrometre", "micron", "um", "µm", "nanometer", "nm"}
"""Units in which no map is measured."""

_MAX_TEXT = 1 << 20
_MAX_COORDINATES = 1 << 22
_SPACING = 1e-3  # of a pixel, by which coordinates may be off


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a picture lies.

    Parameters
    ----------
    georeference : Georeference
        Of the full resolution.
    notes : tuple of str
        What of it is not kept.
    """

    georeference: Georeference
    notes: tuple[str, ...] = ()


def micrometres(unit: object) -> float | None:
    """Return micrometres of a unit of length, None for what is none."""
    return _MICROMETRES.get(unit) if isinstance(unit, str) else None


def metres_of(georeference: Georeference) -> float | None:
    """Return metres per unit of a projected CRS, None for another."""
    if georeference.crs_wkt is None:
        return None
    crs = CRS.from_wkt(georeference.crs_wkt)
    return float(crs.linear_units_factor[1]) if crs.is_projected else None


def place(
    keys: Keys, group: str, array: Node, sides: tuple[int, int], *, coordinates: bool
) -> Placed:
    """Return where an array lies.

    Parameters
    ----------
    keys : Keys
        The store.
    group : str
        Path of the group it is in.
    array : Node
        The full resolution.
    sides : tuple of int
        Which axes are y and x.
    coordinates : bool
        Whether coordinate arrays place it if nothing else does.

    Raises
    ------
    InputError
        What it says of its place cannot be read.
    """
    around = read_node(keys, group) if array.path else None
    said = [array.attributes, *([around.attributes] if around is not None else [])]
    mapping = _grid_mapping(keys, group, array) if around is not None else {}
    crs = _first(_crs(one, keys.name) for one in (*said, mapping))
    transform = _first([*(_affine(one, keys.name) for one in said),
                        _geotransform(mapping, keys.name)])  # fmt: skip
    mpp, notes = None, list[str]()
    if around is not None and transform is None and (coordinates or crs is not None):
        found = _by_coordinates(keys, group, array, sides)
        if isinstance(found, str):
            notes.append(f"{keys.name}: {found}: its place is not kept")
            crs = None
        elif found is not None:
            transform, mpp = found
    if crs is None and "grid_mapping_name" in mapping:
        notes.append(f"{keys.name}: its projection is given by parameters only, and not kept")
    return Placed(Georeference(crs_wkt=crs, transform=transform, mpp=mpp), tuple(notes))


def _first[T](values: Any) -> T | None:
    return next((value for value in values if value is not None), None)


def _grid_mapping(keys: Keys, group: str, array: Node) -> Mapping[str, Any]:
    """Return the attributes of CF's grid mapping variable."""
    name = array.attributes.get("grid_mapping", "spatial_ref")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        return {}
    found = read_node(keys, f"{group}/{name}" if group else name)
    return {} if found is None else found.attributes


def _crs(said: Mapping[str, Any], store: str) -> str | None:
    """Return the CRS that attributes tell, as WKT."""
    gdal = said.get("_CRS")
    gdal = gdal if isinstance(gdal, dict) else {}
    texts = [said.get("proj:wkt2"), said.get("crs_wkt"), said.get("spatial_ref"), gdal.get("wkt")]
    code, number = said.get("proj:code", said.get("crs")), said.get("proj:epsg")
    json_crs = said.get("proj:projjson", gdal.get("projjson"))
    try:
        with rasterio.Env():  # else GDAL writes its complaints on stderr
            return _parsed(texts, code, number, json_crs)
    except (CRSError, ValueError) as error:
        raise InputError(
            f"its CRS cannot be read: {error}", store, "correct it in the metadata"
        ) from error


def _parsed(texts: list[Any], code: Any, number: Any, json_crs: Any) -> str | None:
    """Return the first of several forms of a CRS, as WKT."""
    for text in texts:
        if isinstance(text, str) and text and len(text) <= _MAX_TEXT:
            return _wkt(CRS.from_wkt(text))
    if isinstance(code, str) and (match := re.fullmatch(r"([A-Za-z]{2,10}):(\w{1,20})", code)):
        return _wkt(CRS.from_authority(match[1], match[2]))
    if type(number) is int:
        return _wkt(CRS.from_epsg(number))
    if isinstance(json_crs, dict):
        text = json.dumps(json_crs)
        return _wkt(CRS.from_string(text)) if len(text) <= _MAX_TEXT else None
    return None


def _wkt(crs: CRS) -> str:
    return str(crs.to_wkt(version="WKT2_2019"))


def _numbers(values: Any, store: str) -> Affine6:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError("its place is no six numbers", store, "correct the metadata") from error
    if len(found) != 6 or not all(map(math.isfinite, found)):
        raise InputError("its place is no six numbers", store, "correct the metadata")
    return found


def _affine(said: Mapping[str, Any], store: str) -> Affine6 | None:
    """Return GeoZarr's affine."""
    if "spatial:transform" not in said:
        return None
    a, b, c, d, e, f = _numbers(said["spatial:transform"], store)
    if said.get("spatial:registration") == "node":  # of pixel centres
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return a, b, c, d, e, f


def _geotransform(said: Mapping[str, Any], store: str) -> Affine6 | None:
    """Return GDAL's affine, which begins with the corner."""
    text = said.get("GeoTransform")
    if text is None:
        return None
    c, a, b, f, d, e = _numbers(text.split() if isinstance(text, str) else text, store)
    return a, b, c, d, e, f


def _by_coordinates(
    keys: Keys, group: str, array: Node, sides: tuple[int, int]
) -> tuple[Affine6 | None, tuple[float, float] | None] | str | None:
    """Return the affine or the micrometres per pixel that coordinates give, or what is wrong."""
    if not array.dimensions:
        return None
    spaced, units = [], []
    for axis in sides:
        name, size = array.dimensions[axis], array.shape[axis]
        node = read_node(keys, f"{group}/{name}" if group else name)
        if node is None or not node.is_array:
            return None
        node.check(keys.name, pixels=False)
        if node.shape != (size,):
            return None
        if size > _MAX_COORDINATES:
            return f"it has {size} coordinates {name}, more than are read"
        found = _spaced(np.asarray(open_array(keys, node)[:], np.float64))
        if found is None:
            return f"its coordinates {name} are not evenly spaced"
        spaced.append(found)
        units.append(node.attributes.get("units"))
    (f, e), (c, a) = spaced
    factors = [micrometres(unit) for unit in units]
    if units[0] in _SMALL and units[1] in _SMALL and factors[0] and factors[1]:
        return None, (abs(e) * factors[0], abs(a) * factors[1])
    return (a, 0.0, c, 0.0, e, f), None


def _spaced(centres: Any) -> tuple[float, float] | None:
    """Return the outer border and the step of even pixel centres, None if they are not even."""
    if len(centres) < 2 or not np.isfinite(centres).all():
        return None
    step = (centres[-1] - centres[0]) / (len(centres) - 1)
    even = centres[0] + step * np.arange(len(centres))
    if step == 0 or np.abs(centres - even).max() > _SPACING * abs(step):
        return None
    # Decimal fractions have lost their last digits on the way.
    step = float(f"{step:.12g}")
    return float(f"{centres[0] - step / 2:.14g}"), step


def nodata_of(array: Node, store: str) -> float | None:
    """Return the value that marks what is no data; None if there is none.

    That is CF's `_FillValue`, `missing_value` or `nodata`. xarray keeps CF's in format 2 as the
    array's own fill value; where axes are named by xarray, that is it.
    """
    names = ("_FillValue", "missing_value", "nodata")
    value = next((array.attributes[n] for n in names if array.attributes.get(n) is not None), None)
    if value is None and array.zarr_format == 2 and "_ARRAY_DIMENSIONS" in array.attributes:
        value = array.document.get("fill_value")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    try:
        return _number(value)
    except (TypeError, ValueError, struct.error) as error:
        raise InputError(
            f"its nodata value is {str(value)[:40]!r}", store, "correct it in the metadata"
        ) from error


def _number(value: Any) -> float:
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        # How xarray writes a float in format 3.
        return float(struct.unpack("<d", base64.b64decode(value, validate=True))[0])
    if isinstance(value, bool):
        raise TypeError("is no number")
    return float(value)


def check_no_scaling(array: Node, store: str) -> None:
    """Raise InputError if CF says that values are not what is stored."""
    for name, nothing in (("scale_factor", 1), ("add_offset", 0)):
        if array.attributes.get(name, nothing) != nothing:
            raise InputError(
                f"its values are packed ({name} {array.attributes[name]})", store,
                "unpack it first; the network would see what is stored",
            )  # fmt: skip
