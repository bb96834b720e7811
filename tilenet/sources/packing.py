"""Bytes as text that fits into a plan."""

from __future__ import annotations

import base64
import zlib

__all__ = ["pack", "unpack"]


def pack(content: bytes) -> str:
    """Return bytes, compressed, as text."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpack(text: str) -> bytes:
    """Return the bytes that `pack` took."""
    return zlib.decompress(base64.b64decode(text))
