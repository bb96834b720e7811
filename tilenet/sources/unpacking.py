"""Decompression of chunks from strangers: what would come out larger than a chunk is refused.

zarr's own codecs make whatever a few bytes claim to hold. Source of the formats' limits: RFC 8878
(Zstandard), the headers of Blosc 1 and of numcodecs' LZ4.
"""

from __future__ import annotations

import asyncio
import bz2
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numcodecs
from numcodecs.compat import ensure_bytes
from zarr.abc.codec import BytesBytesCodec
from zarr.core.buffer import Buffer

__all__ = ["COMPRESSORS", "Unpacker", "unpacker_v2"]

_ZSTD_MAGIC, _ZSTD_SKIPPABLE = 0xFD2FB528, 0x184D2A5
_ZSTD_BLOCK = 128 << 10  # the most that one block makes
_SLACK = 1 << 16  # checksums and the like beside the pixels


def _inflated(make: Callable[[], Any], data: bytes, most: int) -> bytes:
    """Decompress members one after another, with a decompressor that stops in time."""
    parts, left = list[bytes](), most
    while data:
        one = make()
        parts.append(one.decompress(data, left + 1))
        left -= len(parts[-1])
        if left < 0:
            raise ValueError("holds more than a chunk")
        if not one.eof:
            raise ValueError("is cut off")
        data = one.unused_data
    return b"".join(parts)


def _zlib(data: bytes, most: int) -> bytes:
    return _inflated(lambda: zlib.decompressobj(zlib.MAX_WBITS | 32), data, most)


def _bz2(data: bytes, most: int) -> bytes:
    return _inflated(bz2.BZ2Decompressor, data, most)


def _blosc(data: bytes, most: int) -> bytes:
    if len(data) < 16 or struct.unpack_from("<I", data, 4)[0] > most:
        raise ValueError("holds more than a chunk")
    if struct.unpack_from("<I", data, 12)[0] > len(data):
        raise ValueError("is cut off")  # Blosc would read on, beyond the end
    return bytes(numcodecs.Blosc().decode(data))


def _lz4(data: bytes, most: int) -> bytes:
    if len(data) < 4 or not 0 <= struct.unpack_from("<i", data)[0] <= most:
        raise ValueError("holds more than a chunk")
    return bytes(numcodecs.LZ4().decode(data))


def _zstd(data: bytes, most: int) -> bytes:
    place, held = 0, 0
    while place < len(data):
        place, size = _zstd_frame(data, place)
        held += size
    # Where a frame does not say what it holds, it is counted by its blocks, which may be small.
    if held > most + _ZSTD_BLOCK * 512:
        raise ValueError("holds more than a chunk")
    return bytes(numcodecs.Zstd().decode(data))


def _zstd_frame(data: bytes, place: int) -> tuple[int, int]:
    """Return where a frame ends, and how much it holds at the most."""
    (magic,) = struct.unpack_from("<I", data, place)
    if magic >> 4 == _ZSTD_SKIPPABLE:
        return place + 8 + struct.unpack_from("<I", data, place + 4)[0], 0
    if magic != _ZSTD_MAGIC:
        raise ValueError("is no Zstandard frame")
    descriptor = data[place + 4]
    single, sized = bool(descriptor & 32), descriptor >> 6
    place += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[sized]
    said = int.from_bytes(data[place : place + width], "little") + (256 if width == 2 else 0)
    place, counted, last = place + width, 0, False
    while not last:
        header = int.from_bytes(data[place : place + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if place + 3 > len(data):
            raise ValueError("is cut off")
        place += 3 + (1 if kind == 1 else size)
        counted += _ZSTD_BLOCK if kind == 2 else size
    return place + (4 if descriptor & 4 else 0), max(said, counted if not width else 0)


_KINDS: dict[str, Callable[[bytes, int], bytes]] = {
    "zlib": _zlib, "gzip": _zlib, "bz2": _bz2, "blosc": _blosc, "lz4": _lz4, "zstd": _zstd,
}  # fmt: skip

COMPRESSORS = frozenset(_KINDS)
"""Names of the compressors that are taken apart."""


@dataclass(frozen=True)
class Unpacker(BytesBytesCodec):
    """A compressor of zarr's for reading only, which keeps to a chunk's size.

    Parameters
    ----------
    kind : str
        One of `COMPRESSORS`.
    most : int
        Bytes of a chunk.
    """

    kind: str = "zlib"
    most: int = 0

    is_fixed_size = False

    def unpack(self, data: Any) -> bytes:
        """Return the bytes; ValueError or RuntimeError if they are damaged or too many."""
        return _KINDS[self.kind](ensure_bytes(data), self.most + _SLACK)

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: Any) -> Buffer:
        data = self.unpack(chunk_data.as_array_like())
        found: Buffer = chunk_spec.prototype.buffer.from_bytes(data)
        return found

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: Any) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not known beforehand."""
        raise NotImplementedError


class _Version2:
    """The same, as format 2 takes it."""

    codec_id = "tilenet"

    def __init__(self, unpacker: Unpacker) -> None:
        self._unpacker = unpacker

    def decode(self, buf: Any, out: Any = None) -> bytes:
        del out
        return self._unpacker.unpack(buf)

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id}

    @classmethod
    def from_config(cls, config: Any) -> _Version2:
        raise NotImplementedError


def unpacker_v2(kind: str, most: int) -> Any:
    """Return an `Unpacker` as the compressor of an array of format 2."""
    return _Version2(Unpacker(kind, most))
