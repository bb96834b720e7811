"""The part of a mask's store that zarr writes: groups, array metadata, coordinates, documents.

zarr writes it into memory, because its store on disk takes a thread for every small file and syncs
none; what comes out is a dictionary of files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from tilenet.geometry import Georeference
from tilenet.quiet import ignoring
from tilenet.sinks.metadata import (
    array_attributes,
    coordinate_attributes,
    has_coordinates,
    root_attributes,
    spatial_ref_attributes,
)
from tilenet.sinks.seal import SEAL, Seal
from tilenet.sinks.spec import ArrayLayout, MaskSpec, ZarrFormat

__all__ = ["complete", "encode", "seal_path", "skeleton"]

Files = Mapping[str, bytes]
"""Contents by path relative to a store's root."""

# Measured on synthetic 1024² masks of 2 to 4 classes: zstd 1 and 2 are as fast as 3 (0.5 to 2.4 ms)
# and, but for the finest mask, smaller; zlib 2 takes 2 to 15 % longer than 1 and saves 2 to 10 %.
_ZSTD_LEVEL = 1
_ZLIB_LEVEL = 2


def _files(memory: dict[str, Buffer]) -> Files:
    return {path: memory[path].to_bytes() for path in sorted(memory)}


@lru_cache(maxsize=8)  # a folder of small images of one size has one
def skeleton(spec: MaskSpec) -> Files:
    """Return the files of every group and array of an empty mask."""
    layouts, memory = spec.layouts, dict[str, Buffer]()
    top = zarr.create_group(
        MemoryStore(memory), zarr_format=spec.zarr_format, attributes=root_attributes(spec)
    )
    for path, factor, height, width in spec.levels:
        folder, _, name = path.rpartition("/")
        group = top.create_group(folder) if folder else top
        _pixels(spec, group, name, layouts[path], factor)
        if name == "mask":  # else it lies beside another level, which has them
            _coordinates(spec, group, spec.georeference.scaled(factor, factor), height, width)
    if spec.channels:
        _pixels(spec, top, "prob", layouts["prob"], 1)
        planes = np.arange(len(spec.channels))
        names = {"long_name": "probability plane", "names": list(spec.channels)}
        _small(spec, top, "class", planes, ("class",), names)
    return _files(memory)


def complete(spec: MaskSpec, pixels: Mapping[int, int], documents: Files) -> Files:
    """Return the files of a finished mask, but for the chunks of its pixels.

    Parameters
    ----------
    spec : MaskSpec
        The mask.
    pixels : mapping of int to int
        Pixels of each class id at full resolution.
    documents : mapping of str to bytes
        Kept as arrays `tilenet/<name>`, because readers warn about loose files.
    """
    files, place = dict(_frame(spec, tuple(sorted(documents)))), seal_path(spec.zarr_format)
    for name, data in documents.items():
        chunk = _chunk_path(spec.zarr_format, name)
        if data:
            files[chunk] = encode(spec, np.frombuffer(data, np.uint8))
        else:
            del files[chunk]  # an empty array has none
    sealed = [path for path in files if path != place]
    size = len(Seal.blank(sealed, documents).encode())
    sizes = {SEAL: size, **{name: len(data) for name, data in documents.items()}}
    resize = _resize_v2 if spec.zarr_format == 2 else _resize_v3
    resize(files, root_attributes(spec, pixels=pixels, complete=True), sizes)
    hashes = {path: hashlib.sha256(files[path]).hexdigest() for path in sealed}
    files[place] = Seal(hashes, documents).encode()
    assert len(files[place]) == size, "the seal keeps its size"
    return files


@lru_cache(maxsize=8)
def _frame(spec: MaskSpec, names: tuple[str, ...]) -> Files:
    """Return the files of a finished mask as zarr writes them, each document a byte long."""
    buffer = default_buffer_prototype().buffer
    memory: dict[str, Buffer] = {k: buffer.from_bytes(v) for k, v in skeleton(spec).items()}
    store = MemoryStore(memory)
    root = zarr.open_group(store, mode="r+", zarr_format=spec.zarr_format, use_consolidated=False)
    folder, byte = root.create_group("tilenet"), np.ones(1, np.uint8)
    for name in names:
        _small(spec, folder, name, byte, ("byte",), {})
    _small(spec, folder, SEAL, byte, ("byte",), {}, compressed=False)
    # True of format 3, and harmless: readers that do not know it read the single files.
    with ignoring(ZarrUserWarning, "Consolidated metadata"):
        zarr.consolidate_metadata(store, zarr_format=spec.zarr_format)
    return _files(memory)


