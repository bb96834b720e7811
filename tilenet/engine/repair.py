"""Making again just what is damaged in a finished mask, and nothing else.

What is made is compared with the hash that the run left before it replaces anything. What is not
ours is moved beside the mask, never deleted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet import durable
from tilenet.engine.cluster import open_executor
from tilenet.engine.decided import files_of, write_block
from tilenet.engine.document import (
    encode_sidecar,
    finished_of,
    plan_document,
    probabilities_of,
    sidecar,
)
from tilenet.engine.inspection import Bad, Inspection, damaged_blocks, read_pixels
from tilenet.engine.journal import KILLS, Invalid, Journal
from tilenet.engine.large import JOURNAL, check_unchanged, set_up
from tilenet.engine.lost import lose_block, mark_lost
from tilenet.engine.meter import Spans
from tilenet.engine.output import check_beside, export, plan_in_progress, upper_levels
from tilenet.engine.plan import Plan
from tilenet.engine.recipe import plan_from
from tilenet.engine.replaced import scratch
from tilenet.engine.run import run_blocks
from tilenet.engine.runfolder import STORE, STRIPS, outside, run_folder
from tilenet.engine.task import Worker, finish_block, forget_run
from tilenet.errors import OutputError, VerifyError
from tilenet.geometry import Window
from tilenet.pyramid import halve
from tilenet.sinks import MaskStore, StoredChunk
from tilenet.sources import Raster, open_handle

__all__ = ["repair"]

Pixels = NDArray[np.uint8]


def repair(found: Inspection, source: Path | None = None, model: Path | None = None) -> None:
    """Make the damaged parts of a mask again.

    Parameters
    ----------
    found : Inspection
        What is damaged.
    source, model : Path, optional
        Where raster and model lie now, if they were moved.

    Raises
    ------
    InputError, ModelError
        The raster or the model is missing, or was changed; or the raster was renamed.
    VerifyError
        What is made differs from what the run made.
    OutputError
        Another run or repair is at work on this mask, or an unfinished one is to replace it; or a
        file beside it is not ours.
    """
    known = plan_in_progress(found.path)
    if known is not None and known.hash != found.document["plan_hash"]:
        raise OutputError(
            "an unfinished run of this output", run_folder(found.path), "finish it, or remove it"
        )
    if found.path.is_dir():
        _repair_store(found, source, model)
    else:
        _repair_file(found, source, model)


def _repair_store(found: Inspection, source: Path | None, model: Path | None) -> None:
    with scratch(found.path) as folder:
        _move_aside(found.path, [bad for bad in found.bad if bad.what == "foreign"])
        damaged = [bad for bad in found.bad if bad.what != "foreign"]
        _put_metadata(found, [bad for bad in damaged if bad.block is None])
        chunks = [bad.file for bad in damaged if bad.block is not None]
        if chunks:
            _put_chunks(found, folder, chunks, source, model)


def _move_aside(root: Path, foreign: list[Bad]) -> None:
    place, number = outside(root), 1
    aside = place.with_name(f"{place.name}.foreign")
    while any(os.path.lexists(aside / bad.file) for bad in foreign):
        number += 1
        aside = place.with_name(f"{place.name}.foreign-{number}")
    for bad in foreign:
        target = aside / bad.file
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.rename(root / bad.file, target)


def _differs(root: Path, file: str) -> VerifyError:
    return VerifyError(
        "what is made again differs from what the run wrote", root / file,
        "repair it with the versions that made it, or run predict again with --overwrite",
    )  # fmt: skip


def _put_metadata(found: Inspection, bad: list[Bad]) -> None:
    files = found.metadata() if bad else {}
    for one in bad:
        data = files.get(one.file)
        wanted = None if found.sealed is None else found.sealed.get(one.file)
        if data is None or wanted not in (None, hashlib.sha256(data).hexdigest()):
            raise _differs(found.path, one.file)
        (found.path / one.file).parent.mkdir(parents=True, exist_ok=True)
        durable.write(found.path / one.file, data)


class _Bench:
    """Where chunks are made again, one by one, before they go into the mask."""

    def __init__(self, found: Inspection, folder: Path, plan: Plan) -> None:
        self._root = found.path
        self._wanted = {
            path: digest for record in found.records for path, digest, _ in record.files
        }
        self.store = MaskStore(folder / STORE, plan.spec, lasting=False)
        self.mask = MaskStore(found.path, plan.spec)
        self.store.root.mkdir(exist_ok=True)

    def put(self, stored: Iterable[StoredChunk], files: set[str]) -> None:
        """Move those of the made chunks that are asked for into the mask, if they are right."""
        for chunk in stored:
            if chunk.path not in files:
                continue
            if chunk.sha256 is None or chunk.sha256 != self._wanted[chunk.path]:
                raise _differs(self._root, chunk.path)
            target = self._root / chunk.path
            target.parent.mkdir(parents=True, exist_ok=True)
            durable.write(target, (self.store.root / chunk.path).read_bytes())


def _put_chunks(
    found: Inspection, folder: Path, files: list[str], source: Path | None, model: Path | None
) -> None:
    plan = plan_from(found.document, source, model)
    bench = _Bench(found, folder, plan)
    levels = plan.spec.levels
    own = {path for path, *_ in levels[: plan.block_levels + 1]} | {"prob"}
    arrays = {name: set[str]() for name in plan.spec.layouts}
    for name in files:
        arrays[_array_of(name, arrays)].add(name)
    asked = set().union(*(arrays[name] for name in own if name in arrays))
    blocks = [
        record.block for record in found.records
        if record.block >= 0 and any(path in asked for path, *_ in record.files)
    ]  # fmt: skip
    _make_blocks(found, folder, plan, bench, blocks, asked)
    for (below, _, rows, cols), (path, *_) in pairwise(levels):
        if path in own:
            continue
        for name in sorted(arrays[path]):
            row, col = (int(part) * plan.chunk for part in name.split("/")[-2:])
            side = 2 * plan.chunk
            window = Window(2 * row, 2 * col, side, side).intersection(Window(0, 0, rows, cols))
            stored = bench.store.write(path, halve(bench.mask.read(below, window)), row, col)
            bench.put(stored, arrays[path])


def _array_of(file: str, arrays: Iterable[str]) -> str:
    return max((name for name in arrays if file.startswith(f"{name}/")), key=len)


def _make_blocks(
    found: Inspection, folder: Path, plan: Plan, bench: _Bench, blocks: list[int], asked: set[str]
) -> None:
    """Make blocks anew: their own tiles, and those of their neighbours that reach into them."""
    if not blocks:
        return
    (folder / STRIPS).mkdir(exist_ok=True)
    mark_lost(folder, _invalid(found), range(plan.lattice.blocks))
    raster = Raster(plan.raster, open_handle, area=plan.area)
    worker = Worker(folder, plan, raster, bench.store)
    for block in blocks:
        done = finish_block(worker, block, Spans())
        bench.put(worker.write(block, done.mask, done.probabilities), asked)
    raster.close()


def _pixels(out: Path, plan: Plan, block: int) -> tuple[Pixels, Pixels | None]:
    """Return mask and probabilities of a block that is whole."""
    core = plan.lattice.core(block)
    probabilities = read_pixels(probabilities_of(out), core) if plan.probabilities else None
    return read_pixels(out, core)[0], probabilities


def _repair_file(found: Inspection, source: Path | None, model: Path | None) -> None:
    """Put the blocks that are whole into a run folder as done, make the others, and export."""
    out = found.path
    if all(bad.file == sidecar(out).name for bad in found.bad):
        durable.write(sidecar(out), encode_sidecar(found.document))
        return
    plan = plan_from(found.document, source, model)
    check_beside(out, probabilities=plan.probabilities)  # before a run folder is begun
    with scratch(out) as folder:
        plan = set_up(plan, out, folder)
        store = MaskStore(folder / STORE, plan.spec)
        mark_lost(folder, _invalid(found), range(plan.lattice.blocks))
        with Journal(folder / JOURNAL) as journal:
            _take_over(found, folder, plan, store, journal)
            _make_rest(plan, folder, journal)
            for made, record in zip(journal.records(), found.records, strict=True):
                if made.sha256 != record.sha256:
                    raise _differs(out.parent, out.name)
        upper_levels(store, plan.block_levels + 1)
        export(
            plan_document(plan, finished_of(found.document)),
            plan.spec,
            partial(store.read, "mask"),
            partial(store.read, "prob"),
            out,
            found.records,
            overwrite=True,
        )


def _invalid(found: Inspection) -> list[Invalid]:
    return [one for record in found.records for one in record.invalid]


def _take_over(
    found: Inspection, folder: Path, plan: Plan, store: MaskStore, journal: Journal
) -> None:
    """Note blocks that are whole as done, and those that nobody could make."""
    damaged = set(damaged_blocks(found.path, found.document))
    lost = {one.block for one in _invalid(found) if one.why == KILLS}
    for record in found.records:
        if record.block not in damaged:
            pixels = _pixels(found.path, plan, record.block)
            stored = write_block(store, plan.lattice, record.block, *pixels)
            journal.append([replace(record, files=files_of(stored))])
        elif record.block in lost:
            journal.append([lose_block(folder, plan, record.block)])


def _make_rest(plan: Plan, folder: Path, journal: Journal) -> None:
    blocks, device = plan.lattice.blocks, plan.setup.device_class
    with open_executor("local", blocks, device_class=device) as executor:
        try:
            run_blocks(plan, folder, journal, executor, lambda _pixels: None)
        finally:
            forget_run(folder)
    check_unchanged(plan)
