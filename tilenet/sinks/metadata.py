"""The attributes that make other tools understand a mask: OME, GeoZarr, CF, GDAL.

Pure functions from a spec to plain dictionaries. Keys follow OME-NGFF 0.4 and 0.5, CF 1.11, GDAL's
Zarr driver and the zarr-conventions v0.1 (multiscales, proj, spatial), spelled out here because the
package that builds them is not needed to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rasterio.crs import CRS

from tilenet import __version__
from tilenet.classes import NODATA, ClassInfo
from tilenet.geometry import Affine6, Georeference
from tilenet.sinks.spec import ArrayLayout, MaskSpec

__all__ = [
    "SCHEMA",
    "array_attributes",
    "coordinate_attributes",
    "crs_keys",
    "has_coordinates",
    "root_attributes",
    "spatial_ref_attributes",
    "warnings_for",
]

SCHEMA = 1
"""Version of the `tilenet` root attribute."""

Attributes = dict[str, Any]

_CONVENTIONS = {
    "multiscales": (
        "d35379db-88df-4056-af3a-620245f8e347",
        "Multiscale layout of zarr datasets",
    ),
    "proj": (
        "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "Coordinate reference system information for geospatial data",
    ),
    "spatial": ("689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
}


def root_attributes(
    spec: MaskSpec, *, pixels: Mapping[int, int] | None = None, complete: bool = False
) -> Attributes:
    """Return the attributes of the root group.

    Parameters
    ----------
    spec : MaskSpec
        The mask.
    pixels : mapping of int to int, optional
        Pixels of each class id at full resolution, once they are known.
    complete : bool
        Whether every pixel is there.
    """
    attributes = _ome(spec, pixels or {})
    if spec.zarr_format == 3:
        # OME 0.4 owns the top-level `multiscales` of format 2; only format 3 has room for GeoZarr.
        attributes = {"ome": {"version": "0.5", **attributes}, **_geozarr_root(spec)}
    attributes["tilenet"] = {
        "version": __version__,
        "schema": SCHEMA,
        "complete": complete,
        "title": spec.title,
        "spec": spec.as_dict(),
    }
    return attributes


def array_attributes(spec: MaskSpec, layout: ArrayLayout, factor: int) -> Attributes:
    """Return the attributes of a pixel array whose pixels are `factor` times level 0's."""
    place = spec.georeference.scaled(factor, factor)
    attributes = _probability(spec) if layout.path == "prob" else _classes(spec.classes)
    if _has_grid(place) and (factor == 1 or spec.label is None):
        attributes["grid_mapping"] = "spatial_ref"
    if place.crs_wkt is not None:
        attributes["_CRS"] = _gdal_crs(place.crs_wkt)
    if place.gcps:
        attributes["tilenet_gcps"] = {
            "crs_wkt": place.gcp_crs_wkt,
            "points": [
                dict(zip(("row", "col", "x", "y", "z"), p, strict=True)) for p in place.gcps
            ],
        }
    if place.rpcs:
        attributes["tilenet_rpcs"] = dict(place.rpcs)
    if spec.zarr_format == 3:
        return {**attributes, **_geozarr(place, layout.shape[-2:], ())}
    return {"_ARRAY_DIMENSIONS": list(layout.dimensions), **attributes}


def has_coordinates(georeference: Georeference) -> bool:
    """Whether rows and columns have coordinates of their own: y by row, x by column."""
    if georeference.is_georeferenced:
        return georeference.transform is not None and not georeference.is_rotated
    return georeference.mpp is not None


def coordinate_attributes(georeference: Georeference) -> dict[str, Attributes]:
    """Return the attributes of the pixel-centre coordinates `x` and `y`.

    A grid without a place on a map has micrometres from its outer corner.
    """
    if not georeference.is_georeferenced:
        return {
            axis: {"long_name": f"{axis} from the outer corner", "units": "micrometer"}
            for axis in ("x", "y")
        }
    if georeference.crs_wkt is None:
        return {axis: {"long_name": f"{axis} coordinate"} for axis in ("x", "y")}
    crs = CRS.from_wkt(georeference.crs_wkt)
    if crs.is_geographic:
        return {
            "x": {"standard_name": "longitude", "units": "degrees_east"},
            "y": {"standard_name": "latitude", "units": "degrees_north"},
        }
    unit = "m" if _is_metric(crs) else crs.linear_units
    return {
        axis: {"standard_name": f"projection_{axis}_coordinate", "units": unit}
        for axis in ("x", "y")
    }


