"""What a raster or a mask is: everything that its header and its run tell."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from tilenet.classes import NODATA
from tilenet.geometry import Georeference
from tilenet.ground import pixel_area
from tilenet.models.card import ModelCard
from tilenet.models.store import bundled_models, find_model
from tilenet.place import describe_place
from tilenet.sinks import documents, open_store, warnings_for
from tilenet.sinks.readers import readers_of
from tilenet.sources import RasterInfo, RemoteName, View, open_raster
from tilenet.sources.gdal import DRIVERS, environment, open_dataset
from tilenet.sources.stac import listing, read_item
from tilenet.strangers import parse_json

__all__ = ["describe_file", "describe_item", "describe_raster", "describe_store"]

Document = dict[str, Any]

_ENLARGED = 2.0
"""A raster may be so many times coarser than what a network was trained at."""


def describe_raster(path: Path | RemoteName, view: View | None = None) -> Document:
    """Return what an image is.

    Parameters
    ----------
    path : Path or RemoteName
        A raster.
    view : View, optional
        How to look at it.

    Raises
    ------
    InputError
        It cannot be opened.
    """
    found = open_raster(path, view, checked=False).info
    return {
        "kind": "raster",
        **_file(found),
        "nodata": [_as_json(value) for value in found.nodata],
        "validity": found.validity,
        **describe_place(found.georeference, found.height, found.width),
        "files": list(found.files),
        **_fitting(found),
    }


def describe_item(name: str) -> Document:
    """Return what a STAC item offers, without opening any of its files."""
    item = read_item(name)
    rasters = listing(item)
    return {
        "kind": "STAC item",
        "id": item.get("id"),
        "datetime": (item.get("properties") or {}).get("datetime"),
        "rasters": rasters,
        "notes": ["--bands NAME,… of one band each, or --variable RASTER; with --allow-remote"],
    }


def _file(found: RasterInfo) -> Document:
    """Return format, sizes, levels and bands."""
    document: Document = {
        "driver": found.driver,
        "width": found.width,
        "height": found.height,
        "bands": found.count,
        "image_bands": list(found.bands),
        "dtype": found.stored_dtype,
        "levels": [
            {"level": k, "width": width, "height": height, "downsample": round(downsample, 4)}
            for k, (height, width) in enumerate(found.levels)
            for downsample in [max(found.levels[0][0] / height, found.levels[0][1] / width)]
        ],
        "native_block": list(found.native_block),
        "band_names": list(found.names),
        "planes": dict(found.planes),
        "notes": list(found.notes),
    }
    return document | (_ask_gdal(found.path) if found.driver in DRIVERS else {})


def _ask_gdal(path: str) -> Document:
    """Return what only GDAL tells: the layout of the file, and each band."""
    with environment(), closing(open_dataset(path, 0)) as dataset:
        structure = dataset.tags(ns="IMAGE_STRUCTURE")
        columns = zip(
            dataset.indexes, dataset.descriptions, dataset.colorinterp, dataset.dtypes,
            dataset.nodatavals, dataset.scales, dataset.offsets, dataset.units, strict=True,
        )  # fmt: skip
        bands = [
            {
                "band": band,
                "name": name,
                "color": color.name,
                "dtype": dtype,
                "nodata": _as_json(nodata),
                "scale": _as_json(scale),
                "offset": _as_json(offset),
                "unit": unit,
            }
            for band, name, color, dtype, nodata, scale, offset, unit in columns
        ]
    return {
        "layout": structure.get("LAYOUT"),
        "compression": structure.get("COMPRESSION"),
        "band_details": bands,
    }


def _as_json(value: float | None) -> float | str | None:
    """Return a number as JSON has it, which knows neither nan nor inf."""
    return value if value is None or math.isfinite(value) else str(value)


def _fitting(found: RasterInfo) -> Document:
    """Return the bundled models with those that take this raster, and why the others do not."""
    models = []
    for name in bundled_models():
        card = find_model(name, None, {}).card
        why = _misfit(found, card)
        models.append({"name": name, "fits": why is None, "why": why})
    return {"models_that_fit": [m["name"] for m in models if m["fits"]], "models": models}


def _misfit(found: RasterInfo, card: ModelCard) -> str | None:
    if card.band_count != len(found.bands):
        return f"it takes {card.band_count} bands, here are {len(found.bands)}"
    place = found.georeference
    if card.mpp is not None and place.mpp is not None:
        wanted, there = card.mpp, max(place.mpp)
    elif card.ground_resolution is not None and place.transform is not None:
        about = describe_place(place, found.height, found.width)["ground_resolution"]
        wanted, there = card.ground_resolution, max(about["metres"] or (about["y"], about["x"]))
    else:
        return None  # it has no resolution, or the raster has none: nothing speaks against it
    if there <= _ENLARGED * wanted:
        return None
    return f"it was trained at {wanted:g} a pixel, here is {there:g}: too coarse"


def describe_store(path: Path) -> Document:
    """Return what a mask in a Zarr store is.

    Raises
    ------
    InputError
        It is none of tilenet's.
    """
    spec = open_store(path).spec
    kept = documents(path)
    plan = parse_json(kept["plan"]) if "plan" in kept else {}
    form: Literal["zarr2", "zarr3"] = "zarr2" if spec.zarr_format == 2 else "zarr3"
    names = {c.id: c.name for c in spec.classes}
    return {
        "kind": "mask",
        "format": f"Zarr {spec.zarr_format}",
        "complete": bool(kept),
        "width": spec.width,
        "height": spec.height,
        "levels": [
            {"level": k, "width": width, "height": height, "downsample": factor}
            for k, (_, factor, height, width) in enumerate(spec.levels)
        ],
        "zarr_format": spec.zarr_format,
        "chunk": spec.chunk,
        **_classes(names, plan, spec.georeference, (spec.height, spec.width)),
        "probabilities": list(spec.channels),
        **describe_place(spec.georeference, spec.height, spec.width),
        **_readers(form, spec.georeference, label=spec.label is not None),
        "not_seen": warnings_for(spec),
        "made_by": plan,
    }


def _form(plan: Document) -> Literal["cog", "ometiff", "png"]:
    """Return the format that a mask's document names; the ending may say another."""
    said = plan.get("identity", {}).get("format")
    return "png" if said == "png" else "ometiff" if said == "ome-tiff" else "cog"


