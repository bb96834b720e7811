"""What a mask's path shows: nothing, or a complete result that says which run made it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import tilenet
from tilenet import durable
from tilenet.engine.journal import UNREADABLE, BlockRecord, Invalid, as_plain
from tilenet.engine.plan import Plan
from tilenet.engine.recipe import recipe_of
from tilenet.errors import InputError, OutputError, ResourceError
from tilenet.geometry import Window
from tilenet.pyramid import halve
from tilenet.sinks import (
    MaskSpec,
    MaskStore,
    StoredChunk,
    documents,
    write_geotiff,
    write_png,
    write_probabilities,
)
from tilenet.strangers import parse_json

__all__ = [
    "PLAN",
    "Finished",
    "Owner",
    "check_free",
    "check_in_progress",
    "check_output",
    "encode_document",
    "export",
    "file_document",
    "locked",
    "plan_document",
    "plan_in_progress",
    "probabilities_of",
    "publish",
    "read_sidecar",
    "run_folder",
    "scratch",
    "sidecar",
    "sweep",
    "upper_levels",
    "with_check",
]

Read = Callable[[Window], NDArray[Any]]

SIDECAR = ".tilenet.json"
PLAN, LOCK = "plan.json", "lock"
"""Names in a run folder."""
_SCRATCH = "export"


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


def run_folder(out: Path) -> Path:
    """Return where the work in progress of an output lies."""
    return out.with_name(f".{out.name}.tilenet")


def sidecar(out: Path) -> Path:
    """Return the file that says which run made a one-file mask."""
    return out.with_name(out.name + SIDECAR)


def probabilities_of(out: Path) -> Path:
    """Return where the probabilities of a one-file mask lie."""
    return out.with_name(f"{out.stem}.prob.tif")


def _companions(out: Path, *, probabilities: bool) -> list[Path]:
    """Return the files that belong to a one-file mask."""
    beside = [sidecar(out), out.with_name(f"{out.name}.aux.xml")]
    return [*beside, probabilities_of(out)] if probabilities else beside


def plan_in_progress(out: Path) -> Plan | None:
    """Return the plan of an unfinished run of this output, None if there is none that reads."""
    try:
        return Plan.load((run_folder(out) / PLAN).read_bytes())
    except (OSError, ValueError):
        return None


def plan_document(plan: Plan, done: Finished | None = None) -> dict[str, Any]:
    """Return what a mask keeps of its plan: identity, recipe and figures, no times."""
    document: dict[str, Any] = {
        "tilenet": tilenet.__version__,
        "plan_hash": plan.hash,
        "identity": plan.identity(),
        "model": plan.model.card.name,
        "input": Path(plan.raster.path).name,
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


def with_check(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the hash of all the rest of it, so that it can be verified alone."""
    rest = {key: value for key, value in document.items() if key != "check"}
    return {**rest, "check": hashlib.sha256(encode_document(rest)).hexdigest()}


