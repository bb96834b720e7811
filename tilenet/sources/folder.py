"""Which rasters a list of paths, folders and patterns means, and how their masks are called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilenet.errors import InputError, TilenetError
from tilenet.sources.picture import is_mask_store
from tilenet.sources.remote import RemoteName
from tilenet.strangers import exists, is_collection, is_pattern, is_store

__all__ = ["SUFFIXES", "Input", "expand", "find_inputs", "fixed_part"]

SUFFIXES = frozenset(
    [".tif", ".tiff", ".btf", ".svs", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".bmp", ".gif",
     ".webp", ".jxl", ".img", ".ntf", ".pgm", ".ppm", ".hgt", ".asc", ".ndpi", ".mrxs", ".scn",
     ".bif", ".czi", ".vms", ".vmu", ".zvi", ".qptiff"]
)  # fmt: skip
"""Endings under which a folder is searched; a file named on the command line may have any.

A slide in DICOM is many files, of which one must be named: it is not looked for."""


@dataclass(frozen=True, slots=True)
class Input:
    """One raster to segment.

    Parameters
    ----------
    path : Path or RemoteName
        The file, or the folder of a Zarr store.
    stem : Path
        Its mask's name without an ending, relative to the output folder.
    """

    path: Path | RemoteName
    stem: Path


def _stem(path: Path) -> Path:
    """Return a path without its ending, which OME's files have two of."""
    name = path.name
    for ending in (".ome.zarr", ".zarr", ".ome.tif", ".ome.tiff"):
        if name.lower().endswith(ending) and len(name) > len(ending):
            return path.with_name(name[: -len(ending)])
    return path.with_suffix("")


def _is_mask(path: Path) -> bool:
    """Whether tilenet made it: its document lies beside it (or beside its mask), or in it."""
    if is_store(path):
        try:
            return is_mask_store(path)
        except TilenetError:  # opening it says what is wrong
            return False
    stem = path.name.removesuffix(".prob.tif")
    endings = ("",) if stem == path.name else (".tif", ".png")
    return any(exists(path.with_name(f"{stem}{end}.tilenet.json")) for end in endings)


def _rasters(folder: Path) -> Iterator[Path]:
    """Yield files with known endings, and Zarr stores, but nothing that lies in these.

    A folder that does not read is yielded itself: nobody else would miss what lies in it.
    """
    closed: list[Path] = []
    for base, folders, files in os.walk(folder, onerror=lambda e: closed.append(Path(e.filename))):
        inside = Path(base)
        yield from (inside / name for name in files if Path(name).suffix.lower() in SUFFIXES)
        stores = [name for name in folders if is_store(inside / name)]
        yield from (inside / name for name in stores)
        folders[:] = [
            name for name in folders
            if name not in (*stores, "lost+found") and not name.startswith(".")
        ]  # fmt: skip
    yield from closed


def _in_folder(folder: Path, out: Path, *, allow_none: bool = False) -> list[Input]:
    inside = out.absolute() if out.absolute() != folder.absolute() else None
    # A link to nothing fails alone, as a name of nothing does: nobody would miss its mask.
    found = [
        Input(path, _stem(path.relative_to(folder)))
        for path in sorted(_rasters(folder))
        if (path.is_file() or path.is_dir() or not exists(path))
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and inside not in path.absolute().parents
        and not _is_mask(path)
    ]
    if not found and not allow_none:
        raise InputError("no rasters in the folder", folder, "known endings: .tif .png .jpg .jp2 …")
    return found


def fixed_part(pattern: Path) -> Path:
    """Return the folder in which all that matches a pattern lies."""
    plain = pattern
    while is_pattern(plain):
        plain = plain.parent
    return plain


def _matching(pattern: Path, out: Path) -> list[Input]:
    """Return the rasters that match, as a shell would name them; masks of tilenet's are none.

    Their masks lie as they do below the part without wildcards, so that equal names do not meet.
    """
    base = fixed_part(pattern)
    try:
        matches = sorted(base.glob(str(pattern.relative_to(base))))
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"no such pattern: {error}", pattern, "** stands between slashes"
        ) from error
    inside = out.absolute()
    stores: dict[Path, bool] = {}
    found: dict[Path | RemoteName, Input] = {}
    for path in matches:
        relative = path.relative_to(base)
        above = [base / part for part in relative.parents if part.name]
        stores |= {part: is_store(part) for part in above if part not in stores}
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or inside in path.absolute().parents or any(stores[part] for part in above):
            continue
        if is_collection(path):
            for one in _in_folder(path, out, allow_none=True):
                found.setdefault(one.path, Input(one.path, relative / one.stem))
        elif not _is_mask(path):
            found.setdefault(path, Input(path, _stem(relative)))
    if not found:
        raise InputError("no raster matches the pattern", pattern, "check the path")
    return list(found.values())


def expand(path: Path | RemoteName, out: Path) -> list[Input]:
    """Return the rasters that one name stands for: itself, what lies in it, or what matches.

    Whether a single file is there is for whoever opens it.

    Parameters
    ----------
    path : Path or RemoteName
        A raster, a folder or a pattern.
    out : Path
        Where masks go.

    Raises
    ------
    InputError
        A folder holds no raster, or nothing matches.
    """
    if isinstance(path, RemoteName):
        return [Input(path, _stem(Path(path.name)))]
    if is_collection(path):
        return _in_folder(path, out)
    if is_pattern(path):
        return _matching(path, out)
    return [Input(path, _stem(Path(path.name)))]


def find_inputs(
    paths: Sequence[Path | RemoteName], out: Path, *, several: bool = False
) -> list[Input]:
    """Return the rasters that files, folders (searched recursively) and patterns name, in order.

    One of several that does not exist is returned too: opening it says so, and the others go on.

    Parameters
    ----------
    paths : list of Path or RemoteName
        Rasters, folders, and patterns such as ``slides/**/*.svs`` that no shell has expanded.
    out : Path
        Where masks go. What lies there is no input, nor is any other mask of tilenet's in a folder.
    several : bool
        There are more inputs than these.

    Raises
    ------
    InputError
        The only path does not exist, a folder holds no raster, or nothing matches the only pattern.
    """
    several = several or len(paths) > 1
    inputs: list[Input] = []
    for path in paths:
        if isinstance(path, RemoteName):
            inputs += expand(path, out)
        elif several and is_pattern(path):
            inputs += _perhaps(path, out)
        elif several or exists(path) or is_pattern(path):
            inputs += expand(path, out)
        else:
            raise InputError("no such file or folder", path, "check the path")
    return inputs


def _perhaps(path: Path, out: Path) -> list[Input]:
    try:
        return expand(path, out)
    except InputError:
        return [Input(path, _stem(Path(path.name)))]  # there is none: opening it says so
