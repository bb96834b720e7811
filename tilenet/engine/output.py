"""What a mask's path shows: nothing, or a complete result that says which run made it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tilenet import durable
from tilenet.engine.document import (
    Finished,
    encode_sidecar,
    file_document,
    finished_of,
    probabilities_of,
    read_sidecar,
    sidecar,
)
from tilenet.engine.journal import BlockRecord
from tilenet.engine.plan import Format, Plan
from tilenet.engine.replaced import companions, move_aside, put_back
from tilenet.engine.runfolder import PLAN, locked, remove_run_folder, run_folder
from tilenet.errors import InputError, OutputError, ResourceError
from tilenet.geometry import Window
from tilenet.models.store import ModelFiles
from tilenet.pyramid import halve
from tilenet.sinks import (
    Before,
    MaskSpec,
    MaskStore,
    StoredChunk,
    documents,
    enlist,
    is_listed,
    write_geotiff,
    write_ome_tiff,
    write_png,
    write_probabilities,
)
from tilenet.strangers import parse_json

__all__ = [
    "check_beside",
    "check_free",
    "check_in_progress",
    "check_output",
    "export",
    "plan_in_progress",
    "publish",
    "sweep",
    "tile_of",
    "tile_there",
    "upper_levels",
]

Read = Callable[[Window], NDArray[Any]]

_SCRATCH = "export"

# GDAL takes them for an image's own overviews and mask, whoever made them; ours has none beside it.
_OVERLAYS = (".ovr", ".OVR", ".msk", ".MSK")

# A folder whose name is too long is not there; that no mask can be made is told by who makes it.
_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


def plan_in_progress(out: Path, *, overwrite: bool = False) -> Plan | None:
    """Return the plan of an unfinished run of this output, None if there is none.

    Parameters
    ----------
    out : Path
        The mask.
    overwrite : bool
        One that does not read may be dropped, and counts as none.

    Raises
    ------
    ResourceError
        There is one that the disk does not give: not to be taken for none, whose work is removed.
    OutputError
        There is one that does not read: another version's.
    """
    file = run_folder(out) / PLAN
    try:
        return Plan.load(file.read_bytes())
    except OSError as error:
        if error.errno in _NOTHING:
            return None
        raise ResourceError(
            f"the plan of an unfinished run cannot be read: {error.strerror}", file,
            "a rerun resumes",
        ) from error  # fmt: skip
    except ValueError as error:
        if overwrite:
            return None
        raise OutputError(
            "an unfinished run there is of another version of tilenet", file,
            "finish it with that version, or --overwrite to drop it",
        ) from error  # fmt: skip


def tile_there(out: Path, files: ModelFiles, usual: int) -> int | None:
    """Return the tile of a mask that is there, or begun, if "auto" means it.

    That is, if the same model makes it, with the usual tile or one that memory has made smaller.
    """
    try:
        known = plan_in_progress(out)
        if known is not None:
            return known.automatic_tile(files, usual)
        return tile_of(_document(out), files, usual) if out.exists() else None
    except OutputError:
        return None  # what is wrong with it is told where it is looked at


def tile_of(document: Mapping[str, Any], files: ModelFiles, usual: int) -> int | None:
    """Return the tile of a finished mask, from its document, if "auto" means it; else None."""
    try:
        identity, recipe = document["identity"], document["recipe"]
        meant = identity["tile"] == usual or recipe.get("lowered", False)
        return int(identity["tile"]) if meant and identity["model"] == files.sha256 else None
    except (KeyError, TypeError, ValueError):
        return None


def check_beside(out: Path, *, probabilities: bool) -> None:
    """Raise OutputError if what lies beside a one-file mask, or would, is not ours.

    Parameters
    ----------
    out : Path
        The mask.
    probabilities : bool
        It has some.
    """
    there = [path for path in companions(out, probabilities=probabilities) if path.exists()]
    known = read_sidecar(out) if there else None
    foreign = [
        path for path in there
        if (known is None or path == probabilities_of(out))
        and not (known is not None and "probabilities" in known)
    ]  # fmt: skip
    rasters = [out, probabilities_of(out)] if probabilities else [out]
    overlays = (one.with_name(one.name + ending) for one in rasters for ending in _OVERLAYS)
    foreign += [path for path in overlays if path.exists()]
    if foreign:
        raise OutputError(
            "a file beside the mask exists and is not tilenet's", foreign[0], "move it away"
        )


def _document(out: Path) -> dict[str, Any]:
    """Return the plan document of an existing output of ours."""
    try:
        if out.is_dir():
            return dict(parse_json(documents(out)["plan"]))
        found = dict(read_sidecar(out) or {})
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
            check_beside(out, probabilities=plan.probabilities)
        return None
    keys = differing(plan.identity(), document.get("identity", {}))
    if keys:
        raise OutputError(
            f"the output was made by another run (differs in {', '.join(keys)})",
            out,
            "choose another --out, or --overwrite",
        )
    done = finished_of(document)
    done.check(plan)
    return done


def check_free(out: Path, spec: MaskSpec, *, one_file: bool, overwrite: bool) -> None:
    """Raise OutputError unless a mask may be written to `out` that is no run's."""
    if out.exists() or out.is_symlink():
        _document(out)
        if not overwrite:
            raise OutputError("the output exists", out, "choose another, or --overwrite")
    if one_file:
        check_beside(out, probabilities=bool(spec.channels))
    if plan_in_progress(out) is not None:
        raise OutputError("an unfinished run of this output", run_folder(out), "finish it first")


