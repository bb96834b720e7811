"""What a mask's path shows: nothing, or a complete result that says which run made it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import tilenet
from tilenet import durable
from tilenet.engine.plan import Plan
from tilenet.errors import InputError, OutputError, ResourceError
from tilenet.geometry import Window
from tilenet.pyramid import halve
from tilenet.sinks import (
    MaskStore,
    StoredChunk,
    documents,
    write_geotiff,
    write_png,
    write_probabilities,
)

__all__ = [
    "Finished",
    "check_output",
    "export",
    "locked",
    "plan_document",
    "publish",
    "run_folder",
    "sidecar",
    "upper_levels",
]

Read = Callable[[Window], NDArray[Any]]

SIDECAR = ".tilenet.json"


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished mask says of itself.

    Parameters
    ----------
    pixels : dict of int to int
        Pixels of each class and of 255.
    tiles, tiles_skipped, blocks : int
        Of the whole raster.
    """

    pixels: dict[int, int]
    tiles: int
    tiles_skipped: int
    blocks: int


def run_folder(out: Path) -> Path:
    """Return where the work in progress of an output lies."""
    return out.with_name(f".{out.name}.tilenet")


def sidecar(out: Path) -> Path:
    """Return the file that says which run made a one-file mask."""
    return out.with_name(out.name + SIDECAR)


def plan_document(plan: Plan, done: Finished | None = None) -> bytes:
    """Return what a mask keeps of its plan: identity and figures, no paths and no times."""
    document: dict[str, Any] = {
        "tilenet": tilenet.__version__,
        "plan_hash": plan.hash,
        "identity": plan.identity(),
        "model": plan.model.card.name,
        "input": Path(plan.raster.path).name,
    }
    if done is not None:
        document |= {
            "pixels": {str(k): v for k, v in sorted(done.pixels.items())},
            "tiles": done.tiles,
            "tiles_skipped": done.tiles_skipped,
            "blocks": done.blocks,
        }
    return json.dumps(document, sort_keys=True, indent=1).encode()


def _document(out: Path) -> dict[str, Any]:
    """Return the plan document of an existing output of ours."""
    try:
        if out.is_dir():
            return dict(json.loads(documents(out)["plan"]))
        found = dict(json.loads(sidecar(out).read_bytes()))
        same = found["size"] == out.stat().st_size
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            "the output exists and is not tilenet's", out, "choose another --out, or move it away"
        ) from error
    if not same:
        raise OutputError("the output was changed since", out, "choose another --out")
    return found


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two identities differ."""
    return [key for key in sorted(set(ours) | set(theirs)) if ours.get(key) != theirs.get(key)]


def check_output(out: Path, plan: Plan, *, overwrite: bool) -> Finished | None:
    """Return the figures if `out` is already this plan's complete result, None if it is free.

    Raises
    ------
    OutputError
        It is foreign, or another run's and not to be overwritten.
    """
    if not out.exists() and not out.is_symlink():
        return None
    document = _document(out)
    if overwrite:
        return None
    keys = differing(plan.identity(), document.get("identity", {}))
    if keys:
        raise OutputError(
            f"the output was made by another run (differs in {', '.join(keys)})",
            out,
            "choose another --out, or --overwrite",
        )
    pixels = {int(k): v for k, v in document["pixels"].items()}
    return Finished(pixels, document["tiles"], document["tiles_skipped"], document["blocks"])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a run folder; the kernel gives it back however this process ends.

    Raises
    ------
    OutputError
        Another run owns it.
    """
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another run is writing this output", folder, "wait for it, or choose another --out"
            ) from error
        yield
    finally:
        os.close(fd)


def upper_levels(store: MaskStore, first: int) -> list[StoredChunk]:
    """Make the pyramid levels from number `first` on, each from the one below, in flat memory."""
    stored: list[StoredChunk] = []
    levels = store.spec.levels
    step = 4 * store.spec.chunk
    for (below, _, rows, cols), (path, *_) in zip(
        levels[first - 1 :], levels[first:], strict=False
    ):
        for row in range(0, rows, 2 * step):
            for col in range(0, cols, 2 * step):
                window = Window(row, col, 2 * step, 2 * step).intersection(Window(0, 0, rows, cols))
                halved = halve(store.read(below, window))
                stored += store.write(path, halved, row // 2, col // 2)
    return stored


def _make_room(out: Path, folder: Path, *, overwrite: bool) -> None:
    """Move an old output of ours aside, into the run folder."""
    if not overwrite:
        return
    for old in (out, sidecar(out)):
        if old.exists():
            aside = folder / "replaced"
            aside.mkdir(exist_ok=True)
            old.replace(aside / old.name)


def publish(store: Path, out: Path, *, overwrite: bool) -> None:
    """Give a finished store its final name."""
    _make_room(out, store.parent, overwrite=overwrite)
    try:
        durable.rename(store, out)
    except OSError as error:
        raise OutputError(f"cannot be renamed: {error.strerror}", out, "is it busy?") from error


def export(
    plan: Plan, read: Read, read_probabilities: Read, out: Path, done: Finished, *, overwrite: bool
) -> None:
    """Write a mask as one file, read it back, and put the run's document beside it.

    Parameters
    ----------
    plan : Plan
        Says the format.
    read, read_probabilities : callable
        From a window to (h, w) classes and (K, h, w) probabilities.
    out : Path
        The file; its run folder exists if something is to be replaced.
    done : Finished
        Figures for the document.
    overwrite : bool
        Replace an output of ours.
    """
    _make_room(out, run_folder(out), overwrite=overwrite)
    if plan.format == "png":
        whole = Window(0, 0, plan.raster.height, plan.raster.width)
        write_png(read(whole), plan.spec, out)
        written = {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
                   "size": out.stat().st_size}  # fmt: skip
    else:
        written = write_geotiff(read, plan.spec, out)
    document = json.loads(plan_document(plan, done)) | written
    if plan.probabilities:
        probabilities = out.with_name(f"{out.stem}.prob.tif")
        document["probabilities"] = write_probabilities(
            read_probabilities, plan.spec, probabilities
        )
    durable.write(sidecar(out), json.dumps(document, sort_keys=True, indent=1).encode())


def remove_run_folder(folder: Path) -> None:
    """Remove a run folder that is ours."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ResourceError(f"cannot be removed: {error.strerror}", folder, "remove it") from error
