"""What comes from strangers: names that cannot be paths, documents that are no documents.

Where a name is too long or holds a NUL, `pathlib` raises; here nothing is there.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

__all__ = [
    "ELSEWHERE",
    "exists",
    "forget_drivers",
    "is_collection",
    "is_file",
    "is_folder",
    "is_pattern",
    "is_store",
    "is_url",
    "parse_json",
]


ELSEWHERE = (
    "WMS", "WCS", "WMTS", "GTI", "STACIT", "STACTA", "MRF", "HTTP", "DERIVED", "EEDA",
    "EEDAI", "PLMOSAIC", "DAAS", "ESRIC", "OGCAPI", "GDALG", "TIL", "RPFTOC", "ECRGTOC", "DIMAP",
    "KMLSUPEROVERLAY", "NGW", "ENVISAT", "ISCE", "ERS", "PDS", "PDS4", "ISIS2", "ISIS3", "SAFE",
    "VICAR", "PCIDSK", "SENTINEL2", "netCDF", "HDF5", "HDF5Image", "Zarr",
)  # fmt: skip
"""GDAL's formats whose pixels may lie in other files or the network, or that read much besides."""

_WILDCARDS = frozenset("*?[")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # RFC 3986, 3.1


def forget_drivers() -> None:
    """Let GDAL, which must not be imported yet, do without formats that point elsewhere.

    A raster is opened by the formats in `tilenet.sources` only. But what its sidecars or its own
    metadata name as its overviews or mask, GDAL opens by whatever it has. For the command and its
    workers, which own their process. VRT must stay: GDAL makes COGs by it.
    """
    os.environ.setdefault("GDAL_SKIP", ",".join(ELSEWHERE))


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything is there."""
    return os.path.exists(path)  # noqa: PTH110 - Path's raises where a folder is closed


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is there, perhaps behind links."""
    return os.path.isfile(path)  # noqa: PTH113 - as above


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there, perhaps behind links."""
    return os.path.isdir(path)  # noqa: PTH112 - as above


def is_url(name: str) -> bool:
    """Whether a name begins like a URL, of whatever scheme."""
    return _URL.match(name) is not None


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a Zarr group or array is there, in a folder."""
    return is_folder(path) and any(
        is_file(os.path.join(path, name))  # noqa: PTH118 - no Path is needed
        for name in ("zarr.json", ".zgroup", ".zarray")
    )


def is_collection(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there that is not itself a raster."""
    return is_folder(path) and not is_store(path)


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a name has wildcards and is not that of a file itself."""
    return not _WILDCARDS.isdisjoint(os.fspath(path)) and not exists(path)


def parse_json(text: bytes | str) -> Any:
    """Return the content of a JSON document.

    Raises
    ------
    ValueError
        It is none, or nested too deep to be one of ours.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