def check_in_progress(out: Path, plan: Plan, *, overwrite: bool) -> Plan | None:
    """Return the plan of an unfinished run of this output, if there is one.

    Raises
    ------
    OutputError
        It is another run's and not to be overwritten.
    """
    known = plan_in_progress(out, overwrite=overwrite)
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

    One without a plan holds no run; or it is what is left of one whose removal was cut short. A
    label whose image may not list it yet, in all the places that do, is listed.
    """
    folder = run_folder(out)
    try:
        known = plan_in_progress(out)
        ours = known is None or known.hash == plan.hash
    except (OutputError, ResourceError):
        ours = False
    unlisted = plan.label is not None and (folder.exists() or not is_listed(out))
    if unlisted:
        folder.mkdir(exist_ok=True)
    if folder.exists() and (ours or unlisted):
        with locked(folder):
            if unlisted:
                enlist(out, folder)
            if ours:
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


_BUSY = {errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EXDEV}


def _check_place(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError if somebody has put something there while the mask was made.

    What lies beside a file tells that it is ours, whatever has become of it: a repair replaces it.
    """
    if not os.path.lexists(out):
        return
    if overwrite and (read_sidecar(out) is not None or (out.is_dir() and _document(out))):
        return
    what = "something has come there while the mask was made"
    raise OutputError(what, out, "move it away, and run again")


def publish(store: Path, out: Path, *, overwrite: bool, label: bool = False) -> None:
    """Give a finished store its final name; a label of an image goes into its list then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_place(out, overwrite=overwrite)
    try:
        if overwrite:
            move_aside(out)
        try:
            durable.rename(store, out)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            raise OutputError(f"cannot be renamed: {error.strerror}", out, "is it busy?") from error
        if label:
            enlist(out, run_folder(out))
    except BaseException:
        put_back(out)
        raise


def _write(form: Format, read: Read, spec: MaskSpec, out: Path, before: Before) -> None:
    scratch = run_folder(out) / _SCRATCH
    if form == "png":
        write_png(read(Window(0, 0, spec.height, spec.width)), spec, out, before, scratch)
    elif form == "ome-tiff":
        write_ome_tiff(read, spec, out, before, scratch)
    else:
        write_geotiff(read, spec, out, before, scratch)


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
    known = read_sidecar(out) is not None  # of a mask that is lost, and made again
    folder = run_folder(out) / _SCRATCH
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    beside = probabilities_of(out)

    def replace(written: dict[str, Any]) -> None:
        _check_place(out, overwrite=overwrite)
        if overwrite:
            move_aside(out)
        content = encode_sidecar(document | written)
        durable.write(sidecar(out), content, scratch=folder)
        if spec.channels:
            durable.rename(folder / beside.name, beside)

    try:
        if spec.channels:
            made = write_probabilities(read_probabilities, spec, folder / beside.name, folder)
            document["probabilities"] = made
        _write(document["identity"]["format"], read, spec, out, replace)
    except BaseException:
        put_back(out)
        if not (out.exists() or known):  # the mask got its name last: where it is, all is there
            for path in companions(out, probabilities=bool(spec.channels)):
                path.unlink(missing_ok=True)
        raise