def describe_file(path: Path, plan: Document) -> Document:
    """Return what a one-file mask is, by its header and the document beside it.

    Parameters
    ----------
    path : Path
        The mask.
    plan : dict
        What `tilenet.engine.document.read_sidecar` returned.
    """
    found = open_raster(path, checked=False).info
    names = dict(enumerate(plan.get("identity", {}).get("classes", [])))
    # A file knows its place, but not always the size of a slide's pixels: the document does.
    mpp = plan.get("spec", {}).get("georeference", {}).get("mpp")
    place = found.georeference
    if mpp is not None and not place.is_georeferenced:
        place = Georeference(mpp=(float(mpp[0]), float(mpp[1])))
    form = _form(plan)
    return {
        "kind": "mask",
        "format": {"cog": "COG", "png": "PNG", "ometiff": "OME-TIFF"}[form],
        "complete": plan.get("size") == path.stat().st_size,
        **_file(found),
        **_classes(names, plan, place, (found.height, found.width)),
        **describe_place(place, found.height, found.width),
        **_readers(form, place),
        "made_by": plan,
    }


def _classes(
    names: dict[int, str], plan: Document, place: Georeference, shape: tuple[int, int]
) -> Document:
    pixels = {int(k): int(v) for k, v in plan.get("pixels", {}).items()}
    one = pixel_area(place, *shape)
    table = []
    for number, name in names.items():
        entry: Document = {"id": number, "name": name}
        if pixels:
            entry["pixels"] = pixels.get(number, 0)
            if one is not None:
                entry[f"area_{one.unit}"] = float(f"{entry['pixels'] * one.value:.12g}")
        table.append(entry)
    return {
        "classes": {str(number): name for number, name in names.items()},
        "pixels": {str(number): count for number, count in pixels.items()},
        "class_table": table,
        "nodata_pixels": pixels.get(NODATA, 0) if pixels else None,
    }


def _readers(
    form: Literal["zarr2", "zarr3", "cog", "ometiff", "png"],
    place: Georeference,
    *,
    label: bool = False,
) -> Document:
    """Return who opens the mask, who misses what of it, and who does not open it."""
    told = readers_of(form, place, label=label)
    if told is None:
        return {}
    return {
        "opens_in": [reader for reader, misses in told.items() if not misses],
        "opens_in_part": {
            reader: list(misses)
            for reader, misses in told.items()
            if misses and "opening" not in misses
        },
        "does_not_open_in": [reader for reader, misses in told.items() if "opening" in misses],
    }