def read_sidecar(out: Path) -> dict[str, Any] | None:
    """Return what lies beside a one-file mask, None if that is nothing of ours."""
    try:
        found = parse_json(sidecar(out).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "plan_hash" in found else None


def _check_companions(out: Path, *, probabilities: bool) -> None:
    """Raise if what would lie beside the mask lies there already and is not ours."""
    known = read_sidecar(out)
    foreign = [
        path for path in _companions(out, probabilities=probabilities)
        if path.exists() and (known is None or path == probabilities_of(out))
        and not (known is not None and "probabilities" in known)
    ]  # fmt: skip
    if foreign:
        raise OutputError(
            "a file beside the mask exists and is not tilenet's", foreign[0], "move it away"
        )


def _document(out: Path) -> dict[str, Any]:
    """Return the plan document of an existing output of ours."""
    try:
        if out.is_dir():
            return dict(parse_json(documents(out)["plan"]))
        found = dict(parse_json(sidecar(out).read_bytes()))
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
    there = out.exists() or out.is_symlink()
    document = _document(out) if there else {}
    if overwrite or not there:
        if plan.format != "zarr":
            _check_companions(out, probabilities=plan.probabilities)
        return None
    keys = differing(plan.identity(), document.get("identity", {}))
    if keys:
        raise OutputError(
            f"the output was made by another run (differs in {', '.join(keys)})",
            out,
            "choose another --out, or --overwrite",
        )
    done = _finished(document)
    done.check(plan)
    return done


def _finished(document: Mapping[str, Any]) -> Finished:
    return Finished(
        {int(k): v for k, v in document["pixels"].items()},
        document["tiles"],
        document["tiles_skipped"],
        document["blocks"],
        tuple(Invalid(**one) for one in document["invalid"]),
    )


def check_free(out: Path, spec: MaskSpec, *, one_file: bool, overwrite: bool) -> None:
    """Raise OutputError unless a mask may be written to `out` that is no run's."""
    if out.exists() or out.is_symlink():
        _document(out)
        if not overwrite:
            raise OutputError("the output exists", out, "choose another, or --overwrite")
    if one_file:
        _check_companions(out, probabilities=bool(spec.channels))
    if plan_in_progress(out) is not None:
        raise OutputError("an unfinished run of this output", run_folder(out), "finish it first")


def check_in_progress(out: Path, plan: Plan, *, overwrite: bool) -> Plan | None:
    """Return the plan of an unfinished run of this output, if there is one.

    Raises
    ------
    OutputError
        It is another run's and not to be overwritten.
    """
    known = plan_in_progress(out)
    if known is None or overwrite:
        return known
    keys = differing(plan.identity(), known.identity())
    if keys:
        raise OutputError(
            f"an unfinished run of this output differs in {', '.join(keys)}",
            run_folder(out),
            "give its options to resume it, or --overwrite to drop it",
        )
    return known


def sweep(out: Path, plan: Plan) -> None:
    """Remove the run folder that a crash left beside this plan's finished output.

    One without a plan holds no run; or it is what is left of one whose removal was cut short.
    """
    folder, known = run_folder(out), plan_in_progress(out)
    if folder.exists() and (known is None or known.hash == plan.hash):
        with locked(folder):
            remove_run_folder(folder)


class Owner:
    """Who owns a run folder: the kernel's lock, and a name in it for disks that lack such locks.

    Some shared file systems grant a lock to everybody. There the later run writes its name over the
    earlier one's, which finds it before it next writes, and stops.
    """

    def __init__(self, folder: Path, fd: int) -> None:
        self._folder, self._name = folder, secrets.token_hex(16).encode()
        os.ftruncate(fd, 0)
        os.pwrite(fd, self._name, 0)

    def check(self) -> None:
        """Raise OutputError if another run has taken over."""
        try:
            found = (self._folder / LOCK).read_bytes()
        except FileNotFoundError:
            found = b""
        if found != self._name:
            raise OutputError(
                "another run has taken over this output", self._folder, "leave it to that one"
            )


@contextmanager
def locked(folder: Path) -> Iterator[Owner]:
    """Own a run folder; the kernel gives it back however this process ends.

    Raises
    ------
    OutputError
        Another run owns it.
    """
    links = [path for path in (folder, *folder.iterdir()) if path.is_symlink()]
    if links:
        raise OutputError("work in progress is a link", links[0], "remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(folder / LOCK, flags, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another run is writing this output", folder, "wait for it, or choose another --out"
            ) from error
        if not (folder / LOCK).exists() or not os.path.samestat(
            os.fstat(fd), (folder / LOCK).stat()
        ):
            raise OutputError(
                "another run has just finished this output", folder, "look at it, or run again"
            )
        yield Owner(folder, fd)
    finally:
        os.close(fd)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Own a run folder for work that holds no run and, after a crash, is begun anew.

    Raises
    ------
    OutputError
        Somebody else is at work on this output.
    """
    folder = run_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        try:
            yield folder
        finally:
            remove_run_folder(folder)


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


@contextmanager
def _making_room(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Move an old output of ours aside, into the run folder; back if its successor fails."""
    moved: list[Path] = []
    if overwrite and out.exists():
        known = read_sidecar(out) or {}
        parts = [out, *_companions(out, probabilities="probabilities" in known)]
        moved = [path for path in parts if path.exists()]
    aside = run_folder(out) / "replaced"
    if moved:
        aside.mkdir(parents=True, exist_ok=True)
    try:
        for path in moved:
            path.replace(aside / path.name)
        yield
    except BaseException:
        for path in moved:
            if (aside / path.name).exists():
                (aside / path.name).replace(path)
        raise


def publish(store: Path, out: Path, *, overwrite: bool) -> None:
    """Give a finished store its final name."""
    with _making_room(out, overwrite=overwrite):
        try:
            durable.rename(store, out)
        except OSError as error:
            raise OutputError(f"cannot be renamed: {error.strerror}", out, "is it busy?") from error


def export(
    document: Mapping[str, Any],
    spec: MaskSpec,
    read: Read,
    read_probabilities: Read,
    out: Path,
    records: Iterable[BlockRecord],
    *,
    overwrite: bool,
) -> None:
    """Write a mask as one file, read back, with the run's document beside it.

    The document comes first and the mask last: whatever a crash leaves is known as ours.

    Parameters
    ----------
    document : mapping
        From `plan_document`; says the format.
    spec : MaskSpec
        The mask.
    read, read_probabilities : callable
        From a window to (h, w) classes and (K, h, w) probabilities.
    out : Path
        The file; its run folder exists.
    records : iterable of BlockRecord
        What was decided in each block; the document keeps their hashes.
    overwrite : bool
        Replace an output of ours.
    """
    document = file_document(document, records)
    scratch = run_folder(out) / _SCRATCH
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir()

    def note(written: dict[str, Any]) -> None:
        content = encode_document(with_check(document | written))
        durable.write(sidecar(out), content, scratch=scratch)

    with _making_room(out, overwrite=overwrite):
        try:
            if spec.channels:
                document["probabilities"] = {}
                note({})
                document["probabilities"] = write_probabilities(
                    read_probabilities, spec, probabilities_of(out), scratch
                )
            if document["identity"]["format"] == "png":
                whole = Window(0, 0, spec.height, spec.width)
                write_png(read(whole), spec, out, note, scratch)
            else:
                write_geotiff(read, spec, out, note, scratch)
        except BaseException:
            for path in _companions(out, probabilities=bool(spec.channels)):
                path.unlink(missing_ok=True)
            raise


def remove_run_folder(folder: Path) -> None:
    """Remove a run folder that is ours and locked; the lock goes last.

    Another run may want the folder from then on: what it does there stays.
    """
    try:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
    except OSError as error:
        raise ResourceError(f"cannot be removed: {error.strerror}", folder, "remove it") from error
