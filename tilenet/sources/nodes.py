"""Groups and arrays of a Zarr store by their metadata, which is checked before zarr sees any of it.

Whoever made the store may be a stranger: documents are bounded, names stay inside the store, and an
array is described to zarr anew, with none but the codecs and the kinds of pixels that are known.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tilenet.errors import InputError, ResourceError
from tilenet.sources.rasterinfo import AS_READ, CONVERTED
from tilenet.strangers import exists, parse_json

__all__ = [
    "MAX_DOCUMENT",
    "METADATA",
    "Folder",
    "Keys",
    "Node",
    "Range",
    "child_nodes",
    "inner_path",
    "read_node",
]

METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
"""Names of the documents."""

Range = tuple[int, int | None]
"""First and one-past-last byte; a negative first counts from the end."""

MAX_DOCUMENT = 16 << 20
"""Bytes of a document."""
_MAX_CHUNK_BYTES = 64 << 20
_MAX_SHARD_PARTS = 1 << 20
_MAX_AXES = 8
_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_MAX_CHILDREN = 10_000


class Keys(Protocol):
    """A store as bytes by key; keys have forward slashes and do not begin with one."""

    name: str

    def get(self, key: str, most: int, part: Range | None = None) -> bytes | None:
        """Return what lies there or a part of it, None if nothing; OSError for over `most`."""

    def children(self, path: str) -> list[str]:
        """Return the names directly below a path, in order."""

    def marks(self, path: str, most: int) -> Iterator[str]:
        """Yield what changes when a file below a path does; of more than `most`, some."""


def _raise(error: OSError) -> None:
    raise error


def _content(path: str, key: str, most: int, part: Range | None) -> bytes:
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first, stop = (0, None) if part is None else part
        first = max(0, size + first) if first < 0 else first
        wanted = max(0, min(size, stop or size) - first)
        if wanted > most:
            raise OSError(f"{key} has {wanted} bytes, more than the {most} that can be")
        file.seek(first)
        return file.read(wanted)


class Folder:
    """A store in a local folder; nothing outside of it is read, whatever links there are.

    Parameters
    ----------
    root : str
        The folder.
    """

    def __init__(self, root: str) -> None:
        self.name = root
        self._root = os.path.realpath(root)
        self._was_there = False

    def _inside(self, key: str) -> str:
        path = os.path.join(self._root, key)  # noqa: PTH118 - thousands of these
        real = os.path.realpath(path)
        if real != path and os.path.commonpath((real, self._root)) != self._root:
            raise PermissionError(f"{key} lies outside of the store")
        return real

    def get(self, key: str, most: int, part: Range | None = None) -> bytes | None:
        """Return what lies there or a part of it, None if nothing.

        What the disk does not give just now is not nothing: zarr would fill its place.
        """
        path = self._inside(key)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a pipe would never end
                return None
            self._was_there = True
            return _content(path, key, most, part)
        except OSError as error:
            if error.errno not in _NOTHING:
                raise
        if self._was_there and not exists(self._root):
            raise OSError(errno.ESTALE, "the store has gone", self._root)
        return None

    def children(self, path: str) -> list[str]:
        """Return the names of the folders directly below a path, in order."""
        with os.scandir(self._inside(path)) as found:
            names = [one.name for one in found if one.is_dir()]
        return sorted(names)

    def marks(self, path: str, most: int) -> Iterator[str]:
        """Yield names, sizes and times of files; beyond `most` only their folders' times."""
        top, left = Path(self._inside(path)), most
        for base, folders, files in os.walk(top, onerror=_raise):
            folders.sort()
            inside = Path(base)
            yield str(inside.relative_to(top))
            for name in sorted(files)[: max(0, left)]:
                found = (inside / name).stat(follow_symlinks=False)
                yield f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
            left -= len(files)
            if left < 0:
                yield f"{inside.stat().st_mtime_ns}\0{len(files)}"


