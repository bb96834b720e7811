"""A finished mask in another format, with the bytes that its run would have written there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.engine.decided import files_of, write_block
from tilenet.engine.document import probabilities_of
from tilenet.engine.inspection import Inspection, inspect, kept_documents, read_pixels
from tilenet.engine.journal import UPPER, BlockRecord
from tilenet.engine.output import check_free, export, publish, upper_levels
from tilenet.engine.plan import block_levels, check_png, format_of, hash_of
from tilenet.engine.recipe import lattice_of
from tilenet.engine.replaced import scratch
from tilenet.engine.runfolder import STORE
from tilenet.errors import UsageError, VerifyError
from tilenet.geometry import Window
from tilenet.sinks import MaskStore, check_slides, open_store

__all__ = ["convert"]

_OF_FILES = {"sha256", "size", "journal", "probabilities"}


def convert(path: Path, out: Path, *, overwrite: bool) -> None:
    """Write a mask in the format that the ending of `out` names.

    Parameters
    ----------
    path : Path
        A finished mask.
    out : Path
        Where to.
    overwrite : bool
        Replace an output of ours.

    Raises
    ------
    UsageError
        The ending gives no format, or the mask is too large for it.
    OutputError
        There is something at `out`.
    VerifyError
        The mask is not what its run wrote.
    """
    name = format_of(out)
    if name is None or out.absolute() == path.absolute():
        raise UsageError(
            "no format to export to", out, "end another name in .tif, .ome.tif, .png or .zarr"
        )
    if name == "ome-tiff":
        check_slides(out)
    found = inspect(path)
    if found.bad:
        raise VerifyError("the mask is damaged", path, "run tilenet verify --repair")
    if name == "png":
        check_png(found.spec.height, found.spec.width, path)
    check = partial(check_free, out, found.spec, one_file=name != "zarr", overwrite=overwrite)
    check()
    identity = {k: v for k, v in found.document["identity"].items() if k != "label"}
    identity["format"] = name
    spec = replace(found.spec, label=None)  # what was an image's label becomes a mask of its own
    document = {k: v for k, v in found.document.items() if k not in _OF_FILES}
    document |= {"identity": identity, "plan_hash": hash_of(identity), "spec": spec.as_dict()}
    found = replace(found, document=document)
    pixels = _Pixels(found)
    with scratch(out) as folder:
        check()  # an export that was killed may have left an old one there
        if name == "zarr":
            _write_store(found, document, pixels, folder / STORE)
            publish(folder / STORE, out, overwrite=overwrite)
        else:
            export(
                document, found.spec, pixels.mask, pixels.probabilities, out, found.records,
                overwrite=overwrite,
            )  # fmt: skip


class _Pixels:
    """The pixels of a finished mask, by windows."""

    def __init__(self, found: Inspection) -> None:
        self._path = found.path
        self._store = open_store(found.path) if found.path.is_dir() else None

    def mask(self, window: Window) -> NDArray[np.uint8]:
        """Return classes, (h, w)."""
        if self._store is not None:
            return self._store.read("mask", window)
        plane: NDArray[np.uint8] = read_pixels(self._path, window)[0]
        return plane

    def probabilities(self, window: Window) -> NDArray[np.uint8]:
        """Return probabilities, (K, h, w)."""
        if self._store is not None:
            return self._store.read("prob", window)
        return read_pixels(probabilities_of(self._path), window)


def _write_store(found: Inspection, document: dict[str, Any], pixels: _Pixels, root: Path) -> None:
    lattice, store = lattice_of(document), MaskStore(root, found.spec, lasting=False)
    store.create()
    records = []
    for record in (one for one in found.records if one.block >= 0):
        core = lattice.core(record.block)
        probabilities = pixels.probabilities(core) if found.spec.channels else None
        stored = write_block(store, lattice, record.block, pixels.mask(core), probabilities)
        records.append(replace(record, files=files_of(stored)))
    upper = files_of(upper_levels(store, block_levels(lattice, found.spec) + 1))
    if lattice.blocks == 1:  # as a pack does
        records = [replace(records[0], files=records[0].files + upper)]
    else:
        records.insert(0, BlockRecord(UPPER, upper, {}, 0, 0))
    counts = {int(k): v for k, v in document["pixels"].items()}
    store.finish(counts, kept_documents(document, records))
