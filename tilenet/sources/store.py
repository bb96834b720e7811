"""Zarr stores as rasters: OME-Zarr, GeoZarr, xarray's, and bare arrays."""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError, TilenetError
from tilenet.geometry import Window
from tilenet.sources.bands import bands_in_use
from tilenet.sources.bucket import Bucket
from tilenet.sources.decoding import open_array
from tilenet.sources.folder import SUFFIXES
from tilenet.sources.nodes import MAX_DOCUMENT, METADATA, Folder, Keys, Node, read_node
from tilenet.sources.picture import Picture, find_picture
from tilenet.sources.placing import metres_of
from tilenet.sources.rasterinfo import Found, RasterInfo
from tilenet.sources.remote import RemoteName, is_remote
from tilenet.sources.stack import band_count, chosen_plane, plane_counts
from tilenet.sources.view import View

__all__ = ["StoreHandle", "find", "is_remote_store"]

_MAX_MARKS = 100_000
"""Chunks whose sizes and times count for the fingerprint."""


def open_keys(path: str) -> Keys:
    """Return the store at a path or URL; nothing is read yet."""
    return Bucket(RemoteName(path)) if is_remote(path) else Folder(path)


def is_remote_store(name: RemoteName) -> bool:
    """Return whether a Zarr store lies there; asks for its metadata unless the ending says no."""
    return name.suffix.lower() not in SUFFIXES and read_node(Bucket(name), "") is not None


def _sides(picture: Picture, sizes: tuple[int, ...]) -> tuple[int, int]:
    return sizes[picture.axes.index("y")], sizes[picture.axes.index("x")]


def find(path: str, view: View, *, checked: bool = True) -> Found:
    """Return what a store says of itself.

    Raises
    ------
    InputError
        It holds no picture that is read, or a variable, a plane or a band must be chosen.
    """
    try:
        return _find(path, view, checked=checked)
    except (TilenetError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever strange metadata raise inside
        raise InputError(
            f"its metadata cannot be read: {error}", path, "check the store"
        ) from error


def _find(path: str, view: View, *, checked: bool) -> Found:
    keys = open_keys(path)
    picture = find_picture(keys, view.variable)
    full = picture.levels[0]
    open_array(keys, full)  # says now what zarr would say later
    count = band_count(picture.axes, full.shape)
    every = tuple(range(1, count + 1))
    names = picture.names if len(picture.names) == count else ("",) * count
    bands = bands_in_use(view.bands, view.trained_bands, every, names, path)
    marked = picture.nodata is not None
    return Found(
        path=path,
        driver="zarr",
        bands=bands,
        count=count,
        names=names,
        stored_dtype=full.dtype,
        levels=tuple(_sides(picture, node.shape) for node in picture.levels),
        nodata=(picture.nodata,) * len(bands),
        validity="nodata" if marked else "all",
        georeference=picture.georeference,
        metres=metres_of(picture.georeference),
        native_block=partial(_native_block, picture),
        files=(path,),
        plane=chosen_plane(picture.axes, full.shape, view.plane, path, required=checked),
        planes=plane_counts(picture.axes, full.shape),
        notes=picture.notes,
        fingerprint=partial(_fingerprint, keys, picture),
    )


def _native_block(picture: Picture, level: int) -> tuple[int, int]:
    return _sides(picture, picture.levels[level].chunks)


def _fingerprint(keys: Keys, picture: Picture, level: int) -> str:
    """Return a hash of an array's metadata and of its chunks' names, sizes and times.

    Of more than 100,000 chunks, those that come first by name count, and, in a folder, the times of
    its folders.
    """
    array, digest = picture.levels[level], hashlib.sha256()
    for node in (picture.levels[0], array):
        _add_documents(keys, node, digest)
    for mark in keys.marks(array.path, _MAX_MARKS):
        digest.update(f"{mark}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _add_documents(keys: Keys, node: Node, digest: Any) -> None:
    """Add the documents of a node and of all groups around it."""
    parts = node.path.split("/") if node.path else []
    for depth in range(len(parts) + 1):
        for name in METADATA:
            key = "/".join((*parts[:depth], name))
            text = keys.get(key, MAX_DOCUMENT)
            digest.update(f"{key}\0".encode() + (text or b""))


class StoreHandle:
    """An open store at one level and plane.

    Parameters
    ----------
    info : RasterInfo
        What is read.
    """

    def __init__(self, info: RasterInfo) -> None:
        self._keys = open_keys(info.path)
        picture = find_picture(self._keys, info.view.variable)
        node = picture.levels[info.level]
        self._array, self._axes = open_array(self._keys, node), picture.axes
        self._dtype, self._plane = np.dtype(info.stored_dtype), dict(info.plane)
        together = node.chunks[picture.axes.index("c")] if "c" in picture.axes else 1
        self._runs = _runs(info.bands, together)

    def close(self) -> None:
        """Nothing is open between reads."""

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window, (C, h, w), in the machine's byte order."""
        pixels = np.concatenate([self._read(run, box) for run in self._runs])
        return pixels.astype(self._dtype, copy=False), None

    def _read(self, run: list[int], box: Window) -> NDArray[Any]:
        """Return some bands at one go: those that lie in the same chunks."""
        rows, cols = box.slices()
        first = min(run)
        where = {"y": rows, "x": cols, "c": slice(first, max(run) + 1), **self._plane}
        found = np.asarray(self._array[tuple(where[axis] for axis in self._axes)])
        kept = [axis for axis in self._axes if axis in "cyx"]
        if "c" not in kept:
            return found.transpose([kept.index(axis) for axis in "yx"])[None]
        return found.transpose([kept.index(axis) for axis in "cyx"])[[b - first for b in run]]


def _runs(bands: tuple[int, ...], together: int) -> list[list[int]]:
    """Return bands, counted from 0 and in their order, by the chunks they lie in."""
    return [list(run) for _, run in groupby((b - 1 for b in bands), lambda b: b // together)]