@dataclass(frozen=True, slots=True)
class Node:
    """A group or an array of a store.

    Parameters
    ----------
    path : str
        Inside the store; "" for its root.
    document : mapping
        `zarr.json`, or `.zarray` of format 2; empty for a group of format 2.
    attributes : mapping
        What it says of itself.
    zarr_format : {2, 3}
        Format.
    """

    path: str
    document: Mapping[str, Any]
    attributes: Mapping[str, Any]
    zarr_format: int

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return "shape" in self.document

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every axis."""
        return tuple(self.document["shape"])

    @property
    def dtype(self) -> str:
        """Numpy name of its values, in the machine's order; "" for what is no number."""
        kind = self.document.get("data_type" if self.zarr_format == 3 else "dtype")
        if not isinstance(kind, str):
            return ""
        if self.zarr_format == 3:
            return kind if re.fullmatch(r"(u?int|float)(8|16|32|64)", kind) else ""
        found = re.fullmatch(r"[<>|=]([uif])([1248])", kind)
        names = {"u": "uint", "i": "int", "f": "float"}
        return f"{names[found[1]]}{8 * int(found[2])}" if found else ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Name of every axis; empty if they have none."""
        said = (
            self.document.get("dimension_names") if self.zarr_format == 3 else None
        ) or self.attributes.get("_ARRAY_DIMENSIONS")
        if not isinstance(said, list) or not all(isinstance(one, str) and one for one in said):
            return ()
        return tuple(said) if len(said) == len(self.document.get("shape", ())) else ()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Size of what is decoded at a time; the inner chunks of a sharded array."""
        sharding = _sharding(self.document) if self.zarr_format == 3 else None
        return tuple((sharding or {}).get("chunk_shape") or self.stored_chunks)

    @property
    def stored_chunks(self) -> tuple[int, ...]:
        """Size of what is stored under one key."""
        if self.zarr_format == 2:
            return tuple(self.document["chunks"])
        return tuple(self.document["chunk_grid"]["configuration"]["chunk_shape"])

    def check(self, store: str, *, pixels: bool) -> None:
        """Raise InputError unless this is an array that can be read.

        Parameters
        ----------
        store : str
            For errors.
        pixels : bool
            Whether its values must be of a kind that is read as pixels.
        """
        where = f"{store} ({self.path})" if self.path else store
        try:
            _check_sizes(self, where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("its metadata is no array's", where, "check the store") from error
        if self.dtype not in (*AS_READ, *CONVERTED, "int64", "uint64"):
            raise InputError(
                f"pixels are {self.document.get('data_type') or self.document.get('dtype')}",
                where, "convert them to 8- or 16-bit integers or float32",
            )  # fmt: skip
        if pixels and 0 in self.shape:
            raise InputError("it is empty", where, "check the store")
        if pixels and self.dtype not in AS_READ and self.dtype not in CONVERTED:
            raise InputError(
                f"pixels are {self.dtype}", where,
                "convert them to 8- or 16-bit integers or float32",
            )  # fmt: skip


def _sharding(document: Mapping[str, Any]) -> dict[str, Any] | None:
    codecs = document.get("codecs")
    if isinstance(codecs, list) and len(codecs) == 1 and isinstance(codecs[0], dict):
        found = codecs[0].get("configuration")
        if codecs[0].get("name") == "sharding_indexed" and isinstance(found, dict):
            return found
    return None


def _check_sizes(node: Node, where: str) -> None:
    shape, chunks, stored = node.shape, node.chunks, node.stored_chunks
    if node.zarr_format == 3 and node.document["chunk_grid"]["name"] != "regular":
        raise InputError("its chunks are of many sizes", where, "write it in equal chunks")
    for sizes in (shape, chunks, stored):
        if len(sizes) != len(shape) or not all(type(n) is int and 0 <= n < 1 << 31 for n in sizes):
            raise ValueError("sizes")
    if len(shape) > _MAX_AXES or min(*chunks, *stored, 1) < 1:
        raise ValueError("axes")
    # The kind is checked by the caller; 8 bytes are the most that a number has.
    size = int(re.sub(r"\D", "", node.dtype) or 64) // 8
    if math.prod(chunks) * size > _MAX_CHUNK_BYTES:
        sides = "×".join(map(str, chunks))
        raise InputError(
            f"one chunk is {sides} values, more than 64 MiB", where, "rewrite it in smaller chunks"
        )
    if math.prod(-(-n // m) for n, m in zip(stored, chunks, strict=True)) > _MAX_SHARD_PARTS:
        raise InputError("one shard has over a million chunks", where, "rewrite it in smaller ones")


def _document(keys: Keys, key: str) -> dict[str, Any] | None:
    """Return a JSON document of the store, None if there is none."""
    try:
        text = keys.get(key, MAX_DOCUMENT)
        found = None if text is None else parse_json(text)
    except PermissionError as error:
        raise InputError(str(error), keys.name, "no link out of it is followed") from error
    except ValueError as error:
        raise InputError(f"{key} is no JSON", keys.name, "check the store") from error
    except OSError as error:
        if error.errno is not None:
            raise ResourceError(f"cannot be read: {error}", keys.name, "a rerun resumes") from error
        raise InputError(str(error), keys.name, "check the store") from error
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{key} is no object", keys.name, "check the store")
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def inner_path(base: str, name: object, store: str) -> str:
    """Return the path of something that metadata names, relative to a group.

    Raises
    ------
    InputError
        It is no name, or leads out of the store.
    """
    parts = [p for p in name.split("/") if p not in ("", ".")] if isinstance(name, str) else []
    if not isinstance(name, str) or name.startswith("/") or ".." in parts or "\0" in name:
        raise InputError(f"names {name!r} as a part of it", store, "check the store")
    return "/".join([*([base] if base else []), *parts])


def read_node(keys: Keys, path: str) -> Node | None:
    """Return the group or array at a path inside a store, None if there is none.

    Raises
    ------
    InputError
        Its metadata cannot be read.
    """
    base = f"{path}/" if path else ""
    three = _document(keys, f"{base}zarr.json")
    if three is not None:
        if three.get("zarr_format") != 3:
            raise InputError("not of Zarr format 2 or 3", keys.name, "check the store")
        attributes = _mapping(three.get("attributes"))
        array = three.get("node_type") == "array"
        return Node(path, three if array and "shape" in three else {}, attributes, 3)
    two = _document(keys, f"{base}.zarray")
    if two is None and _document(keys, f"{base}.zgroup") is None:
        return None
    attributes = _mapping(_document(keys, f"{base}.zattrs"))
    return Node(path, two if two is not None and "shape" in two else {}, attributes, 2)


def child_nodes(keys: Keys, path: str) -> list[Node]:
    """Return the groups and arrays directly below a group.

    Raises
    ------
    InputError
        There are too many to look at, or their metadata cannot be read.
    """
    names = keys.children(path)
    if len(names) > _MAX_CHILDREN:
        raise InputError(f"a group of {len(names)} parts", keys.name, "name one with --variable")
    found = (read_node(keys, f"{path}/{name}" if path else name) for name in names)
    return [node for node in found if node is not None]
