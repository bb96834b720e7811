"""What a raster's header says, and whether to believe it, before any pixel is read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio._path import _UnparsedPath
from rasterio.enums import ColorInterp, Interleaving
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader

from tilenet.errors import InputError
from tilenet.geometry import Georeference
from tilenet.quiet import ignoring
from tilenet.sources.validity import validity_of
from tilenet.strangers import exists

__all__ = ["CACHE_BYTES", "DRIVERS", "RasterInfo", "describe", "environment", "open_dataset"]

DRIVERS = (
    "GTiff", "PNG", "JPEG", "JP2OpenJPEG", "BMP", "GIF", "WEBP", "JPEGXL", "HFA", "ENVI", "NITF",
    "EHdr", "PNM", "SGI", "RMF", "SRTMHGT", "USGSDEM", "AAIGrid", "XYZ", "RST", "Leveller",
    "BIGGIF",
)  # fmt: skip
"""Formats that hold pixels of their own. Formats that point elsewhere (VRT, WMS, STAC…) are not
opened: a file from a stranger must not make us read other files or the network."""

CACHE_BYTES = 32 << 20
"""Of decoded pixels, in GDAL."""
_MAX_BANDS = 4096
_MAX_NATIVE_BLOCK_BYTES = 64 << 20
_AS_READ = {"uint8", "uint16", "int16", "float32"}
_CONVERTED = {
    "int8": "int16", "uint32": "float32", "int32": "float32", "float16": "float32",
    "float64": "float32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RasterInfo:
    """What is known of a raster before any pixel is read.

    Parameters
    ----------
    path : str
        File.
    driver : str
        GDAL's name of the format.
    height, width : int
        Pixels at the chosen level.
    bands : tuple of int
        Bands in use, from 1.
    count : int
        Bands in the file, alpha included.
    dtype : str
        Numpy name of the pixels as they are handed out.
    stored_dtype : str
        Numpy name of the pixels in the file.
    level : int
        Pyramid index, 0 = full resolution.
    levels : tuple of (int, int)
        Height and width of every level.
    native_block : tuple of (int, int)
        Height and width of the file's own tile or strip.
    nodata : tuple of float or None
        Per band in use.
    validity : str
        Where invalid pixels come from: "all", "nodata", "alpha" or "mask".
    georeference : Georeference
        Of the chosen level.
    files : tuple of str
        Every file that was used: the raster and its sidecars.
    fingerprint : str
        Hash of names, sizes, times and first bytes of these files.
    """

    path: str
    driver: str
    height: int
    width: int
    bands: tuple[int, ...]
    count: int
    dtype: str
    stored_dtype: str
    level: int
    levels: tuple[tuple[int, int], ...]
    native_block: tuple[int, int]
    nodata: tuple[float | None, ...]
    validity: str
    georeference: Georeference
    files: tuple[str, ...]
    fingerprint: str

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel in the file, all bands."""
        return self.count * np.dtype(self.stored_dtype).itemsize


def open_dataset(path: str, level: int) -> Any:
    """Open a file at a level, by the formats in `DRIVERS` only."""
    options: dict[str, object] = {} if level == 0 else {"OVERVIEW_LEVEL": str(level - 1)}
    with ignoring(NotGeoreferencedWarning):
        # rasterio.open takes one driver only; the reader class takes the whole list. An unparsed,
        # absolute path is never taken for a URL or one of GDAL's virtual file systems.
        return DatasetReader(
            _UnparsedPath(str(Path(path).absolute())), driver=list(DRIVERS), **options
        )


def environment() -> Any:
    """Return the settings of GDAL's in which rasters are opened and read."""
    return rasterio.Env(
        GDAL_CACHEMAX=CACHE_BYTES,  # GDAL's own default is 5 % of the machine's memory
        # Its short cut for whole PNGs hands out uninitialised memory where the file is cut off, and
        # a cut-off JPEG is grey, both without an error.
        GDAL_PNG_WHOLE_IMAGE_OPTIM=False,
        GDAL_ERROR_ON_LIBJPEG_WARNING=True,
        # No name is this one: whatever a file says, GDAL fetches nothing.
        CPL_VSIL_CURL_ALLOWED_FILENAME="none",
        # Reading raw formats (PNM, ENVI …) at one go, zeros take the place of what is cut off.
        GDAL_ONE_BIG_READ=False,
        # Ask for each sidecar by name rather than list a folder of thousands at every opening.
        GDAL_DISABLE_READDIR_ON_OPEN="TRUE",
    )


def fingerprint(files: tuple[str, ...]) -> str:
    """Return a hash of the files' names, sizes, times and first 64 KiB."""
    digest = hashlib.sha256()
    for name in files:
        path = Path(name)
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
    return digest.hexdigest()


def _levels(path: str, dataset: Any) -> tuple[tuple[int, int], ...]:
    """Return the sizes of the levels that show the same picture.

    GDAL lists a slide's thumbnail and label pages among the overviews; their proportions give
    them away.
    """
    full = (dataset.height, dataset.width)
    levels = [full]
    for index in range(len(dataset.overviews(1))):
        with open_dataset(path, index + 1) as overview:
            height, width = overview.height, overview.width
        same = abs(height * full[1] - width * full[0]) <= max(full)
        if not same or height >= levels[-1][0]:
            break
        levels.append((height, width))
    return tuple(levels)


