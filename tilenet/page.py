"""Documents as a page for a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from tilenet.errors import one_line

__all__ = ["outline", "page"]

Document = dict[str, Any]

_MOST = 20  # classes, bands or levels that are told one by one
_LABEL = 18
_MISSING = "–"


def outline(document: Document, indent: str = "") -> str:
    """Return any document as aligned lines of key and value."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", outline(value, indent + "  ")]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{indent}{key:<{24 - len(indent)}} {text}")
    return "\n".join(lines)


def page(path: str, document: Document) -> str:
    """Return what `tilenet info` found as a page.

    Parameters
    ----------
    path : str
        What it is about.
    document : dict
        As `tilenet.info.describe` returns it.
    """
    if document["kind"] in ("model", "STAC item"):
        return outline(document)
    lines = [one_line(path)]
    for label, tell in _LINES.items():
        texts = tell(document)
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            lines.append(f"  {label if not number else '':<{_LABEL}} {one_line(text)}")
    return "\n".join(lines)


def _some(parts: list[str]) -> list[str]:
    left = len(parts) - _MOST
    return parts if left <= 0 else [*parts[:_MOST], f"… and {left} more"]


def _what(document: Document) -> str:
    size = f"{document['width']:,} × {document['height']:,} pixels"
    if document["kind"] == "mask":
        state = "complete" if document["complete"] else "not complete"
        return f"mask, {document['format']}, {size}, {state}"
    parts = [document["driver"], document.get("layout"), document.get("compression")]
    bands = f"{document['bands']} band{'s' if document['bands'] > 1 else ''}"
    return f"{' '.join(filter(None, parts))}, {size}, {bands} of {document['dtype']}"


def _levels(document: Document) -> list[str]:
    return _some(
        [
            f"{one['level']}: {one['width']:,} × {one['height']:,}, downsample "
            f"{one['downsample']:g}"
            for one in document["levels"]
        ]
    )


def _resolution(document: Document) -> str:
    if document["mpp"] is not None:
        return f"{_sides(*document['mpp'])} µm per pixel"
    ground = document["ground_resolution"]
    if ground is None:
        return "not known"
    crs = document["crs"] or {}
    unit = crs.get("unit") or "CRS units"
    text = f"{_sides(ground['y'], ground['x'])} {unit} per pixel"
    metres = ground["metres"]
    if metres is not None and _sides(*metres) != _sides(ground["y"], ground["x"]):
        text += f", {_sides(*metres)} m on the ground"
    return text


def _sides(y: float, x: float) -> str:
    return f"{x:.6g}" if f"{x:.6g}" == f"{y:.6g}" else f"{x:.6g} × {y:.6g} (x × y)"


def _crs(document: Document) -> str:
    crs = document["crs"]
    if crs is None:
        points = document["gcps"]
        return f"none, but {points} ground control points" if points else "none"
    return f"{crs['name'] or 'without a name'} ({crs['code'] or 'no authority code'})"


def _bounds(document: Document) -> list[str]:
    if document["bounds"] is None:
        return []
    west, south, east, north = document["bounds"]
    lines = [f"x {west:.10g} to {east:.10g}, y {south:.10g} to {north:.10g}"]
    if document["bounds_lonlat"] is not None:
        west, south, east, north = document["bounds_lonlat"]
        lines.append(f"longitude {west:.6f} to {east:.6f}, latitude {south:.6f} to {north:.6f}")
    return lines


def _bands(document: Document) -> list[str]:
    lines = []
    for one in document.get("band_details", []):
        parts: list[str | None] = [one["color"], one["name"], one["dtype"]]
        if one["nodata"] is not None:
            value = one["nodata"]
            parts.append(f"nodata {value if isinstance(value, str) else f'{value:g}'}")
        if (one["scale"], one["offset"]) != (1, 0):
            parts.append(f"value = pixel × {one['scale']:g} + {one['offset']:g}")
        parts.append(one["unit"])
        lines.append(f"{one['band']}: {', '.join(filter(None, parts))}")
    if not lines:
        names = document.get("band_names", [])
        lines = [f"{band}: {name}" for band, name in enumerate(names, 1) if name]
    return _some(lines)


def _classes(document: Document) -> list[str]:
    lines = []
    for one in document.get("class_table", []):
        parts = [f"{one['pixels']:,} pixels"] if "pixels" in one else []
        parts += [f"{one['area_ha']:,.6g} ha"] if "area_ha" in one else []
        parts += [f"{one['area_mm2']:,.6g} mm²"] if "area_mm2" in one else []
        lines.append(f"{one['id']}: {one['name']}{''.join(f', {part}' for part in parts)}")
    if document.get("nodata_pixels"):
        lines.append(f"255: no answer, {document['nodata_pixels']:,} pixels")
    return _some(lines)


def _invalid(document: Document) -> list[str]:
    told = {"all": "none: every pixel counts", "nodata": "those of the nodata value",
            "alpha": "where the alpha band is 0", "mask": "where the file's mask is 0",
            "alpha+nodata": "where the alpha band is 0, and those of the nodata value"}  # fmt: skip
    name = str(document.get("validity", ""))
    return [told.get(name, name)] if name else []


def _models(document: Document) -> list[str]:
    return [
        f"{one['name']}: {'fits' if one['fits'] else 'does not fit, ' + one['why']}"
        for one in document.get("models", [])
    ]


def _listed(key: str) -> Callable[[Document], list[str]]:
    def tell(document: Document) -> list[str]:
        return [", ".join(document[key]) or _MISSING] if key in document else []

    return tell


def _in_part(document: Document) -> list[str]:
    by_misses: dict[str, list[str]] = {}
    for reader, misses in document.get("opens_in_part", {}).items():
        by_misses.setdefault(", ".join(misses), []).append(reader)
    return [f"{', '.join(readers)}: without {misses}" for misses, readers in by_misses.items()]


def _block(document: Document) -> list[str]:
    if "native_block" not in document:
        return []
    height, width = document["native_block"]
    return [f"{width} × {height}"]


def _made_by(document: Document) -> list[str]:
    made = document.get("made_by", {})
    if "model" not in made:
        return []
    return [f"tilenet {made.get('tilenet')}, model {made['model']}, of {made.get('input')}"]


_LINES: dict[str, Callable[[Document], str | Iterable[str]]] = {
    "is": _what,
    "levels": _levels,
    "resolution": _resolution,
    "CRS": _crs,
    "bounds": _bounds,
    "planes": lambda document: [f"{k} 0 to {n - 1}" for k, n in document.get("planes", {}).items()],
    "bands": _bands,
    "classes": _classes,
    "invalid pixels": _invalid,
    "native block": _block,
    "files": lambda document: _some(document.get("files", [])),
    "models": _models,
    "made by": _made_by,
    "opens in": _listed("opens_in"),
    "opens in part in": _in_part,
    "does not open in": _listed("does_not_open_in"),
    "not seen": lambda document: document.get("not_seen", []),
    "notes": lambda document: document.get("notes", []),
}
