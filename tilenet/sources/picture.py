"""Which arrays of a Zarr store are the picture: OME-Zarr, GeoZarr, or one variable among others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilenet.errors import InputError
from tilenet.geometry import Georeference
from tilenet.sources.nodes import Folder, Keys, Node, child_nodes, inner_path, read_node
from tilenet.sources.placing import check_no_scaling, micrometres, nodata_of, place
from tilenet.sources.stack import BAND_AXES

__all__ = ["Picture", "find_picture", "is_mask_store"]

_Y = {"y", "lat", "latitude", "northing", "row", "rows", "projection_y_coordinate"}
_X = {"x", "lon", "longitude", "easting", "col", "cols", "column", "projection_x_coordinate"}
_BAND = {"c", "channel", "channels", "band", "bands", "wavelength", "spectral"}
_MOST_BANDS_UNNAMED = 16
_MAX_LEVELS, _MAX_LISTED = 64, 20


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a store.

    Parameters
    ----------
    levels : tuple of Node
        Its arrays, the full resolution first.
    axes : str
        A lower-case letter for each axis.
    georeference : Georeference
        Of the full resolution.
    names : tuple of str
        Of its channels, if they have any.
    nodata : float or None
        What marks no data.
    notes : tuple of str
        What the user should know.
    """

    levels: tuple[Node, ...]
    axes: str
    georeference: Georeference
    names: tuple[str, ...] = ()
    nodata: float | None = None
    notes: tuple[str, ...] = ()


def is_mask_store(path: str | Path) -> bool:
    """Return whether a local store is a mask that tilenet made."""
    root = read_node(Folder(str(path)), "")
    return root is not None and "schema" in _mapping(root.attributes.get("tilenet"))


def find_picture(keys: Keys, variable: str | None) -> Picture:
    """Return the picture of a store.

    Parameters
    ----------
    keys : Keys
        The store.
    variable : str, optional
        Path of the array or group, if it is to be a certain one.

    Raises
    ------
    InputError
        There is none, it is none that is read, or there are several.
    """
    path = "" if variable is None else inner_path("", variable, keys.name)
    node = read_node(keys, path)
    if node is None:
        what = "no Zarr store" if variable is None else f"no variable {variable}"
        raise InputError(what, keys.name, "check the path")
    if node.is_array:
        return _one_array(keys, node)
    ome = _mapping(node.attributes.get("ome")) or node.attributes
    scales = ome.get("multiscales")
    if isinstance(scales, list) and scales:
        return _ome(keys, node, ome, scales)
    for key in ("plate", "well", "bioformats2raw.layout"):
        if key in ome:
            raise InputError(
                f"a collection of images (its metadata have {key!r})", keys.name,
                "name one of them, as in STORE/0",
            )  # fmt: skip
    layout = _mapping(node.attributes.get("multiscales")).get("layout")
    if isinstance(layout, list) and layout:
        return _geozarr(keys, node, layout)
    return _one_array(keys, _only_variable(keys, node))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _axes_by_name(node: Node, where: str) -> str:
    """Return a letter for each axis by its name."""
    letters = ""
    for name in node.dimensions:
        low = name.lower()
        letter = "y" if low in _Y else "x" if low in _X else "c" if low in _BAND else low[0]
        if letter in letters or (letter in BAND_AXES + "yx" and low not in _Y | _X | _BAND):
            raise InputError(
                f"its axes are {', '.join(node.dimensions)}", where,
                "name them so that their first letters differ",
            )  # fmt: skip
        letters += letter
    return letters


def _axes(node: Node, where: str) -> tuple[str, tuple[str, ...]]:
    """Return a letter for each axis, and what to say of it."""
    if node.dimensions:
        letters = _axes_by_name(node, where)
        if "y" not in letters or "x" not in letters:
            names = ", ".join(node.dimensions)
            raise InputError(f"its axes are {names}, no picture", where, "name another variable")
        return letters, ()
    shape = node.shape
    if len(shape) == 2:
        return "yx", ()
    if len(shape) == 3 and min(shape[0], shape[2]) <= _MOST_BANDS_UNNAMED < max(shape[0], shape[2]):
        letters = "cyx" if shape[0] <= shape[2] else "yxc"
        taken = "first" if letters == "cyx" else "last"
        return letters, (f"{where}: its axes have no names: the {taken} is taken for the bands",)
    sides = "×".join(map(str, shape))
    raise InputError(
        f"{sides} values whose axes have no names", where,
        "name them: dimension_names, or _ARRAY_DIMENSIONS in format 2",
    )  # fmt: skip


