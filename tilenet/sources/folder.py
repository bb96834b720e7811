"""Which rasters a list of paths and folders means, and how their masks are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tilenet.errors import InputError

__all__ = ["SUFFIXES", "Input", "find_inputs"]

SUFFIXES = frozenset(
    [".tif", ".tiff", ".btf", ".svs", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".bmp", ".gif",
     ".webp", ".jxl", ".img", ".ntf", ".pgm", ".ppm", ".hgt", ".asc"]
)  # fmt: skip
"""Endings under which a folder is searched; a file named on the command line may have any."""


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


def _in_folder(folder: Path) -> list[Input]:
    found = [
        Input(path, path.relative_to(folder).with_suffix(""))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError("no rasters in the folder", folder, "known endings: .tif .png .jpg .jp2 …")
    return found


def find_inputs(paths: list[Path]) -> list[Input]:
    """Return the rasters that files and folders (searched recursively) name, in order.

    Raises
    ------
    InputError
        A path does not exist or a folder holds no raster.
    """
    inputs: list[Input] = []
    for path in paths:
        if path.is_dir():
            inputs += _in_folder(path)
        elif path.exists():
            inputs.append(Input(path, Path(path.stem)))
        else:
            raise InputError("no such file or folder", path, "check the path")
    return inputs
