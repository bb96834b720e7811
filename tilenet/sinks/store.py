"""The Zarr store of one mask: metadata by zarr, chunks by us, each on disk when the call returns.

zarr writes the few metadata files, so that they are right. The pixel chunks are encoded and written
here: zarr's own store does not sync (a power cut loses chunks it called written), and the journal
keeps the hash of the very bytes handed to the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from tilenet import durable
from tilenet.errors import InputError, OutputError, VerifyError
from tilenet.geometry import Window
from tilenet.sinks.metadata import SCHEMA
from tilenet.sinks.seal import SEAL
from tilenet.sinks.skeleton import complete, encode, skeleton
from tilenet.sinks.spec import ArrayLayout, MaskSpec

__all__ = ["MaskStore", "StoredChunk", "document", "documents", "open_store"]


_UNREADABLE = (
    RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error,
    FileNotFoundError, OverflowError, RecursionError,
)  # fmt: skip
"""What zarr and its codecs raise where metadata or a chunk is damaged."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What `MaskStore.write` did with one chunk.

    Parameters
    ----------
    path : str
        File, relative to the store's root, with forward slashes.
    sha256 : str or None
        Of the stored bytes; None for a chunk of fill values, which has no file.
    size : int
        Stored bytes.
    """

    path: str
    sha256: str | None
    size: int


class MaskStore:
    """A mask on disk: a pyramid `mask`, `ovr_2x/mask` …, and optionally `prob`.

    Any number of threads and processes may hold one for the same `root`, as long as no two write
    different pixels to one chunk.

    Parameters
    ----------
    root : Path
        The store's folder.
    spec : MaskSpec
        What is in it.
    lasting : bool
        What is written is on disk when the call returns; otherwise, for a store that is made in one
        go, when `finish` does.
    """

    def __init__(self, root: Path, spec: MaskSpec, *, lasting: bool = True) -> None:
        self.root = root
        self._lasting = lasting
        self.spec = spec
        self._layouts = spec.layouts
        self._lock = threading.Lock()
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._durable: set[Path] = set()  # directories whose name is known to be on disk

    def create(self) -> None:
        """Make the store with all its metadata and no pixel; it appears complete or not at all.

        Raises
        ------
        OutputError
            If there is something at `root`.
        """
        if self.root.exists():
            raise OutputError("output exists", self.root, "choose another path")
        temp = durable.temporary(self.root)
        try:
            for path, data in skeleton(self.spec).items():
                (temp / path).parent.mkdir(parents=True, exist_ok=True)
                (temp / path).write_bytes(data)
            if self._lasting:
                _sync_tree(temp)
            durable.rename(temp, self.root)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise

    def write(self, array: str, data: NDArray[np.uint8], row: int, col: int) -> list[StoredChunk]:
        """Store whole chunks of one array; they are on disk when the call returns.

        Parameters
        ----------
        array : str
            A path of `spec.layouts`.
        data : ndarray of uint8
            (h, w), or (channels, h, w) for `prob`. It ends at a chunk's or the array's border.
        row, col : int
            Where it begins, a multiple of the chunk.

        Returns
        -------
        list of StoredChunk
            One for each chunk, in array order.

        Raises
        ------
        ValueError
            If `data` does not cover whole chunks.
        OSError
            As the system says; the chunks that were written stay.
        """
        layout = self._layouts[array]
        _check_extent(layout, data.shape, row, col)
        stored, touched = [], set()
        for index, block in _chunks(layout, data, row, col):
            chunk, changed = self._put(layout, index, block)
            stored.append(chunk)
            if changed:
                touched.add((self.root / chunk.path).parent)
        for folder in sorted(touched) if self._lasting else ():
            durable.sync_directory(folder)
        return stored

    def read(self, array: str, window: Window) -> NDArray[np.uint8]:
        """Return the pixels of `window`: (height, width), or (channels, height, width) for `prob`.

        Raises
        ------
        VerifyError
            If a chunk is damaged.
        """
        try:
            with self._lock:
                if array not in self._arrays:
                    self._arrays[array] = zarr.open_array(
                        self.root / array, mode="r", zarr_format=self.spec.zarr_format
                    )
            return np.asarray(self._arrays[array][(..., *window.slices())])
        except _UNREADABLE as err:
            raise VerifyError(
                f"a chunk cannot be decoded ({err})", self.root / array, "run `tilenet verify`"
            ) from err

    def has_chunk(self, path: str) -> bool:
        """Return whether a path, from wherever, is that of a chunk of this store's pixels."""
        prefix = "" if self.spec.zarr_format == 2 else "c/"
        return any(
            re.fullmatch(
                rf"{re.escape(layout.path)}/{prefix}\d+(/\d+){{{len(layout.shape) - 1}}}", path
            )
            for layout in self._layouts.values()
        )

    def put_back(self, path: str, data: bytes) -> None:
        """Store a chunk as it was encoded before; its path passes `has_chunk`."""
        self._store(self.root / path, data)

    def finish(self, pixels: Mapping[int, int], documents: Mapping[str, bytes]) -> None:
        """Add what is known only at the end, mark the store complete and make all of it durable.

        Running it again, after a crash too, gives the same bytes. No block may be written
        meanwhile: temporary files that a killed writer left are removed.

        Parameters
        ----------
        pixels : mapping of int to int
            Pixels of each class id at full resolution.
        documents : mapping of str to bytes
            Kept as arrays `tilenet/<name>`, because readers warn about loose files.
        """
        for _, files in _walk(self.root):
            for file in files:
                if file.name.endswith((".tmp", ".partial")):
                    file.unlink()
        whole = complete(self.spec, pixels, documents)
        for path in sorted(whole, key=lambda p: ("/" not in p, p)):  # the root's come last
            target = self.root / path
            if not target.exists() or target.read_bytes() != whole[path]:
                self._store(target, whole[path])
        if not self._lasting:
            _sync_tree(self.root)

    def _put(
        self, layout: ArrayLayout, index: tuple[int, ...], block: NDArray[np.uint8]
    ) -> tuple[StoredChunk, bool]:
        """Write or remove one chunk; return it and whether its directory changed."""
        prefix = () if self.spec.zarr_format == 2 else ("c",)
        path = "/".join((layout.path, *prefix, *map(str, index)))
        file = self.root / path
        if self.spec.stated_fill(layout) is not None and bool((block == layout.fill).all()):
            try:
                file.unlink()
            except FileNotFoundError:
                return StoredChunk(path, None, 0), False
            return StoredChunk(path, None, 0), True
        if block.shape != layout.chunks:
            whole = np.full(layout.chunks, layout.fill, np.uint8)
            whole[tuple(slice(n) for n in block.shape)] = block
            block = whole
        data = encode(self.spec, np.ascontiguousarray(block))
        self._store(file, data, sync_parent=False)
        return StoredChunk(path, hashlib.sha256(data).hexdigest(), len(data)), True

    def _store(self, file: Path, data: bytes, *, sync_parent: bool = True) -> None:
        if self._lasting:
            self._ensure_directory(file.parent)
            durable.write(file, data, sync_parent=sync_parent)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def _ensure_directory(self, folder: Path) -> None:
        """Make `folder` durable; another thread that made it may not have synced it yet."""
        if folder == self.root or folder in self._durable:
            return
        self._ensure_directory(folder.parent)
        folder.mkdir(exist_ok=True)
        durable.sync_directory(folder.parent)
        self._durable.add(folder)


