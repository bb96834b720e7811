"""Cloud-optimised GeoTIFFs of a finished mask, copied from its store window by window.

GDAL is never trusted with a half-written file: a killed GTiff write leaves a blank mask that opens
and reads, and a full disk can pass without an error. So the file is made under another name, read
back in full, synced, and only then renamed. Small rasters are made in memory.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from tilenet import durable
from tilenet.classes import NODATA
from tilenet.errors import DISK_FULL, OutputError, ResourceError, TilenetError
from tilenet.geometry import Georeference, Window
from tilenet.pyramid import halve
from tilenet.quiet import ignoring
from tilenet.sinks.layout import has_gaps
from tilenet.sinks.overviews import (
    BLOCK,
    PLAIN,
    as_rasterio,
    coarser_levels,
    new_level,
    put,
    windows_of,
    with_overviews,
)
from tilenet.sinks.pam import class_table
from tilenet.sinks.spec import Before, MaskSpec

__all__ = ["Read", "write_geotiff", "write_probabilities"]

Read = Callable[[Window], NDArray[np.uint8]]
"""Returns a window's pixels: (height, width) of a mask, (channels, height, width) otherwise."""

_READERS = 2  # of what was written, at a time
_SPARE_BYTES = 16 << 20
_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
_RESUMES = "mend it; a rerun resumes"

# GDAL's cache defaults to 5 % of the machine; its threads swallow "disk full" (measured), so two of
# them make the last file only, which is read back in full.
_GDAL = {"GDAL_CACHEMAX": 64 << 20, "GDAL_NUM_THREADS": "1", "GDAL_PAM_ENABLED": "YES"}
_COG = {
    "driver": "COG",
    "compress": "DEFLATE",
    "level": "3",  # a sixth larger than GDAL's own 6, in a third of its time (measured on masks)
    "blocksize": BLOCK,
    "statistics": "YES",
    "num_threads": "2",
    "bigtiff": "IF_SAFER",
    "sparse_ok": "YES",
}


