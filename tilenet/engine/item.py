"""The STAC item beside a finished mask, made of what the mask says of itself: no clock, no network.

STAC 1.1 with the extensions projection, classification, file, processing and raster, spelled out
here because the package that builds items is not needed to run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import rasterio
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.warp import transform_geom

from tilenet import durable
from tilenet.classes import NODATA
from tilenet.engine.document import probabilities_of, read_sidecar
from tilenet.engine.runfolder import outside
from tilenet.errors import InputError, OutputError
from tilenet.geometry import Georeference
from tilenet.quiet import ignoring
from tilenet.sinks import MaskSpec, crs_keys, documents
from tilenet.strangers import is_file, parse_json

__all__ = ["check_item", "has_item", "item_path", "write_item"]

_EXTENSIONS = "https://stac-extensions.github.io/{}/schema.json"
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_TYPES = {"cog": _COG, "ome-tiff": "image/tiff", "png": "image/png"}
_SHA256 = "1220"  # multihash: the function, and 32 bytes
_STEPS = 16  # points on each side of a footprint, whose sides are curves in degrees
# STAC wants two dates where there is none: all that its notation can say.
_EVER = {"start_datetime": "0001-01-01T00:00:00Z", "end_datetime": "9999-12-31T23:59:59Z"}

_HAIR = 1e-6  # degrees: what rounding lets a grid of the whole earth reach beyond 180

Document = dict[str, Any]
Point = tuple[float, float]


def item_path(out: Path) -> Path:
    """Return where the item of a mask lies: beside it, or beside the image whose label it is."""
    place = outside(out)
    return place.with_name(f"{place.name}.stac.json")


def has_item(out: Path) -> bool:
    """Return whether an item of ours lies beside a mask."""
    try:
        found = parse_json(item_path(out).read_bytes())
        return "tilenet" in found["properties"]["processing:software"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_item(out: Path) -> None:
    """Raise OutputError if a file that is not ours lies where a mask's item would."""
    path = item_path(out)
    if (path.exists() or path.is_symlink()) and not has_item(out):
        raise OutputError(
            "a file beside the mask exists and is not tilenet's", path, "move it away"
        )


def write_item(out: Path, *, allow_remote: bool = False) -> list[str]:
    """Write the STAC item of a finished mask, whole, and on disk when the call returns.

    The same mask has the same item, as long as its source is there to say when it was taken.

    Parameters
    ----------
    out : Path
        A mask of ours.
    allow_remote : bool
        Ask a source on another machine too.

    Returns
    -------
    list of str
        What the item cannot say, a line each.

    Raises
    ------
    OutputError
        There is an item that is not ours.
    InputError
        There is no mask of ours at `out`.
    """
    check_item(out)
    path = item_path(out)
    document = _document(out)
    spec = MaskSpec.from_dict(document["spec"])
    source = document["recipe"]["input"]
    taken, footprint = _taken(source, allow_remote=allow_remote), _footprint(spec)
    item = _item(out, document, spec, taken, footprint)
    data = json.dumps(item, indent=1, ensure_ascii=False).encode()
    if not path.exists() or path.read_bytes() != data:
        durable.write(path, data)
    notes = []
    if footprint is None:
        notes.append(f"{path.name} has no geometry: the mask has no place on a map")
    if taken is None:
        notes.append(f"{path.name} has no date: the source has no TIFFTAG_DATETIME")
    return notes


def _document(out: Path) -> Document:
    if out.is_dir():
        return dict(parse_json(documents(out)["plan"]))
    found = read_sidecar(out)
    if found is None:
        raise InputError("no mask of tilenet's", out, "name a mask")
    return found


def _taken(source: str, *, allow_remote: bool) -> str | None:
    """Return when a TIFF was taken, as its tag says; it names no time zone, and UTC is assumed."""
    if not (allow_remote or is_file(source)):  # a mask from a stranger must not make us ask afar
        return None
    try:
        with ignoring(NotGeoreferencedWarning), rasterio.open(source, driver="GTiff") as src:
            text = src.tags().get("TIFFTAG_DATETIME", "")
        found = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
    except Exception:  # GDAL's own kinds: no TIFF, gone, damaged, or no date
        return None
    return found.strftime("%Y-%m-%dT%H:%M:%SZ") if found.year > 1 else None


@dataclass(frozen=True, slots=True)
class _Footprint:
    """The outline of a grid in longitudes and latitudes."""

    geometry: Document
    bbox: list[float]


def _footprint(spec: MaskSpec) -> _Footprint | None:
    place = spec.georeference
    if place.transform is None or place.crs_wkt is None:
        return None
    a, b, c, d, e, f = place.transform
    steps = [step / _STEPS for step in range(_STEPS)]
    ring = [(0.0, s) for s in steps] + [(s, 1.0) for s in steps]  # counter-clockwise on most maps
    ring += [(1.0, 1 - s) for s in steps] + [(1 - s, 0.0) for s in steps] + [(0.0, 0.0)]
    corners = [
        (a * x * spec.width + b * y * spec.height + c, d * x * spec.width + e * y * spec.height + f)
        for x, y in ring
    ]
    outline = {"type": "Polygon", "coordinates": [corners]}
    try:
        moved = transform_geom(CRS.from_wkt(place.crs_wkt), "EPSG:4326", outline)
    except Exception:  # PROJ's own kinds: a place that has no longitude
        return None
    moved = _cut(moved)
    many = moved["type"] == "MultiPolygon"  # cut at the antimeridian
    parts = [
        [[(round(x, 9), round(y, 9)) for x, y, *_ in ring] for ring in part]
        for part in (moved["coordinates"] if many else [moved["coordinates"]])
    ]
    points = [point for part in parts for ring in part for point in ring]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        return None
    spans = [[x for ring in part for x, _ in ring] for part in parts]
    west, east = min(map(min, spans)), max(map(max, spans))
    if many and west == -180 and east == 180:
        west = min(min(span) for span in spans if max(span) == 180)
        east = max(max(span) for span in spans if min(span) == -180)
    south, north = min(y for _, y in points), max(y for _, y in points)
    geometry = {"type": moved["type"], "coordinates": parts if many else parts[0]}
    return _Footprint(geometry, [west, south, east, north])