def open_store(root: Path) -> MaskStore:
    """Return the mask at `root`, complete or not.

    Raises
    ------
    InputError
        If there is no store of tilenet's.
    """
    try:
        attributes = zarr.open_group(root, mode="r", use_consolidated=False).attrs.asdict()
        ours: Any = attributes["tilenet"]
        if ours["schema"] != SCHEMA:
            raise InputError(f"mask of schema {ours['schema']}", root, "update tilenet")
        return MaskStore(root, MaskSpec.from_dict(ours["spec"]))
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as err:
        raise InputError("not a mask made by tilenet", root, "give the folder of a mask") from err


_MOST_PACKED = 1000
"""How many times smaller than itself a document can be."""


def documents(root: Path) -> dict[str, bytes]:
    """Return the documents that `MaskStore.finish` put into the store at `root`, by name.

    Raises
    ------
    InputError
        If there is no store of tilenet's.
    """
    store = open_store(root)
    try:
        group = zarr.open_group(
            root, mode="r", zarr_format=store.spec.zarr_format, use_consolidated=False
        )
        if "tilenet" not in group:
            return {}
        folder = group["tilenet"]
        if not isinstance(folder, zarr.Group):
            raise TypeError("our documents lie in a group")
        return {
            name: _content(array, root / "tilenet" / name)
            for name, array in sorted(folder.arrays())
            if name != SEAL
        }
    except _UNREADABLE as err:
        raise VerifyError(
            f"a document cannot be decoded ({err})", root, "run `tilenet verify`"
        ) from err


def _content(array: zarr.Array[Any], place: Path) -> bytes:
    """Return a document's bytes; raises ValueError if no such text could take so few files."""
    stored = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    if array.nbytes > _MOST_PACKED * stored:
        raise ValueError(f"{array.nbytes} bytes of {stored}")
    return np.asarray(array[...]).tobytes()


def document(root: Path, name: str) -> bytes:
    """Return one of the documents, without a look at the rest of the store: for thousands of them.

    Raises
    ------
    InputError
        If there is none that reads.
    """
    try:
        place = root / "tilenet" / name
        return _content(zarr.open_array(place, mode="r"), place)
    except (*_UNREADABLE, OSError) as err:
        raise InputError("not a mask made by tilenet", root, "give the folder of a mask") from err


def _check_extent(layout: ArrayLayout, shape: tuple[int, ...], row: int, col: int) -> None:
    begin = (0,) * (len(layout.shape) - 2) + (row, col)
    whole = len(shape) == len(layout.shape) and all(
        start % chunk == 0
        and n > 0
        and (start + n == side or (start + n < side and n % chunk == 0))
        for start, n, side, chunk in zip(begin, shape, layout.shape, layout.chunks, strict=True)
    )
    if not whole:
        raise ValueError(
            f"{layout.path}{layout.shape}: {shape} at {begin} is not whole chunks {layout.chunks}"
        )


def _chunks(
    layout: ArrayLayout, data: NDArray[np.uint8], row: int, col: int
) -> Iterator[tuple[tuple[int, ...], NDArray[np.uint8]]]:
    """Yield (chunk index, pixels) of each chunk, the last of an axis possibly cut short."""
    height, width = layout.chunks[-2:]
    planar = data.ndim == 2
    for k, plane in enumerate(data[None] if planar else data):
        for top in range(0, plane.shape[0], height):
            for left in range(0, plane.shape[1], width):
                block = plane[top : top + height, left : left + width]
                index = ((row + top) // height, (col + left) // width)
                yield (index, block) if planar else ((k, *index), block[None])


def _walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield every directory below `root`, the deepest first, with its files."""
    for folder, _, files in os.walk(root, topdown=False):
        yield Path(folder), [Path(folder, name) for name in sorted(files)]


def _sync_tree(root: Path) -> None:
    folders, files = [], list[Path]()
    for folder, inside in _walk(root):
        folders.append(folder)
        files += inside
    durable.sync_all(files, folders)