def write_geotiff(
    read: Read,
    spec: MaskSpec,
    out: Path,
    before: Before = lambda _written: None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Write the mask as a COG with palette, class names, nodata 255 and majority overviews.

    Class names go into `NAME.tif.aux.xml` too, where GDAL and QGIS look for them. Memory does not
    grow with the raster. Both files are on disk when the call returns.

    Parameters
    ----------
    read : callable
        Window -> (height, width) uint8; called once for every pixel.
    spec : MaskSpec
        The mask; its georeference is carried over exactly.
    out : Path
        Name of the file; replaced if it exists.
    before : callable, optional
        Called with what is returned, just before the file gets its name.
    scratch : Path, optional
        Folder of the same file system for what is not complete; the output's own if not given.

    Returns
    -------
    dict
        `sha256` and `size` of the COG.

    Raises
    ------
    ResourceError
        If the disk or the memory is exhausted, or GDAL fails to write and does not tell why.
    OutputError
        If the path cannot be, or the file does not read back as it was written.
    """

    def describe(dst: Any) -> None:
        colors = {c.id: (*c.color, 255) for c in spec.classes}
        dst.write_colormap(1, {**colors, NODATA: (0, 0, 0, 0)})
        dst.set_band_description(1, "class")
        dst.update_tags(1, **{f"CLASS_{c.id}": c.name for c in spec.classes})

    profile = {"count": 1, "nodata": NODATA}
    kind = _Kind(profile, describe, class_table(spec.classes), majority=True)
    return _export(read, spec, _Target(out, scratch or out.parent), kind, before)


def write_probabilities(
    read: Read, spec: MaskSpec, out: Path, scratch: Path | None = None
) -> dict[str, Any]:
    """Write the probabilities as a COG of one band per channel, 0 to 255 standing for 0 to 1.

    Parameters, result and exceptions are those of `write_geotiff`; `read` returns
    (channels, height, width), and overviews are averages.
    """

    def describe(dst: Any) -> None:
        for band, name in enumerate(spec.channels, 1):
            dst.set_band_description(band, name)
        dst.scales = [1 / 255] * len(spec.channels)

    profile = {"count": len(spec.channels), "interleave": "band"}
    kind = _Kind(profile, describe, None, majority=False)
    return _export(read, spec, _Target(out, scratch or out.parent), kind, lambda _written: None)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a mask's and a probabilities' file differ in."""

    profile: dict[str, Any]
    describe: Callable[[Any], None]
    sidecar: bytes | None
    majority: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """The file to write, and the folder where it is made."""

    out: Path
    scratch: Path


def _export(
    read: Read, spec: MaskSpec, target: _Target, kind: _Kind, before: Before
) -> dict[str, Any]:
    out, scratch = target.out, target.scratch
    shape = {"height": spec.height, "width": spec.width, "dtype": "uint8"}
    profile = {**shape, **kind.profile, **_place(spec.georeference)}
    with rasterio.Env(**_GDAL), _failures(target):
        if max(spec.height, spec.width) <= BLOCK:
            with MemoryFile(ext=".tif") as file:
                written = _fill(file.name, read, spec, {**profile, **_COG}, kind.describe)
                _compare(file.name, spec, written)
                data = file.read()
            result = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            before(result)
            with _beside(target, kind.sidecar):
                durable.write(out, data, scratch=scratch)
            return result
        # Failures are judged inside too: once the folder is gone, the disk is no longer full.
        with tempfile.TemporaryDirectory(**_hidden(target)) as name, _failures(target):
            folder = Path(name)
            plain, final = folder / "plain.tif", folder / "cog.tif"
            levels = coarser_levels(plain, spec) if kind.majority else {}
            written = _fill(str(plain), read, spec, {**profile, **PLAIN}, kind.describe, levels)
            source = with_overviews(plain, list(levels)) if kind.majority else plain
            options = _COG
            if spec.georeference.gcps:
                # For statistics GDAL writes the VRT anew, and rounds the points in it.
                options = _COG | {"statistics": "NO"}
            rasterio.shutil.copy(str(source), str(final), overview_resampling="AVERAGE", **options)
            _compare(str(final), spec, written)
            if has_gaps(final):
                raise ResourceError("GDAL had trouble writing", out, "free space, then run again")
            with final.open("rb") as opened:
                os.fsync(opened.fileno())
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            result = {"sha256": digest, "size": final.stat().st_size}
            before(result)
            with _beside(target, kind.sidecar):
                durable.rename(final, out)
            return result


def _hidden(target: _Target) -> dict[str, Any]:
    return {"prefix": f".{target.out.name}.", "suffix": ".tmp", "dir": target.scratch}


@contextmanager
def _beside(target: _Target, content: bytes | None) -> Iterator[None]:
    """Write the sidecar first, so that a file with its final name always has it."""
    if content is None:
        yield
        return
    sidecar = target.out.with_name(f"{target.out.name}.aux.xml")
    # The caller syncs the same directory.
    durable.write(sidecar, content, sync_parent=False, scratch=target.scratch)
    try:
        yield
    except BaseException:
        sidecar.unlink(missing_ok=True)
        raise


def _fill(
    path: str,
    read: Read,
    spec: MaskSpec,
    profile: dict[str, Any],
    describe: Callable[[Any], None],
    levels: Mapping[Path, tuple[int, int]] | None = None,
) -> list[bytes]:
    """Write pixels and tags to a new file at `path`, and the coarser `levels` of a mask beside it.

    Returns the hash of each window.
    """
    place, written = spec.georeference, []
    with ignoring(NotGeoreferencedWarning):
        dst = rasterio.open(path, "w", **profile)
    with dst, ExitStack() as files:
        coarser = [files.enter_context(new_level(p, *size)) for p, size in (levels or {}).items()]
        describe(dst)
        dst.update_tags(TIFFTAG_SOFTWARE=f"tilenet {version('tilenet')}")
        if place.rpcs:
            dst.update_tags(ns="RPC", **dict(place.rpcs))
        if place.mpp is not None and not place.is_georeferenced:
            dst.update_tags(
                TIFFTAG_XRESOLUTION=repr(10_000 / place.mpp[1]),
                TIFFTAG_YRESOLUTION=repr(10_000 / place.mpp[0]),
                TIFFTAG_RESOLUTIONUNIT="3",  # pixels per centimetre
            )
        windows = windows_of(spec.height, spec.width, dst.count)
        # Of probabilities, a window of many channels is large: not two of them at a time.
        pieces = _ahead(partial(_piece, read, len(coarser)), windows, 2 if levels else 1)
        files.enter_context(closing(pieces))
        for window, (data, *halves) in pieces:
            written.append(hashlib.sha256(data).digest())
            dst.write(data if data.ndim == 3 else data[None], window=as_rasterio(window))
            for level, (file, half) in enumerate(zip(coarser, halves, strict=True), 1):
                put(file, half, window, level)
    return written


def _piece(read: Read, levels: int, window: Window) -> list[NDArray[np.uint8]]:
    """Return a window's pixels, and those of so many coarser levels."""
    piece = [np.ascontiguousarray(read(window))]
    for _ in range(levels):
        piece.append(halve(piece[-1]))
    return piece


def _ahead[T](
    make: Callable[[Window], T], windows: Iterable[Window], most: int
) -> Generator[tuple[Window, T]]:
    """Yield windows with what is made of them; so many are held, the one worked on among them."""
    coming: deque[tuple[Window, Future[T]]] = deque()
    with ThreadPoolExecutor(1, "tilenet-export") as pool:
        for window in windows:
            coming.append((window, pool.submit(make, window)))
            if len(coming) >= most:
                before, made = coming.popleft()
                yield before, made.result()
        for window, made in coming:
            yield window, made.result()


def _compare(path: str, spec: MaskSpec, written: list[bytes]) -> None:
    """Read the file back: every pixel equal, every overview readable, the place kept."""
    with ignoring(NotGeoreferencedWarning):
        src = rasterio.open(path)
    with src:
        levels = len(src.overviews(1))
        _compare_place(src, spec.georeference)
        places = windows_of(src.height, src.width, src.count)
        windows = list(zip(places, written, strict=True))
        # A window of many channels is large here too.
        readers = min(len(windows), _READERS if src.count == 1 else 1)
    with ThreadPoolExecutor(readers, "tilenet-compare") as pool:
        parts = (windows[k::readers] for k in range(readers))
        list(pool.map(partial(_compare_windows, path), parts))
    for level in range(levels):
        with ignoring(NotGeoreferencedWarning):
            overview = rasterio.open(path, overview_level=level)
        with overview:
            for _, window in overview.block_windows(1):
                overview.read(window=window)


def _compare_windows(path: str, windows: list[tuple[Window, bytes]]) -> None:
    """Raise OutputError unless windows of a file have the hashes that they should."""
    with rasterio.Env(**_GDAL):
        with ignoring(NotGeoreferencedWarning):
            src = rasterio.open(path)
        with src:
            for window, digest in windows:
                if hashlib.sha256(src.read(window=as_rasterio(window))).digest() != digest:
                    what = "the GeoTIFF does not read back as the mask"
                    raise OutputError(what, path, "try again")


def _compare_place(src: Any, place: Georeference) -> None:
    transform = None if src.transform.is_identity else tuple(src.transform)[:6]
    points = tuple((p.row, p.col, p.x, p.y, p.z) for p in src.gcps[0])
    wrong = [
        name
        for name, kept in (
            ("transform", place.transform is None or transform == place.transform),
            ("CRS", place.crs_wkt is None or src.crs == CRS.from_wkt(place.crs_wkt)),
            ("GCPs", place.transform is not None or points == place.gcps),
            ("RPCs", not place.rpcs or bool(src.tags(ns="RPC"))),
        )
        if not kept
    ]
    if wrong:
        raise OutputError(f"GeoTIFF cannot hold the {', '.join(wrong)}", "", "export to .zarr")


def _place(place: Georeference) -> dict[str, Any]:
    """Return the place as `rasterio.open` takes it; a TIFF holds an affine or points, not both."""
    if place.transform is None and place.gcps:
        points = [GroundControlPoint(*point) for point in place.gcps]
        return {"gcps": points, "crs": place.gcp_crs_wkt or CRS()}
    profile: dict[str, Any] = {}
    if place.transform is not None:
        profile["transform"] = Affine(*place.transform)
    if place.crs_wkt is not None:
        profile["crs"] = place.crs_wkt
    return profile


@contextmanager
def _failures(target: _Target) -> Iterator[None]:
    """Turn whatever GDAL or the system raises into our errors, naming the output."""
    out = target.out
    try:
        yield
    except OutputError as err:
        raise _blame_disk(target) or OutputError(err.what, out, err.do) from err
    except TilenetError:
        raise
    except MemoryError as err:
        raise ResourceError("out of memory", out, "run again with less beside it") from err
    except OSError as err:
        raise _system_error(err, target) from err
    except Exception as err:
        # The COG driver's errors are neither RasterioError nor OSError.
        raise _blame_disk(target) or ResourceError(f"GDAL failed: {err}", out, _RESUMES) from err


def _system_error(err: OSError, target: _Target) -> TilenetError:
    if err.errno in _PATH:
        return OutputError(f"cannot write: {err}", target.out, "check the folder")
    if err.errno == errno.ENOSPC:
        return ResourceError(DISK_FULL, target.out, "free space, then run it again")
    what = f"cannot write: {err.strerror or err}"  # GDAL's own errors have no number
    return _blame_disk(target) or ResourceError(what, target.out, _RESUMES)


def _blame_disk(target: _Target) -> ResourceError | None:
    """Return the error if the disk is full: GDAL's own message often does not say so.

    GDAL removes the file that did not fit, so the disk counts as full while another one of the size
    of what is already there would not fit.
    """
    try:
        hidden = f".{glob.escape(target.out.name)}.*/*"
        made = sum(path.stat().st_size for path in target.scratch.glob(hidden))
        free = shutil.disk_usage(target.scratch).free
    except OSError:
        return None
    if free > made + _SPARE_BYTES:
        return None
    return ResourceError(DISK_FULL, target.out, "free space, then run it again")
