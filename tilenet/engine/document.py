"""What a mask keeps of its plan: identity, recipe, figures, and the hash of all that."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tilenet
from tilenet.engine.journal import UNREADABLE, BlockRecord, Invalid, as_plain
from tilenet.engine.plan import Plan
from tilenet.engine.recipe import recipe_of
from tilenet.errors import InputError, without_secrets
from tilenet.geometry import Window
from tilenet.strangers import parse_json

__all__ = [
    "Finished",
    "decode_sidecar",
    "encode_document",
    "encode_sidecar",
    "file_document",
    "finished_of",
    "plan_document",
    "probabilities_of",
    "read_sidecar",
    "sidecar",
]

_SIDECAR = ".tilenet.json"
_OWN_KEYS = {"check", "copy"}
_COPY, _BETWEEN = b'{"copy": "', b'",\n'


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished mask says of itself.

    Parameters
    ----------
    pixels : dict of int to int
        Pixels of each class and of 255.
    tiles, tiles_skipped, blocks : int
        Of the whole raster.
    invalid : tuple of Invalid
        What failed.
    """

    pixels: dict[int, int]
    tiles: int
    tiles_skipped: int
    blocks: int
    invalid: tuple[Invalid, ...] = ()

    def check(self, plan: Plan) -> None:
        """Raise InputError if the source gave no pixel, or not all of them and that is required.

        A mask is made of whatever could be read; of nothing, there is none.
        """
        unread = [one for one in self.invalid if one.why == UNREADABLE]
        lost = sum(one.height * one.width for one in unread)
        if not unread or (lost < plan.raster.height * plan.raster.width and not plan.strict):
            return
        first = unread[0]
        where = Window(first.row, first.col, first.height, first.width)
        raise InputError(
            f"{lost} pixels cannot be read, the first at {where}", plan.raster.path,
            "check the file" + ("; without --strict they get no answer" if plan.strict else ""),
        )  # fmt: skip


def finished_of(document: Mapping[str, Any]) -> Finished:
    """Return the figures that `plan_document` wrote."""
    return Finished(
        {int(k): v for k, v in document["pixels"].items()},
        document["tiles"],
        document["tiles_skipped"],
        document["blocks"],
        tuple(Invalid(**one) for one in document["invalid"]),
    )


def sidecar(out: Path) -> Path:
    """Return the file that says which run made a one-file mask."""
    return out.with_name(out.name + _SIDECAR)


def probabilities_of(out: Path) -> Path:
    """Return where the probabilities of a one-file mask lie."""
    return out.with_name(f"{out.stem}.prob.tif")


def plan_document(plan: Plan, done: Finished | None = None) -> dict[str, Any]:
    """Return what a mask keeps of its plan: identity, recipe and figures, no times."""
    document: dict[str, Any] = {
        "tilenet": tilenet.__version__,
        "plan_hash": plan.hash,
        "identity": plan.identity(),
        "model": plan.model.card.name,
        "input": Path(without_secrets(plan.raster.path)).name,
        "recipe": recipe_of(plan),
        "spec": plan.spec.as_dict(),
    }
    if done is not None:
        document |= {
            "pixels": {str(k): v for k, v in sorted(done.pixels.items())},
            "tiles": done.tiles,
            "tiles_skipped": done.tiles_skipped,
            "blocks": done.blocks,
            "invalid": [asdict(one) for one in done.invalid],
        }
    return document


def file_document(document: Mapping[str, Any], records: Iterable[BlockRecord]) -> dict[str, Any]:
    """Return a plan document with what a one-file mask keeps of its journal."""
    journal = [{**as_plain(record), "files": []} for record in records if record.block >= 0]
    return {**document, "journal": journal}


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON, the same bytes for the same content."""
    return json.dumps(document, sort_keys=True).encode()


def encode_sidecar(document: Mapping[str, Any]) -> bytes:
    """Return what lies beside a one-file mask: a document, and before it a packed copy.

    All of it is one JSON object, and each half says by a hash whether it is whole: what damages one
    leaves the other.
    """
    rest = {key: value for key, value in document.items() if key not in _OWN_KEYS}
    # Keys are sorted, and each value is encoded once, though the text is needed with the hash too.
    before = encode_document({key: value for key, value in rest.items() if key < "check"})
    behind = encode_document({key: value for key, value in rest.items() if key > "check"})
    check = {"check": hashlib.sha256(_joined(before, behind)).hexdigest()}
    whole = _joined(before, encode_document(check), behind)
    return _COPY + base64.b64encode(zlib.compress(whole)) + _BETWEEN + whole[1:]


def _joined(*documents: bytes) -> bytes:
    """Return several documents as `encode_document` would one of all their keys, in this order."""
    return b"{" + b", ".join(one[1:-1] for one in documents if one != b"{}") + b"}"


def decode_sidecar(data: bytes) -> dict[str, Any] | None:
    """Return the document that `encode_sidecar` wrote, from either half; None if both are lost."""
    packed = re.match(_COPY + rb"([A-Za-z0-9+/=]+)", data)
    halves = [b"{" + data.partition(_BETWEEN)[2]]
    with suppress(ValueError, zlib.error):
        halves.append(zlib.decompress(base64.b64decode(packed[1])) if packed else b"")
    for half in halves:
        with suppress(ValueError, TypeError, KeyError):
            found = parse_json(half)
            check = found.pop("check")
            if hashlib.sha256(encode_document(found)).hexdigest() == check:
                return dict(found)
    return None


def read_sidecar(out: Path) -> dict[str, Any] | None:
    """Return what lies beside a one-file mask, None if that is nothing of ours."""
    try:
        return decode_sidecar(sidecar(out).read_bytes())
    except OSError:
        return None
