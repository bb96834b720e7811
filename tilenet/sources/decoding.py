"""Arrays of a Zarr store, decoded by zarr from metadata that was checked before."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import StorePath

from tilenet.errors import InputError, ResourceError
from tilenet.sources.nodes import Keys, Node, Range
from tilenet.sources.unpacking import COMPRESSORS, Unpacker, unpacker_v2

__all__ = ["open_array"]

_PLAIN = {"bytes", "endian", "transpose", "crc32c"}
"""Codecs of format 3 that make nothing larger and run nothing."""
_FILTERS = {"delta", "shuffle"}
_SLACK = 1 << 20


class _Chunks(Store):
    """The chunks of a store, for reading.

    Parameters
    ----------
    keys : Keys
        The store.
    most : int
        Bytes that one key may hold.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, keys: Keys, most: int) -> None:
        super().__init__(read_only=True)
        self._keys, self._most = keys, most

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def _get(self, key: str, prototype: BufferPrototype, part: Range | None) -> Buffer | None:
        try:
            data = self._keys.get(key, self._most, part)
        except OSError as error:
            if error.errno is None or isinstance(error, PermissionError):
                raise
            # The disk's fault, or the network's: the pixels are there.
            raise ResourceError(
                f"cannot be read: {error}", self._keys.name, "a rerun resumes"
            ) from error
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        part: Range | None = None
        if isinstance(byte_range, RangeByteRequest):
            part = (byte_range.start, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            part = (byte_range.offset, None)
        elif isinstance(byte_range, SuffixByteRequest):
            part = (-byte_range.suffix, None)
        return await asyncio.to_thread(self._get, key, prototype, part)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._keys.get, key, self._most) is not None

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError


def open_array(keys: Keys, node: Node) -> Any:
    """Return an array of a store, which is indexed as numpy's are.

    Parameters
    ----------
    keys : Keys
        The store.
    node : Node
        One that was checked.

    Raises
    ------
    InputError
        It is stored by a codec that is not known, or its metadata is no array's.
    """
    size = np.dtype(node.dtype).itemsize
    describe = _version2 if node.zarr_format == 2 else _version3
    document: Any = describe(node, keys.name, size)
    most = math.prod(node.stored_chunks) * size
    chunks = _Chunks(keys, most + most // 8 + _SLACK)
    try:
        array: Any = zarr.Array(zarr.AsyncArray(document, StorePath(chunks, node.path)))
    except Exception as error:  # whatever strange metadata raise inside
        raise InputError(f"cannot be opened: {error}", keys.name, "check the store") from error
    return array


def _unknown(name: object, store: str) -> InputError:
    return InputError(
        f"stored by the codec {name}", store,
        "rewrite it with zstd, gzip, zlib, blosc, lz4 or bz2",
    )  # fmt: skip


def _version2(node: Node, store: str, size: int) -> dict[str, Any]:
    said, most = node.document, math.prod(node.chunks) * size
    document = {
        key: said.get(key) for key in ("zarr_format", "shape", "chunks", "dtype", "fill_value")
    }
    document["order"] = "F" if said.get("order") == "F" else "C"
    document["dimension_separator"] = "/" if said.get("dimension_separator") == "/" else "."
    compressor = said.get("compressor")
    kind = compressor.get("id") if isinstance(compressor, dict) else compressor
    if kind is not None and kind not in COMPRESSORS:
        raise _unknown(kind, store)
    document["compressor"] = None if kind is None else unpacker_v2(kind, most)
    document["filters"] = [_filter(one, store) for one in said.get("filters") or ()] or None
    return document


def _filter(said: Any, store: str) -> dict[str, Any]:
    """Return a filter of format 2; what it makes of bytes must be numbers."""
    kind = said.get("id") if isinstance(said, dict) else said
    numbers = isinstance(said, dict) and all(
        re.fullmatch(r"[<>|=][uif][1248]", str(said[key])) for key in ("dtype", "astype")
        if said.get(key) is not None
    )  # fmt: skip
    if kind not in _FILTERS or not numbers:
        raise _unknown(kind, store)
    return dict(said)


def _version3(node: Node, store: str, size: int) -> dict[str, Any]:
    said, most = node.document, math.prod(node.chunks) * size
    keys = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding",
            "fill_value")  # fmt: skip
    document = {key: said.get(key) for key in keys}
    document["codecs"] = _codecs(said.get("codecs"), store, most)
    return document


def _codecs(said: Any, store: str, most: int) -> list[Any]:
    """Return codecs of format 3, with compressors that are our own."""
    found: list[Any] = []
    for one in said if isinstance(said, list) else ():
        name = one.get("name") if isinstance(one, dict) else one
        kind = name.removeprefix("numcodecs.") if isinstance(name, str) else ""
        settings = one.get("configuration") if isinstance(one, Mapping) else None
        if kind in COMPRESSORS:
            found.append(Unpacker(kind, most))
        elif kind == "sharding_indexed" and isinstance(settings, dict) and len(said) == 1:
            inner = {key: settings[key] for key in ("chunk_shape", "index_location")
                     if key in settings}  # fmt: skip
            for key in ("codecs", "index_codecs"):
                if key in settings:
                    inner[key] = _codecs(settings[key], store, most)
            found.append({"name": name, "configuration": inner})
        elif kind in _PLAIN:
            found.append(one)
        else:
            raise _unknown(name, store)
    return found