def spatial_ref_attributes(georeference: Georeference) -> Attributes | None:
    """Return the attributes of the CF grid mapping; None without a CRS or affine of the grid.

    `GeoTransform` has GDAL's order (c a b f d e) and all 17 digits, so any affine survives.
    """
    if not _has_grid(georeference):
        return None
    attributes: Attributes = {}
    if georeference.crs_wkt is not None:
        attributes = {"crs_wkt": georeference.crs_wkt, "spatial_ref": georeference.crs_wkt}
    if georeference.transform is not None:
        a, b, c, d, e, f = georeference.transform
        attributes["GeoTransform"] = " ".join(repr(float(v)) for v in (c, a, b, f, d, e))
    return attributes


def warnings_for(spec: MaskSpec) -> list[str]:
    """Return one line for each part of the georeference that some reader of the store will miss."""
    place = spec.georeference
    lines = []
    if place.is_rotated:
        lines.append(
            "rotated grid: GDAL up to 3.12 (QGIS) and OME viewers do not see the affine of the "
            "Zarr store; rioxarray and GeoZarr readers do, and so does a COG"
        )
    if place.gcps and place.transform is None:
        lines.append(
            "ground control points: no Zarr reader uses them (kept as `tilenet_gcps`); a COG "
            "carries them"
        )
    if place.rpcs:
        lines.append("RPCs: no Zarr reader uses them (kept as `tilenet_rpcs`); a COG carries them")
    return lines


def _has_grid(georeference: Georeference) -> bool:
    return georeference.crs_wkt is not None or georeference.transform is not None


def _is_metric(crs: CRS) -> bool:
    # A geographic CRS has no linear unit: rasterio raises on it rather than answering.
    return crs.is_projected and math.isclose(crs.linear_units_factor[1], 1.0)


def _pixel(georeference: Georeference) -> tuple[list[float], str | None]:
    """Return the pixel's (height, width) and its unit in UDUNITS words, None if it has none."""
    if georeference.mpp is not None:
        return list(georeference.mpp), "micrometer"
    if georeference.transform is None:
        return [1.0, 1.0], None
    a, b, _, d, e, _ = georeference.transform
    crs = None if georeference.crs_wkt is None else CRS.from_wkt(georeference.crs_wkt)
    unit = "meter" if crs is not None and _is_metric(crs) else None
    return [math.hypot(b, e), math.hypot(a, d)], unit


def _ome(spec: MaskSpec, pixels: Mapping[int, int]) -> Attributes:
    """Return `multiscales` and `image-label`; format 2 wants the version inside each."""
    sides, unit = _pixel(spec.georeference)
    units, offset = (unit, unit), (0.0, 0.0)
    if spec.label is not None:  # over its image, and nowhere else
        sides, units, offset = list(spec.label.scale), spec.label.units, spec.label.offset
    of_its_own = {"version": "0.4"} if spec.zarr_format == 2 else {}
    axes = [
        {"name": name, "type": "space"} | ({} if unit is None else {"unit": unit})
        for name, unit in zip(("y", "x"), units, strict=True)
    ]
    # The centre of a 2x2 majority pixel lies half a fine pixel further in than its first source.
    datasets = [
        {
            "path": path,
            "coordinateTransformations": [
                {"type": "scale", "scale": [side * factor for side in sides]},
                {
                    "type": "translation",
                    "translation": [
                        first + side * (factor - 1) / 2
                        for first, side in zip(offset, sides, strict=True)
                    ],
                },
            ],
        }
        for path, factor, _, _ in spec.levels
    ]
    multiscale = {
        **of_its_own,
        "name": spec.title,
        "type": "mode",
        "metadata": {"method": "2x2 majority", "version": __version__},
        "axes": axes,
        "datasets": datasets,
    }
    return {"multiscales": [multiscale], "image-label": _label(spec, pixels)}


