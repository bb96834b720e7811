"""Whether a mask lies where GDAL itself says that its raster lies."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

NOWHERE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def differences(source: Path, out: Path) -> int:
    """Say on stderr in what a mask's size and place differ from the raster's; return how many.

    The mask is read by others than tilenet: by rasterio, or as the attributes that xarray reads.
    """
    warnings.simplefilter("ignore")
    want = _of_dataset(source)
    have = _of_store(out) if out.is_dir() else _of_dataset(out)
    wrong = [
        f"{key}: {have[key]} in the mask, {want[key]} in the raster"
        for key in want
        if not _same(have[key], want[key])
    ]
    sys.stderr.writelines(f"{line}\n" for line in wrong)
    return len(wrong)


def _of_dataset(path: Path) -> dict[str, Any]:
    import rasterio
    from rasterio.crs import CRS

    with rasterio.open(path) as dataset:
        gcps, gcp_crs = dataset.gcps
        return {
            "size": dataset.shape,
            # GDAL has nothing but noise for PNM.
            "transform": NOWHERE
            if gcps or dataset.driver == "PNM"
            else tuple(dataset.transform)[:6],
            "crs": dataset.crs or CRS(),
            "gcps": [(g.row, g.col, g.x, g.y, g.z or 0.0) for g in gcps],
            "gcp_crs": gcp_crs or CRS(),
            "rpcs": dataset.tags(ns="RPC"),
        }


def _of_store(path: Path) -> dict[str, Any]:
    import zarr

    group = zarr.open_group(path, mode="r")
    array = group["mask"]
    place = dict(group["spatial_ref"].attrs) if "spatial_ref" in group else {}
    points = array.attrs.get("tilenet_gcps", {"crs_wkt": None, "points": []})
    c, a, b, f, d, e = map(float, place.get("GeoTransform", "0 1 0 0 0 1").split())
    return {
        "size": array.shape,
        "transform": (a, b, c, d, e, f),
        "crs": _crs(place.get("crs_wkt")),
        "gcps": [
            tuple(point[k] for k in ("row", "col", "x", "y", "z")) for point in points["points"]
        ],
        "gcp_crs": _crs(points["crs_wkt"]),
        "rpcs": dict(array.attrs.get("tilenet_rpcs", {})),
    }


def _crs(wkt: str | None) -> Any:
    from rasterio.crs import CRS

    return CRS.from_wkt(wkt) if wkt else CRS()


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, tuple | list):
        return np.array_equal(np.asarray(have, float), np.asarray(want, float), equal_nan=True)
    return bool(have == want)
