"""Manifests: files that name inputs, one a line."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from tilenet.errors import InputError, convert_errors
from tilenet.sources.folder import Input, expand, fixed_part
from tilenet.sources.remote import RemoteName, named
from tilenet.strangers import is_collection, is_file, is_pattern

__all__ = ["STDIN", "read_manifest"]

STDIN = "-"
"""The manifest that comes on standard input."""

_MOST = 1 << 28  # bytes: no manifest is longer, whatever was named by mistake


def read_manifest(manifest: str, out: Path) -> list[Input]:
    """Return the inputs that a manifest names, in order, each once.

    Empty lines and lines that begin with ``#`` are ignored. Paths are relative to the manifest's
    folder, and the masks of such ones lie as their rasters do; of others only the name counts. One
    that does not exist is returned too: opening it says so, and the others go on.

    Parameters
    ----------
    manifest : str
        A file, or "-" for standard input, whose paths are relative to where we stand.
    out : Path
        Where masks go.

    Raises
    ------
    InputError
        It is not there, is no text, or names nothing.
    """
    data = _read(manifest)
    if b"\0" in data:
        raise InputError("the manifest is no text", manifest, "one path or URL per line")
    # Names of files need not be text.
    lines = [os.fsdecode(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError("the manifest names no input", manifest, "one path or URL per line")
    folder = Path() if manifest == STDIN else Path(manifest).parent
    return [one for name in dict.fromkeys(names) for one in _listed(name, folder, out)]


def _read(manifest: str) -> bytes:
    if manifest == STDIN:
        data = sys.stdin.buffer.read(_MOST + 1)
    else:
        if not is_file(manifest) and not Path(manifest).is_fifo():
            raise InputError("no such manifest", manifest, "check --manifest")
        with convert_errors(manifest), Path(manifest).open("rb") as file:
            data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise InputError("the manifest is too long to be one", manifest, "check --manifest")
    return data


def _listed(name: str, folder: Path, out: Path) -> list[Input]:
    entry = named(name)
    if isinstance(entry, RemoteName):
        return expand(entry, out)
    path = folder / entry
    try:
        found = expand(path, out)
    except InputError:
        return [Input(path, Path(entry.name))]  # there is none: opening it says so
    if entry.is_absolute() or ".." in entry.parts:
        return found
    if is_pattern(path):
        above = fixed_part(path).relative_to(folder)
    else:
        above = entry if is_collection(path) else entry.parent
    return [replace(one, stem=above / one.stem) for one in found]
