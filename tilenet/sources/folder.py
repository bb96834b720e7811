"""Which rasters a list of paths and folders means, and how their masks are called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilenet.errors import InputError, TilenetError
from tilenet.sources.picture import is_mask_store
from tilenet.sources.remote import RemoteName
from tilenet.strangers import exists, is_collection, is_store

__all__ = ["SUFFIXES", "Input", "find_inputs"]

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
    return any(path.with_name(f"{stem}{end}.tilenet.json").exists() for end in endings)


def _rasters(folder: Path) -> Iterator[Path]:
    """Yield files with known endings, and Zarr stores, but nothing that lies in these."""
    for base, folders, files in os.walk(folder):
        inside = Path(base)
        yield from (inside / name for name in files if Path(name).suffix.lower() in SUFFIXES)
        stores = [name for name in folders if is_store(inside / name)]
        yield from (inside / name for name in stores)
        folders[:] = [name for name in folders if name not in stores and not name.startswith(".")]


def _in_folder(folder: Path, out: Path) -> list[Input]:
    inside = out.absolute() if out.absolute() != folder.absolute() else None
    found = [
        Input(path, _stem(path.relative_to(folder)))
        for path in sorted(_rasters(folder))
        if (path.is_file() or path.is_dir())
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and inside not in path.absolute().parents
        and not _is_mask(path)
    ]
    if not found:
        raise InputError("no rasters in the folder", folder, "known endings: .tif .png .jpg .jp2 …")
    return found


def find_inputs(paths: Sequence[Path | RemoteName], out: Path) -> list[Input]:
    """Return the rasters that files and folders (searched recursively) name, in order.

    One of several that does not exist is returned too: opening it says so, and the others go on.

    Parameters
    ----------
    paths : list of Path or RemoteName
        Rasters and folders.
    out : Path
        Where masks go. What lies there is no input, nor is any other mask of tilenet's in a folder.

    Raises
    ------
    InputError
        The only path does not exist, or a folder holds no raster.
    """
    inputs: list[Input] = []
    for path in paths:
        if isinstance(path, RemoteName):
            inputs.append(Input(path, _stem(Path(path.name))))
        elif is_collection(path):
            inputs += _in_folder(path, out)
        elif exists(path) or len(paths) > 1:
            inputs.append(Input(path, _stem(Path(path.name))))
        else:
            raise InputError("no such file or folder", path, "check the path")
    return inputs