def _cut(outline: Document) -> Document:
    """Return what goes on beyond 180 degrees, as a grid in degrees may, cut there.

    PROJ cuts what comes from another projection, but leaves degrees as they are.
    """
    if outline["type"] != "Polygon":
        return outline
    ring = [(x, y) for x, y, *_ in outline["coordinates"][0]]
    west, east = min(x for x, _ in ring), max(x for x, _ in ring)
    if not (math.isfinite(west) and math.isfinite(east)) or (west >= -180 and east <= 180):
        return outline
    if east - west > 360 - _HAIR:  # once around
        south, north = min(y for _, y in ring), max(y for _, y in ring)
        whole = [(-180, north), (-180, south), (180, south), (180, north), (-180, north)]
        return {"type": "Polygon", "coordinates": [whole]}
    parts = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        left = 360 * turn - 180
        if min(east, left + 360) - max(west, left) > _HAIR:
            part = _beside(_beside(ring, left, 1), left + 360, -1)
            parts.append([[(x - 360 * turn, y) for x, y in part]])
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _beside(ring: list[Point], at: float, side: int) -> list[Point]:
    """Return the part of a convex ring east (side 1) or west (−1) of a meridian."""
    kept = []
    for (x, y), (next_x, next_y) in pairwise(ring):
        stays, comes = ((one - at) * side >= 0 for one in (x, next_x))
        if stays:
            kept.append((x, y))
        if stays != comes:
            kept.append((at, y + (next_y - y) * (at - x) / (next_x - x)))
    return [*kept, *kept[:1]]


def _item(
    out: Path, document: Document, spec: MaskSpec, taken: str | None, footprint: _Footprint | None
) -> Document:
    grid = _grid(spec.georeference, spec)
    assets = _assets(out, document, spec)
    extensions = ["classification/v2.0.0", "processing/v1.2.0"]
    extensions += ["projection/v2.0.0"] if grid else []
    extensions += [] if out.is_dir() else ["file/v2.1.0"]
    extensions += ["raster/v2.0.0"] if "probabilities" in assets else []
    properties = {
        "title": f"{document['model']} of {document['input']}",
        "datetime": taken,
        **({} if taken is not None else _EVER),
        "processing:software": {"tilenet": document["tilenet"]},
        "processing:lineage": f"{document['input']} segmented by tilenet with {document['model']} "
        f"(sha256 {document['identity']['model']}); plan {document['plan_hash']}",
        **grid,
    }
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [_EXTENSIONS.format(name) for name in sorted(extensions)],
        "id": item_path(out).name.removesuffix(".stac.json"),
        "geometry": None if footprint is None else footprint.geometry,
        **({} if footprint is None else {"bbox": footprint.bbox}),
        "properties": properties,
        "links": [],
        "assets": assets,
    }


def _grid(place: Georeference, spec: MaskSpec) -> Document:
    """Return the keys of the projection extension; none for a grid without an affine."""
    if place.transform is None:
        return {}
    return {
        **({"proj:code": None} if place.crs_wkt is None else crs_keys(place.crs_wkt)),
        "proj:shape": [spec.height, spec.width],
        "proj:transform": [float(value) for value in place.transform],
    }


def _href(out: Path, target: Path) -> str:
    """Return what an item calls a file of its mask."""
    folder = item_path(out).parent
    # A label lies deeper than its item, in an image that may have been named by a link.
    whole = target if target.parent == folder else target.parent.resolve() / target.name
    return f"./{quote(whole.relative_to(folder).as_posix())}"


def _assets(out: Path, document: Document, spec: MaskSpec) -> Document:
    kind = document["identity"]["format"]
    zarr = f"application/vnd.zarr; version={spec.zarr_format}"
    mask = {
        "href": _href(out, out),
        "type": zarr if kind == "zarr" else _TYPES[kind],
        "title": "classes",
        "roles": ["data"],
        "data_type": "uint8",
        "nodata": NODATA,
        "classification:classes": _classes(spec, document["pixels"]),
        **_file(document),
    }
    assets: Document = {"mask": mask}
    if "probabilities" in document:
        assets["probabilities"] = {
            "href": _href(out, probabilities_of(out)),
            "type": _COG,
            "title": "probabilities",
            "roles": ["data"],
            "bands": [
                {"name": name, "data_type": "uint8", "raster:scale": 1 / 255}
                for name in spec.channels
            ],
            **_file(document["probabilities"]),
        }
    return assets


def _classes(spec: MaskSpec, pixels: Mapping[str, int]) -> list[Document]:
    classes: list[Document] = [
        {
            "value": c.id,
            "name": re.sub(r"[^0-9A-Za-z_-]+", "_", c.name) or f"class_{c.id}",
            "title": c.name,
            "color_hint": "{:02X}{:02X}{:02X}".format(*c.color),
            "count": pixels.get(str(c.id), 0),
        }
        for c in spec.classes
    ]
    none = {"value": NODATA, "name": "no_answer", "nodata": True}
    return [*classes, none | {"count": pixels.get(str(NODATA), 0)}]


def _file(kept: Mapping[str, Any]) -> Document:
    if "sha256" not in kept:  # a store is no file
        return {}
    return {"file:checksum": _SHA256 + kept["sha256"], "file:size": kept["size"]}
