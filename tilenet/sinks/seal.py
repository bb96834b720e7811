"""The seal of a finished store: the hash of every file that is no chunk of pixels, and its own.

The journal holds the hashes of the chunks; the seal holds those of the rest (metadata, coordinates,
the journal itself) and a second copy of plan and journal, so that no single damaged file takes away
what is needed to find and repair it. It is stored as it is, so that each of its bits counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SEAL", "Seal"]

SEAL = "seal"
"""Name of its array, beside plan and journal."""

_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Seal:
    """What a seal says.

    Parameters
    ----------
    files : mapping of str to str
        sha256 by path relative to the store's root.
    documents : mapping of str to bytes
        Plan and journal.
    """

    files: Mapping[str, str]
    documents: Mapping[str, bytes]

    def encode(self) -> bytes:
        """Return the seal's bytes; as many for any hashes of the same files."""
        texts = {name: data.decode() for name, data in self.documents.items()}
        body = json.dumps({"files": dict(self.files), "documents": texts}, sort_keys=True).encode()
        return body + hashlib.sha256(body).hexdigest().encode()

    @classmethod
    def decode(cls, data: bytes) -> Seal | None:
        """Return the seal that `encode` wrote, None if it is damaged."""
        body, digest = data[:-_DIGITS], data[-_DIGITS:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        found = json.loads(body)
        return cls(found["files"], {k: text.encode() for k, text in found["documents"].items()})

    @classmethod
    def blank(cls, paths: list[str], documents: Mapping[str, bytes]) -> Seal:
        """Return a seal of the size that these files will need."""
        return cls(dict.fromkeys(sorted(paths), "0" * _DIGITS), documents)