def _resize_v3(files: dict[str, bytes], attributes: Any, sizes: Mapping[str, int]) -> None:
    """Give the root its attributes and the documents their sizes, in both places that say them."""
    root = json.loads(files["zarr.json"])
    root["attributes"] = attributes
    for name, size in sizes.items():
        array = json.loads(files[f"tilenet/{name}/zarr.json"])
        for said in (array, root["consolidated_metadata"]["metadata"][f"tilenet/{name}"]):
            said["shape"] = [size]
            said["chunk_grid"]["configuration"]["chunk_shape"] = [max(1, size)]
        files[f"tilenet/{name}/zarr.json"] = json.dumps(array).encode()
    files["zarr.json"] = json.dumps(root).encode()


def _resize_v2(files: dict[str, bytes], attributes: Any, sizes: Mapping[str, int]) -> None:
    """Do the same for format 2."""
    whole = json.loads(files[".zmetadata"])
    whole["metadata"][".zattrs"] = attributes
    files[".zattrs"] = json.dumps(attributes).encode()
    for name, size in sizes.items():
        array = json.loads(files[f"tilenet/{name}/.zarray"])
        for said in (array, whole["metadata"][f"tilenet/{name}/.zarray"]):
            said["shape"], said["chunks"] = [size], [max(1, size)]
        files[f"tilenet/{name}/.zarray"] = json.dumps(array).encode()
    files[".zmetadata"] = json.dumps(whole).encode()


def seal_path(zarr_format: ZarrFormat) -> str:
    """Return where a store's seal lies."""
    return _chunk_path(zarr_format, SEAL)


def _chunk_path(zarr_format: ZarrFormat, name: str) -> str:
    return f"tilenet/{name}/0" if zarr_format == 2 else f"tilenet/{name}/c/0"


def _pixels(spec: MaskSpec, group: zarr.Group, name: str, layout: ArrayLayout, factor: int) -> None:
    group.create_array(
        name,
        shape=layout.shape,
        chunks=layout.chunks,
        dtype="uint8",
        fill_value=spec.stated_fill(layout),
        attributes=array_attributes(spec, layout, factor),
        **_storage(spec, layout.dimensions),
    )


def _coordinates(
    spec: MaskSpec, group: zarr.Group, place: Georeference, height: int, width: int
) -> None:
    attributes = spatial_ref_attributes(place)
    if attributes is not None:
        _small(spec, group, "spatial_ref", np.zeros((), np.int64), (), attributes)
    if not has_coordinates(place):
        return
    if place.transform is not None:
        a, _, c, _, e, f = place.transform
    else:
        assert place.mpp is not None, "coordinates come from an affine or from mpp"
        (e, a), c, f = place.mpp, 0.0, 0.0
    described = coordinate_attributes(place)
    _small(spec, group, "x", c + a * (np.arange(width) + 0.5), ("x",), described["x"])
    _small(spec, group, "y", f + e * (np.arange(height) + 0.5), ("y",), described["y"])


def _small(
    spec: MaskSpec,
    group: zarr.Group,
    name: str,
    values: NDArray[Any],
    dimensions: tuple[str, ...],
    attributes: dict[str, Any],
    *,
    compressed: bool = True,
) -> None:
    """Write a small array in one chunk, fill values included."""
    v2 = spec.zarr_format == 2
    named = {"_ARRAY_DIMENSIONS": list(dimensions), **attributes} if v2 else attributes
    missing = np.nan if values.dtype.kind == "f" else None if v2 else 0
    created = group.create_array(
        name,
        shape=values.shape,
        chunks=tuple(max(1, n) for n in values.shape),
        dtype=values.dtype,
        fill_value=missing,
        attributes=named,
        config={"write_empty_chunks": True},
        **{**_storage(spec, dimensions), **({} if compressed else {"compressors": None})},
    )
    created[...] = values


def _storage(spec: MaskSpec, dimensions: tuple[str, ...]) -> dict[str, Any]:
    """Return compressor, chunk names and axis names as `create_array` takes them."""
    if spec.zarr_format == 2:
        return {
            "compressors": numcodecs.Zlib(level=_ZLIB_LEVEL),
            "filters": None,
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
    return {
        "compressors": ZstdCodec(level=_ZSTD_LEVEL, checksum=True),
        "filters": None,
        "dimension_names": dimensions,
    }


def encode(spec: MaskSpec, chunk: NDArray[np.uint8]) -> bytes:
    """Return one whole, contiguous chunk as the codec that the metadata names stores it."""
    # A codec holds no state worth sharing between threads; making one costs nothing.
    codec = (
        numcodecs.Zlib(level=_ZLIB_LEVEL)
        if spec.zarr_format == 2
        else numcodecs.Zstd(level=_ZSTD_LEVEL, checksum=True)
    )
    return bytes(codec.encode(chunk))
