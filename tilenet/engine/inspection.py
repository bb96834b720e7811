"""Whether a finished mask is what its run wrote: every file by its hash, named by its block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window as RasterWindow

from tilenet.engine.document import (
    decode_sidecar,
    encode_document,
    encode_sidecar,
    probabilities_of,
    sidecar,
)
from tilenet.engine.journal import BlockRecord, decode, encode, from_plain
from tilenet.engine.recipe import lattice_of
from tilenet.errors import InputError, TilenetError, VerifyError
from tilenet.geometry import Window
from tilenet.quiet import ignoring
from tilenet.sinks import MaskSpec, Seal, complete, documents, seal_path
from tilenet.sinks.pam import class_table
from tilenet.sources.gdal import environment

__all__ = ["Bad", "Inspection", "compare", "inspect"]

Files = dict[str, str | None]
"""sha256 by path; None for a chunk of fill values, which has no file."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A file that is not what the run wrote.

    Parameters
    ----------
    file : str
        Its path, relative to a store's root.
    what : str
        "damaged", "missing" or "foreign".
    block : int or None
        Whose pixels it holds; −1 for those of the upper pyramid levels, which no block makes alone.
    """

    file: str
    what: str
    block: int | None = None

    @property
    def place(self) -> str:
        """The block, or the upper level, in words; empty for a file without pixels."""
        if self.block is None:
            return ""
        return f"block {self.block}" if self.block >= 0 else f"level {self.file.partition('/')[0]}"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of `tilenet verify`: what belongs to no block has null for it."""
        block = None if self.block is None or self.block < 0 else self.block
        return {"file": self.file, "what": self.what, "block": block}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a mask.

    Parameters
    ----------
    path : Path
        The mask.
    document : dict
        What it keeps of its plan.
    records : list of BlockRecord
        Its journal.
    files, blocks : int
        How many were looked at.
    bad : list of Bad
        What is not as it was written.
    sealed : dict or None
        Hashes of a store's files that are no chunks of pixels; None if its seal is damaged.
    """

    path: Path
    document: dict[str, Any]
    records: list[BlockRecord]
    files: int
    blocks: int
    bad: list[Bad] = field(default_factory=list)
    sealed: Files | None = None

    @property
    def spec(self) -> MaskSpec:
        """What the mask looks like on disk."""
        return MaskSpec.from_dict(self.document["spec"])

    def metadata(self) -> Mapping[str, bytes]:
        """Return the files of a store that are no chunks of pixels, as the run wrote them."""
        pixels = {int(k): v for k, v in self.document["pixels"].items()}
        return complete(self.spec, pixels, kept_documents(self.document, self.records))


def kept_documents(document: dict[str, Any], records: list[BlockRecord]) -> dict[str, bytes]:
    """Return plan and journal as a store keeps them."""
    return {
        "plan": encode_document(document),
        "journal": b"".join(encode(record) for record in records),
    }


def inspect(path: Path) -> Inspection:
    """Look at every file of a mask.

    Parameters
    ----------
    path : Path
        A store, or a file with its document beside it.

    Raises
    ------
    InputError
        Nothing there, or no mask of ours.
    VerifyError
        So much is damaged that nothing can be compared.
    """
    if path.is_symlink():
        raise InputError("a link is no mask", path, "name what it points to")
    if not path.exists() and not sidecar(path).exists():  # a file may be lost, and made again
        raise InputError("no such mask", path, "check the path")
    return _inspect_store(path) if path.is_dir() else _inspect_file(path)


def _lost(path: Path, what: str) -> VerifyError:
    return VerifyError(what, path, "make the mask again: move it away, and run predict")


def _documents(root: Path) -> tuple[dict[str, bytes], Files | None]:
    """Return plan and journal, and what the seal says, None if it is no help."""
    for zarr_format in (3, 2):
        try:
            seal = Seal.decode((root / seal_path(zarr_format)).read_bytes())
        except FileNotFoundError:
            continue
        if seal is not None:
            own = hashlib.sha256(seal.encode()).hexdigest()
            return dict(seal.documents), {**seal.files, seal_path(zarr_format): own}
    try:
        kept = documents(root)
        json.loads(kept["plan"])
    except InputError:
        raise
    except (TilenetError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _lost(root, "the seal and the plan are damaged") from error
    return kept, None


def _inspect_store(root: Path) -> Inspection:
    kept, sealed = _documents(root)
    return compare(root, kept, sealed, _hashes(root))


def compare(
    root: Path,
    kept: Mapping[str, bytes],
    sealed: Files | None,
    hashes: Iterable[tuple[str, str | None]],
) -> Inspection:
    """Compare the files of a store with what its run wrote.

    Parameters
    ----------
    root : Path
        The store.
    kept : mapping of str to bytes
        Its plan and journal.
    sealed : dict or None
        Files that are no chunks of pixels, by its seal; None if that is damaged.
    hashes : iterable of (str, str or None)
        Every file with its hash; None for what is no plain file.

    Raises
    ------
    VerifyError
        So much is damaged that nothing can be compared.
    """
    document, records = json.loads(kept["plan"]), decode(kept["journal"])[0]
    blocks = sum(record.block >= 0 for record in records)
    if blocks != document["blocks"]:
        raise _lost(root, "the journal and its copy are damaged")
    found = Inspection(root, document, records, 0, blocks)
    if sealed is None:
        metadata = found.metadata()
        others: Files = {n: hashlib.sha256(data).hexdigest() for n, data in metadata.items()}
    else:
        others = sealed
    chunks = {path: digest for record in records for path, digest, _ in record.files}
    owners = {path: record.block for record in records for path, *_ in record.files}
    expected = {**chunks, **others}
    missing = {path for path, digest in expected.items() if digest is not None}
    files = 0
    for name, digest in hashes:
        files += 1
        missing.discard(name)
        if expected.get(name) != digest or digest is None:
            what = "damaged" if expected.get(name) else "foreign"
            found.bad.append(Bad(name, what, owners.get(name)))
    found.bad.extend(Bad(name, "missing", owners.get(name)) for name in sorted(missing))
    return Inspection(root, document, records, files, blocks, found.bad, sealed)


def _hashes(root: Path) -> Iterator[tuple[str, str | None]]:
    """Yield every file below `root` with its hash; None for what is no plain file of ours."""
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        folders.sort()
        for name in sorted(files + links):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() or not path.is_file():
                yield relative, None
                continue
            with path.open("rb") as file:
                yield relative, hashlib.file_digest(file, "sha256").hexdigest()


def _inspect_file(path: Path) -> Inspection:
    try:
        text = sidecar(path).read_bytes()
    except OSError as error:
        raise InputError(
            "no mask of tilenet's: its .tilenet.json is missing", path, "name a mask"
        ) from error
    document = decode_sidecar(text)
    if document is None:
        raise _lost(sidecar(path), "the document beside the mask is damaged")
    bad = [] if encode_sidecar(document) == text else [Bad(sidecar(path).name, "damaged")]
    records = [from_plain(record) for record in document["journal"]]
    expected = {path: (document["sha256"], document["size"])}
    if "probabilities" in document:
        kept = document["probabilities"]
        expected[probabilities_of(path)] = (kept["sha256"], kept["size"])
    if document["identity"]["format"] == "cog":
        table = class_table(MaskSpec.from_dict(document["spec"]).classes)
        beside = path.with_name(f"{path.name}.aux.xml")
        expected[beside] = (hashlib.sha256(table).hexdigest(), len(table))
    for file, (digest, size) in expected.items():
        if not file.is_file():
            bad.append(Bad(file.name, "missing"))
        elif file.stat().st_size != size or _digest(file) != digest:
            bad.append(Bad(file.name, "damaged"))
    if any(one.file != sidecar(path).name for one in bad):
        bad += [Bad(path.name, "damaged", block) for block in damaged_blocks(path, document)]
    return Inspection(path, document, records, 1 + len(expected), len(records), bad)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_blocks(path: Path, document: dict[str, Any]) -> list[int]:
    """Return the blocks of a one-file mask whose pixels are not those that were decided."""
    lattice = lattice_of(document)
    wanted = {record["block"]: record["sha256"] for record in document["journal"]}
    return [
        block for block in range(lattice.blocks)
        if _pixels_digest(path, document, lattice.core(block)) != wanted[block]
    ]  # fmt: skip


def read_pixels(path: Path, window: Window) -> NDArray[np.uint8]:
    """Return a window of all bands of a file of ours, (bands, h, w).

    Raises
    ------
    Exception
        GDAL's own kinds, if it cannot be decoded.
    """
    where = RasterWindow(window.col, window.row, window.width, window.height)
    with path.open("rb") as file:  # its name may end in anything
        driver = "PNG" if file.read(4) == b"\x89PNG" else "GTiff"
    # Other settings may take uninitialised memory for what a cut-off file has lost.
    with (
        environment(),
        ignoring(NotGeoreferencedWarning),
        rasterio.open(path, driver=driver) as src,
    ):
        return np.ascontiguousarray(src.read(window=where))


def _pixels_digest(path: Path, document: dict[str, Any], core: Window) -> str | None:
    try:
        digest = hashlib.sha256(read_pixels(path, core)[0])
        if "probabilities" in document:
            digest.update(read_pixels(probabilities_of(path), core))
    except Exception:  # GDAL's own classes are neither RasterioError nor OSError
        return None
    return digest.hexdigest()
