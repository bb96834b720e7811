"""Rasters that GDAL reads: which ones are opened, what a header says, and whether to believe it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._path import _UnparsedPath
from rasterio.enums import ColorInterp, Interleaving
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader

from tilenet.errors import InputError
from tilenet.geometry import Georeference, Window
from tilenet.quiet import ignoring
from tilenet.sources.bands import bands_in_use, scaled_bands
from tilenet.sources.rasterinfo import AS_READ, CONVERTED, Found, RasterInfo
from tilenet.sources.remote import is_remote
from tilenet.sources.validity import nodata_of, validity_of
from tilenet.sources.view import View
from tilenet.sources.vsi import network_settings, remote_fingerprint, vsi_name
from tilenet.strangers import exists, is_file

__all__ = [
    "CACHE_BYTES",
    "DRIVERS",
    "GdalHandle",
    "environment",
    "find",
    "georeference",
    "open_dataset",
]

DRIVERS = (
    "GTiff", "PNG", "JPEG", "JP2OpenJPEG", "BMP", "GIF", "WEBP", "JPEGXL", "HFA", "ENVI", "NITF",
    "EHdr", "PNM", "SGI", "RMF", "SRTMHGT", "USGSDEM", "AAIGrid", "XYZ", "RST", "Leveller",
    "BIGGIF",
)  # fmt: skip
"""Formats that hold pixels of their own. Formats that point elsewhere (VRT, WMS, STAC…) are not
opened: a file from a stranger must not make us read other files or the network."""

CACHE_BYTES = 36 << 20
"""Of decoded pixels, in GDAL: those of a block of RGB bytes, in native tiles of 240 to 512."""
_MAX_BANDS = 4096
_MPP = (0.02, 20.0)
_NUMPY = {"complex_int16": "complex64"}  # a kind of pixel that numpy does not have
_MAX_NATIVE_BLOCK_BYTES = 64 << 20


def open_dataset(path: str, level: int, *, elsewhere: bool = False) -> Any:
    """Open a file at a level, by the formats in `DRIVERS` only.

    With `elsewhere` it may lie on another machine, or be a VRT, which points to other files.
    """
    options: dict[str, object] = {} if level == 0 else {"OVERVIEW_LEVEL": str(level - 1)}
    with ignoring(NotGeoreferencedWarning):
        # rasterio.open takes one driver only; the reader class takes the whole list. An unparsed,
        # absolute path is never taken for a URL or one of GDAL's virtual file systems.
        if elsewhere:
            name, drivers = (
                path if is_remote(path) else str(Path(path).absolute()),
                (*DRIVERS, "VRT"),
            )
            return DatasetReader(_UnparsedPath(vsi_name(name)), driver=list(drivers), **options)
        return DatasetReader(
            _UnparsedPath(str(Path(path).absolute())), driver=list(DRIVERS), **options
        )


_here = threading.local()


@contextmanager
def environment(*, elsewhere: bool = False, distant: bool = False) -> Iterator[None]:
    """Set GDAL, in this thread, as rasters are opened and read; free where it is set so already.

    Parameters
    ----------
    elsewhere : bool
        Whether a file may point to others, on other machines too.
    distant : bool
        Whether it lies on another machine itself.
    """
    outer, own = getattr(_here, "kind", None), (elsewhere, distant)
    if own == outer:  # of a small file, to set it again takes as long as to open it
        yield
        return
    with rasterio.Env(**_settings(elsewhere=elsewhere, distant=distant)):
        try:
            _here.kind = own
            yield
        finally:
            _here.kind = outer


def _settings(*, elsewhere: bool, distant: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "GDAL_CACHEMAX": CACHE_BYTES,  # GDAL's own default is 5 % of the machine's memory
        # Its short cut for whole PNGs hands out uninitialised memory where the file is cut off, and
        # a cut-off JPEG is grey, both without an error.
        "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,
        "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
        # Reading raw formats (PNM, ENVI …) at one go, zeros take the place of what is cut off.
        "GDAL_ONE_BIG_READ": False,
        # Ask for each sidecar by name rather than list a folder of thousands at every opening; far
        # away, where each name is a request, for none.
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR" if distant else "TRUE",
    }
    if elsewhere:
        return settings | network_settings()
    # No name is this one: whatever a file says, GDAL fetches nothing.
    return settings | {"CPL_VSIL_CURL_ALLOWED_FILENAME": "none"}


def _levels(path: str, dataset: Any, *, elsewhere: bool) -> tuple[tuple[int, int], ...]:
    """Return the sizes of the levels that show the same picture.

    GDAL lists a slide's thumbnail and label pages among the overviews; their proportions give
    them away.
    """
    full = (dataset.height, dataset.width)
    levels = [full]
    for index in range(len(dataset.overviews(1))):
        with open_dataset(path, index + 1, elsewhere=elsewhere) as overview:
            height, width = overview.height, overview.width
        same = abs(height * full[1] - width * full[0]) <= max(full)
        if not same or height >= levels[-1][0]:
            break
        levels.append((height, width))
    return tuple(levels)


def georeference(path: str, dataset: Any) -> Georeference:
    """Return where an open file lies, as far as it says."""

    def wkt(crs: Any) -> str | None:
        return str(crs.to_wkt(version="WKT2_2019")) if crs else None

    gcps, gcp_crs = dataset.gcps
    transform = tuple(float(v) for v in dataset.transform[:6])
    # For PNM, which has none, GDAL hands out uninitialised memory.
    placed = transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0) and not gcps and dataset.driver != "PNM"
    if placed and not np.isfinite(transform).all():
        raise InputError("its place is not finite", path, "correct it: gdal_edit -unsetgt FILE")
    rpcs = dataset.tags(ns="RPC")
    return Georeference(
        crs_wkt=wkt(dataset.crs),
        transform=transform if placed else None,  # type: ignore[arg-type]  # six numbers
        gcps=tuple((g.row, g.col, g.x, g.y, g.z or 0.0) for g in gcps),
        gcp_crs_wkt=wkt(gcp_crs) if gcps else None,
        rpcs=tuple(sorted(rpcs.items())),
        mpp=_mpp(dataset.tags()),
    )


def _mpp(tags: dict[str, str]) -> tuple[float, float] | None:
    """Return micrometres per pixel (y, x), if the file tells any that a microscope could have.

    Photographs carry the resolution they are to be printed at in the same tags.
    """
    match = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", tags.get("TIFFTAG_IMAGEDESCRIPTION", ""))
    try:
        if match and tags["TIFFTAG_IMAGEDESCRIPTION"].startswith("Aperio"):
            found = (float(match[1]), float(match[1]))
        elif tags.get("TIFFTAG_RESOLUTIONUNIT", "").startswith("3"):  # pixels per centimetre
            y, x = (float(tags[f"TIFFTAG_{axis}RESOLUTION"]) for axis in "YX")
            found = (10_000 / y, 10_000 / x)
        else:
            return None
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return found if all(_MPP[0] <= value <= _MPP[1] for value in found) else None


def _metres(crs: Any) -> float | None:
    """Return metres per unit of a projected CRS, None for another."""
    return float(crs.linear_units_factor[1]) if crs and crs.is_projected else None


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
    if dataset.count and not is_remote(path) and dataset.driver != "VRT":
        _check_claim(path, dataset)
    together = dataset.count if dataset.interleaving is Interleaving.pixel else 1
    for band in bands:
        name = dtypes[band - 1]
        if name not in AS_READ and name not in CONVERTED:
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


def _native_block(
    path: str, dataset: Any, band: int, level: int, *, elsewhere: bool
) -> tuple[int, int]:
    if level:
        with open_dataset(path, level, elsewhere=elsewhere) as overview:
            return _native_block(path, overview, band, 0, elsewhere=elsewhere)
    height, width = dataset.block_shapes[band - 1]
    return height, width


def find(path: str, dataset: Any, view: View, *, checked: bool) -> Found:
    """Return what the header says of a file that is open; raises InputError as `open_raster`."""
    if view.plane:
        raise InputError("has no planes to choose from", path, "leave --plane out")
    elsewhere, distant = view.allow_remote, is_remote(path)
    if dataset.driver != "VRT" and not distant:
        _check_beside(path, dataset)
    if dataset.count > _MAX_BANDS:
        raise InputError(f"{dataset.count} bands, at most {_MAX_BANDS} are read", path)
    colours = tuple(colour.name for colour in dataset.colorinterp)
    image = tuple(b for b, colour in enumerate(colours, 1) if colour != ColorInterp.alpha.name)
    names = tuple(name or "" for name in dataset.descriptions)
    bands = bands_in_use(view.bands, view.trained_bands, image, names, path, colours)
    scaling = None
    if checked:
        _check(path, dataset, bands)
        said = tuple((dataset.scales[b - 1], dataset.offsets[b - 1]) for b in bands)
        scaling = scaled_bands(bands, said, view.scaling, path)
    dtypes = dataset.dtypes
    return Found(
        path=path,
        driver=dataset.driver,
        bands=bands,
        count=dataset.count,
        names=names,
        stored_dtype=str(
            np.result_type(*(_NUMPY.get(n, n) for n in (dtypes[b - 1] for b in bands)))
        ),
        levels=_levels(path, dataset, elsewhere=elsewhere),
        nodata=nodata_of(dataset, bands),
        validity=validity_of(dataset, bands, colours),
        georeference=georeference(path, dataset),
        metres=_metres(dataset.crs),
        native_block=lambda level: _native_block(
            path, dataset, bands[0], level, elsewhere=elsewhere
        ),
        files=tuple(sorted(filter(is_file, dataset.files))),
        scaling=scaling,
        fingerprint=(lambda _: remote_fingerprint(path)) if distant else None,
    )


class GdalHandle:
    """An open file at one level; belongs to one thread at a time.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    dataset : rasterio.io.DatasetReader, optional
        If it is open already.
    """

    def __init__(self, info: RasterInfo, dataset: Any = None) -> None:
        self._info = info
        if dataset is None:
            elsewhere = info.view.allow_remote
            with environment(elsewhere=elsewhere, distant=is_remote(info.path)):
                dataset = open_dataset(info.path, info.level, elsewhere=elsewhere)
        self._dataset = dataset

    def close(self) -> None:
        """Close the file."""
        self._dataset.close()

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return pixels as they are stored, (C, h, w), and what alpha or mask say of them."""
        info, dataset = self._info, self._dataset
        where = ((box.row, box.row_stop), (box.col, box.col_stop))
        valid = None
        with environment(elsewhere=info.view.allow_remote, distant=is_remote(info.path)):
            stored = dataset.read(info.bands, window=where)
            if "alpha" in info.validity:
                alpha = [c is ColorInterp.alpha for c in dataset.colorinterp].index(True) + 1
                valid = dataset.read(alpha, window=where) != 0
            elif info.validity == "mask":
                valid = dataset.read_masks(info.bands[0], window=where) != 0
        return stored, valid