def _label(spec: MaskSpec, pixels: Mapping[int, int]) -> Attributes:
    # Label 0 is a label image's background: opaque, it would hide the image below.
    labels = [(c.id, c.name, [*c.color, 255 if c.id else 0]) for c in spec.classes]
    labels.append((NODATA, "no answer", [0, 0, 0, 0]))
    return {
        "version": "0.4" if spec.zarr_format == 2 else "0.5",
        "colors": [{"label-value": value, "rgba": rgba} for value, _, rgba in labels],
        "properties": [
            {"label-value": value, "class": name}
            | ({"area (pixels)": int(pixels[value])} if value in pixels else {})
            for value, name, _ in labels
        ],
        **({} if spec.label is None else {"source": {"image": "../../"}}),
    }


def _classes(classes: tuple[ClassInfo, ...]) -> Attributes:
    return {
        "long_name": "class",
        "flag_values": [c.id for c in classes],
        # CF separates the words by spaces, so a name must not hold one.
        "flag_meanings": " ".join("_".join(c.name.split()) for c in classes),
    }


def _probability(spec: MaskSpec) -> Attributes:
    return {
        "long_name": "probability",
        "scale_factor": 1 / 255,
        "add_offset": 0.0,
        "channel_names": list(spec.channels),
    }


def crs_keys(crs_wkt: str) -> Attributes:
    """Return `proj:code` of a CRS, or `proj:wkt2` if nobody has given it a code."""
    found = _authority(crs_wkt)
    if found is None:
        return {"proj:wkt2": _wkt2(crs_wkt)}
    return {"proj:code": f"{found[0]}:{found[1]}"}


def _authority(crs_wkt: str) -> tuple[str, str] | None:
    # At less than 100 % PROJ offers codes of CRSs that merely look alike.
    found: tuple[str, str] | None = CRS.from_wkt(crs_wkt).to_authority(confidence_threshold=100)
    return found


def _wkt2(crs_wkt: str) -> str:
    return str(CRS.from_wkt(crs_wkt).to_wkt(version="WKT2_2019"))


def _gdal_crs(crs_wkt: str) -> Attributes:
    attributes: Attributes = {"wkt": _wkt2(crs_wkt)}
    found = _authority(crs_wkt)
    if found is not None:
        attributes["url"] = f"http://www.opengis.net/def/crs/{found[0]}/0/{found[1]}"
    return attributes


def _convention(name: str) -> Attributes:
    uuid, description = _CONVENTIONS[name]
    repository = f"zarr-conventions/{name}"
    return {
        "uuid": uuid,
        "schema_url": f"https://raw.githubusercontent.com/{repository}/refs/tags/v0.1/schema.json",
        "spec_url": f"https://github.com/{repository}/blob/v0.1/README.md",
        "name": name,
        "description": description,
    }


def _geozarr(
    place: Georeference, shape: tuple[int, ...], conventions: tuple[str, ...]
) -> Attributes:
    """Return the `proj` and `spatial` keys of a grid; nothing for one without an affine."""
    if place.transform is None:
        return {}
    attributes: Attributes = {}
    if place.crs_wkt is not None:
        conventions = (*conventions, "proj")
        attributes = crs_keys(place.crs_wkt)
    return {
        "zarr_conventions": [_convention(name) for name in (*conventions, "spatial")],
        **attributes,
        "spatial:dimensions": ["y", "x"],
        "spatial:bbox": _bounds(place.transform, shape),
        "spatial:shape": list(shape),
        "spatial:transform": [float(v) for v in place.transform],
    }


def _geozarr_root(spec: MaskSpec) -> Attributes:
    root = _geozarr(spec.georeference, (spec.height, spec.width), ("multiscales",))
    if not root:
        return {}
    layout: list[Attributes] = []
    for path, factor, height, width in spec.levels:
        transform = spec.georeference.scaled(factor, factor).transform
        assert transform is not None, "a grid without an affine has no GeoZarr keys"
        step = 1 if factor == 1 else 2
        layout.append(
            {
                "asset": path,
                **({"derived_from": layout[-1]["asset"]} if layout else {}),
                "transform": {"scale": [step, step], "translation": [0, 0]},
                "spatial:shape": [height, width],
                "spatial:transform": [float(v) for v in transform],
            }
        )
    return {**root, "multiscales": {"resampling_method": "mode", "layout": layout}}


def _bounds(transform: Affine6, shape: tuple[int, ...]) -> list[float]:
    """Return [xmin, ymin, xmax, ymax] of the four outer corners."""
    a, b, c, d, e, f = transform
    height, width = shape
    corners = [(a * i + b * j + c, d * i + e * j + f) for i in (0, width) for j in (0, height)]
    xs, ys = zip(*corners, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]