def _one_array(keys: Keys, node: Node) -> Picture:
    """Return the picture of an array that stands for itself."""
    where = f"{keys.name} ({node.path})" if node.path else keys.name
    node.check(keys.name, pixels=True)
    check_no_scaling(node, where)
    axes, notes = _axes(node, where)
    sides = (axes.index("y"), axes.index("x"))
    placed = place(keys, _parent(node.path), node, sides, coordinates=True)
    names = node.attributes.get("long_name")
    return Picture(
        levels=(node,),
        axes=axes,
        georeference=placed.georeference,
        names=tuple(map(str, names)) if isinstance(names, list) else (),
        nodata=nodata_of(node, where),
        notes=notes + placed.notes,
    )


def _only_variable(keys: Keys, group: Node) -> Node:
    """Return the one array of a group that is a picture."""
    nodes = child_nodes(keys, group.path)
    arrays = [node for node in nodes if node.is_array]
    named = any(node.dimensions for node in arrays)
    beside = set[str]()
    for node in arrays:
        said = (node.attributes.get(key, "") for key in ("coordinates", "grid_mapping", "bounds"))
        beside |= {name for text in said if isinstance(text, str) for name in text.split()}
    found = [
        node for node in arrays
        if node.path.rpartition("/")[2] not in beside | _X | _Y and _may_be(node, named=named)
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    names = [node.path for node in found or nodes if found or not node.is_array]
    more = " …" if len(names) > _MAX_LISTED else ""
    listed = ", ".join(names[:_MAX_LISTED]) + more
    if found:
        raise InputError(
            f"{len(names)} variables ({listed})", keys.name, "choose one with --variable NAME"
        )
    what = f"no picture in it, but groups ({listed})" if names else "no picture in it"
    raise InputError(what, keys.name, "name the variable, as in --variable GROUP/NAME")


def _may_be(node: Node, *, named: bool) -> bool:
    """Return whether an array has the axes of a picture."""
    if not named:
        shape = node.document.get("shape")
        return isinstance(shape, list) and len(shape) in (2, 3)
    names = {name.lower() for name in node.dimensions}
    return bool(names & _Y) and bool(names & _X)


def _levels(keys: Keys, paths: list[str], axes: str | None) -> list[Node]:
    """Return the arrays of levels that show the same picture, the full resolution first."""
    levels = list[Node]()
    for path in paths[:_MAX_LEVELS]:
        node = read_node(keys, path)
        if node is None or not node.is_array:
            if levels:
                break
            raise InputError(f"no array {path}", keys.name, "check the store")
        node.check(keys.name, pixels=True)
        if levels and not _same_picture(levels[0], levels[-1], node, axes or ""):
            break
        levels.append(node)
    return levels


def _same_picture(full: Node, last: Node, node: Node, axes: str) -> bool:
    """Return whether an array is a coarser level of another: its proportions tell."""
    if len(node.shape) != len(full.shape) or node.dtype != full.dtype:
        return False
    axes = axes or _axes(full, full.path)[0]
    y, x = axes.index("y"), axes.index("x")
    others = all(
        one == two for k, (one, two) in enumerate(zip(full.shape, node.shape, strict=True))
        if k not in (y, x)
    )  # fmt: skip
    height, width = full.shape[y], full.shape[x]
    same = abs(node.shape[y] * width - node.shape[x] * height) <= max(height, width)
    return others and same and 0 < node.shape[y] < last.shape[y] and node.shape[x] > 0


def _ome(keys: Keys, group: Node, ome: Mapping[str, Any], scales: list[Any]) -> Picture:
    """Return the first image of an OME-Zarr group."""
    scale = _mapping(scales[0])
    datasets = [_mapping(one) for one in scale.get("datasets") or () if _mapping(one)]
    paths = [inner_path(group.path, one.get("path"), keys.name) for one in datasets]
    if not paths:
        raise InputError("its multiscales have no datasets", keys.name, "check the store")
    said = scale.get("axes")
    axes = _ome_axes(said, keys.name) if said is not None else None
    levels = _levels(keys, paths, axes)
    full = levels[0]
    axes = axes or ("tczyx" if len(full.shape) == 5 else _axes(full, keys.name)[0])
    if len(axes) != len(full.shape):
        raise InputError(f"{len(full.shape)} axes, and names for {len(axes)}", keys.name)
    check_no_scaling(full, keys.name)
    sides = (axes.index("y"), axes.index("x"))
    placed = place(keys, _parent(full.path), full, sides, coordinates=False)
    georeference = placed.georeference
    if not georeference.is_georeferenced:
        georeference = replace(georeference, mpp=_mpp(scale, datasets[0], said, sides))
    notes = placed.notes
    if len(scales) > 1:
        notes += (f"{keys.name}: holds {len(scales)} images, and the first is read",)
    channels = _mapping(ome.get("omero")).get("channels")
    labels = [_mapping(one).get("label") or "" for one in channels or ()]
    names = tuple(map(str, labels)) if isinstance(channels, list) else ()
    # What is not stored is the fill value, and means nothing else in these.
    marked = any(key in full.attributes for key in ("_FillValue", "missing_value", "nodata"))
    nodata = nodata_of(full, keys.name) if marked else None
    return Picture(tuple(levels), axes, georeference, names, nodata, notes)


def _ome_axes(said: Any, where: str) -> str:
    letters = ""
    for one in said if isinstance(said, list) else ():
        name = one if isinstance(one, str) else _mapping(one).get("name")
        kind = _mapping(one).get("type")
        letter = {"channel": "c", "time": "t"}.get(str(kind), str(name).lower()[:1])
        letters += letter
    once = len(set(letters)) == len(letters)
    if "y" not in letters or "x" not in letters or "s" in letters or not once:
        raise InputError(f"its axes are {letters or said!r}, no picture", where, "check the store")
    return letters


def _mpp(
    scale: Mapping[str, Any], dataset: Mapping[str, Any], said: Any, sides: tuple[int, int]
) -> tuple[float, float] | None:
    """Return micrometres per pixel (y, x); None where the axes have no unit."""
    found = [1.0, 1.0]
    told = False
    for owner in (dataset, scale):
        for one in owner.get("coordinateTransformations") or ():
            factors = _mapping(one).get("scale")
            if not isinstance(factors, list) or len(factors) <= max(sides):
                continue
            told = True
            for k, axis in enumerate(sides):
                factor = factors[axis]
                found[k] *= factor if isinstance(factor, int | float) else 0
    for k, axis in enumerate(sides):
        unit = micrometres(_mapping(said[axis]).get("unit")) if isinstance(said, list) else None
        if unit is None:
            return None
        found[k] *= unit
    return (found[0], found[1]) if told and min(found) > 0 and max(found) < 1e12 else None


def _geozarr(keys: Keys, group: Node, layout: list[Any]) -> Picture:
    """Return the picture of a group whose levels GeoZarr's convention lists."""
    paths = [inner_path(group.path, _mapping(one).get("asset"), keys.name) for one in layout]
    first = read_node(keys, paths[0])
    if first is not None and not first.is_array:
        name = _only_variable(keys, first).path.removeprefix(f"{first.path}/")
        paths = [f"{path}/{name}" for path in paths]
    levels = _levels(keys, paths, None)
    picture = _one_array(keys, levels[0])
    if picture.georeference.is_georeferenced or not _parent(levels[0].path):
        return replace(picture, levels=tuple(levels))
    # What holds for all levels may be said at the top.
    sides = (picture.axes.index("y"), picture.axes.index("x"))
    placed = place(keys, group.path, replace(levels[0]), sides, coordinates=False)
    return replace(picture, levels=tuple(levels), georeference=placed.georeference)
