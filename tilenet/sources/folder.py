"""Which rasters a list of paths and folders means, and how their masks are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tilenet.errors import InputError
from tilenet.strangers import exists, is_folder

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
    path : Path
        The file.
    stem : Path
        Its mask's name without an ending, relative to the output folder.
    """

    path: Path
    stem: Path


def _is_mask(path: Path) -> bool:
    """Whether tilenet made the file: its document lies beside it (or beside its mask)."""
    stem = path.name.removesuffix(".prob.tif")
    endings = ("",) if stem == path.name else (".tif", ".png")
    return any(path.with_name(f"{stem}{end}.tilenet.json").exists() for end in endings)


def _in_folder(folder: Path, out: Path) -> list[Input]:
    inside = out.absolute() if out.absolute() != folder.absolute() else None
    found = [
        Input(path, path.relative_to(folder).with_suffix(""))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and inside not in path.absolute().parents
        and not _is_mask(path)
    ]
    if not found:
        raise InputError("no rasters in the folder", folder, "known endings: .tif .png .jpg .jp2 …")
    return found


def find_inputs(paths: list[Path], out: Path) -> list[Input]:
    """Return the rasters that files and folders (searched recursively) name, in order.

    One of several that does not exist is returned too: opening it says so, and the others go on.

    Parameters
    ----------
    paths : list of Path
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
        if is_folder(path):
            inputs += _in_folder(path, out)
        elif exists(path) or len(paths) > 1:
            inputs.append(Input(path, Path(path.stem)))
        else:
            raise InputError("no such file or folder", path, "check the path")
    return inputs