def _georeference(path: str, dataset: Any) -> Georeference:
    def wkt(crs: Any) -> str | None:
        return str(crs.to_wkt(version="WKT2_2019")) if crs else None

    gcps, gcp_crs = dataset.gcps
    transform = tuple(float(v) for v in dataset.transform[:6])
    # For PNM, which has none, GDAL hands out uninitialised memory.
    placed = transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0) and not gcps and dataset.driver != "PNM"
    if placed and not np.isfinite(transform).all():
        raise InputError("its place is not finite", path, "correct it: gdal_edit -unsetgt FILE")
    rpcs = dataset.tags(ns="RPC")
    mpp = None
    description = dataset.tags().get("TIFFTAG_IMAGEDESCRIPTION", "")
    match = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", description)
    if description.startswith("Aperio") and match and float(match[1]) > 0:
        mpp = (float(match[1]), float(match[1]))
    return Georeference(
        crs_wkt=wkt(dataset.crs),
        transform=transform if placed else None,  # type: ignore[arg-type]
        gcps=tuple((g.row, g.col, g.x, g.y, g.z or 0.0) for g in gcps),
        gcp_crs_wkt=wkt(gcp_crs) if gcps else None,
        rpcs=tuple(sorted(rpcs.items())),
        mpp=mpp,
    )


def _check_beside(path: str, dataset: Any) -> None:
    """Raise where GDAL would look for overviews or a mask in a file that is none of DRIVERS'.

    It opens them by whatever format they have, VRT among them.
    """
    if "OVERVIEW_FILE" in dataset.tags(ns="OVERVIEWS"):
        raise InputError("its overviews lie in another file", path, "rewrite it without them")
    for ending in (".ovr", ".msk", ".OVR", ".MSK"):
        if exists(path + ending):
            with open_dataset(path + ending, 0) as beside:
                _check_beside(path + ending, beside)


def _check_claim(path: str, dataset: Any) -> None:
    """Raise where a file is too short for the picture that its header claims."""
    size = Path(path).stat().st_size
    height, width = dataset.block_shapes[0]
    blocks = -(-dataset.height // height) * -(-dataset.width // width)
    # Each has a place in a table of the file's, even where it is not stored; an uncompressed strip
    # that GDAL splits has a byte.
    if dataset.driver == "GTiff" and blocks > size:
        raise InputError(f"the file is too short for its {blocks} native blocks", path)
    # Deflate packs 1032 bytes into one at the most, and a pixel has a bit at the least.
    if dataset.driver == "PNG" and dataset.height * dataset.width > 8 * 1032 * size:
        raise InputError(f"the file is too short for {dataset.height}×{dataset.width}", path)


def _check(path: str, dataset: Any, bands: tuple[int, ...]) -> None:
    # Each of these properties asks GDAL about every band.
    dtypes, colours, shapes = dataset.dtypes, dataset.colorinterp, dataset.block_shapes
    if dataset.count:
        _check_claim(path, dataset)
    together = dataset.count if dataset.interleaving is Interleaving.pixel else 1
    missing = [b for b in bands if not 1 <= b <= dataset.count]
    if missing:
        raise InputError(
            f"no band {missing[0]}", path, f"--bands counts from 1; the file has {dataset.count}"
        )
    for band in bands:
        name = dtypes[band - 1]
        if name not in _AS_READ and name not in _CONVERTED:
            raise InputError(
                f"pixels are {name}", path, "convert them to 8- or 16-bit integers or float32"
            )
        if colours[band - 1] is ColorInterp.palette:
            raise InputError(
                "pixels are indices into a palette",
                path,
                "expand them first: gdal_translate -expand rgb IN OUT",
            )
        height, width = shapes[band - 1]
        if height * width * np.dtype(name).itemsize * together > _MAX_NATIVE_BLOCK_BYTES:
            raise InputError(
                f"one native block is {height}×{width} pixels, more than 64 MiB",
                path,
                "rewrite the file in tiles: gdal_translate -co TILED=YES IN OUT",
            )


def _native_block(path: str, dataset: Any, band: int, level: int) -> tuple[int, int]:
    if level:
        with open_dataset(path, level) as overview:
            return _native_block(path, overview, band, 0)
    height, width = dataset.block_shapes[band - 1]
    return height, width


def describe(
    path: str, dataset: Any, bands: tuple[int, ...] | None, level: int, *, checked: bool
) -> RasterInfo:
    """Return what the header says of a file that is open; raises InputError as `open_raster`."""
    _check_beside(path, dataset)
    if dataset.count > _MAX_BANDS:
        raise InputError(f"{dataset.count} bands, at most {_MAX_BANDS} are read", path)
    if bands is None:
        colours = enumerate(dataset.colorinterp, 1)
        bands = tuple(b for b, colour in colours if colour is not ColorInterp.alpha)
    if not bands:
        raise InputError("no bands", path)
    if checked:
        _check(path, dataset, bands)
    levels = _levels(path, dataset)
    if not 0 <= level < len(levels):
        raise InputError(f"no level {level}", path, f"the file has levels 0 to {len(levels) - 1}")
    height, width = levels[level]
    dtypes, nodata = dataset.dtypes, dataset.nodatavals
    stored = str(np.result_type(*(dtypes[b - 1] for b in bands)))
    files = tuple(sorted(f for f in dataset.files if Path(f).is_file()))
    return RasterInfo(
        path=path,
        driver=dataset.driver,
        height=height,
        width=width,
        bands=bands,
        count=dataset.count,
        dtype=stored if stored in _AS_READ else _CONVERTED.get(stored, "float32"),
        stored_dtype=stored,
        level=level,
        levels=levels,
        native_block=_native_block(path, dataset, bands[0], level),
        nodata=tuple(nodata[b - 1] for b in bands),
        validity=validity_of(dataset, bands),
        georeference=_georeference(path, dataset).scaled(
            levels[0][0] / height, levels[0][1] / width
        ),
        files=files,
        fingerprint=fingerprint(files),
    )
