"""A store in a scratch folder, sent to an object store as its blocks are done; its root last."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

from tilenet.engine.journal import BlockRecord, decode, encode
from tilenet.engine.lease import Lease
from tilenet.engine.objects import Objects
from tilenet.errors import OutputError, VerifyError
from tilenet.sinks import Seal, ZarrFormat, seal_path

__all__ = ["Mirror"]

_THREADS = 8
_WAITING = 32  # blocks that wait for a thread, before the run waits for them


class Mirror:
    """The remote copy of a run's store.

    Parameters
    ----------
    objects : Objects
        The place that holds both of these.
    name, run : str
        The mask and the run's own objects, as prefixes.
    lease : Lease
        Asked before anything is written.
    done : set of int
        Blocks that are there.

    Attributes
    ----------
    finished : bool
        The mask there is complete.
    """

    def __init__(self, objects: Objects, name: str, run: str, lease: Lease, done: set[int]) -> None:
        self._objects, self._name, self._run, self._lease = objects, name, run, lease
        self._done, self._where = done, objects.where
        self._pool = ThreadPoolExecutor(_THREADS, "tilenet-upload")
        self._room = threading.Semaphore(_THREADS + _WAITING)
        self._running: set[Future[None]] = set()
        self.finished = False

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, root: Path, records: Iterable[BlockRecord]) -> None:
        """Send blocks that are done here; return before they are there, but not long before.

        Parameters
        ----------
        root : Path
            The store here.
        records : iterable of BlockRecord
            What it holds.

        Raises
        ------
        TilenetError
            Sending an earlier block failed.
        """
        for record in records:
            if record.block not in self._done:
                self._done.add(record.block)
                self._submit(partial(self._send, root, record))

    def drain(self) -> None:
        """Wait until everything is there."""
        for future in list(self._running):
            future.result()
            self._running.discard(future)

    def finish(self, root: Path, zarr_format: ZarrFormat) -> None:
        """Send what is left of a finished store, its root last.

        Raises
        ------
        OutputError
            Another run has taken over, or what is there is not what was sent.
        VerifyError
            The scratch folder is damaged.
        """
        seal = Seal.decode((root / seal_path(zarr_format)).read_bytes())
        if seal is None:
            raise _damaged(root / seal_path(zarr_format))
        records = decode(seal.documents["journal"])[0]
        self.take(root, records)
        chunks = {path for record in records for path, digest, _ in record.files if digest}
        sizes = _sizes(root)
        tops = [path for path in sizes if "/" not in path]
        for path in sorted(sizes.keys() - chunks - set(tops)):
            self._submit(partial(self._put, root, path, seal.files.get(path)))
        self.drain()
        self._compare({path: size for path, size in sizes.items() if path not in tops})
        for path in sorted(
            tops
        ):  # the one by which `RemoteOutput` knows a finished mask comes last
            self._put(root, path, seal.files[path])
        self.finished = True

    def _submit(self, work: Callable[[], None]) -> None:
        for future in [one for one in self._running if one.done()]:
            future.result()
            self._running.discard(future)
        self._room.acquire()
        future = self._pool.submit(work)
        self._running.add(future)
        future.add_done_callback(lambda _: self._room.release())

    def _send(self, root: Path, record: BlockRecord) -> None:
        for path, digest, _ in record.files:
            if digest is not None:
                self._put(root, path, digest)
        self._lease.check()
        self._objects.put(f"{self._run}/blocks/{record.block}.json", encode(record))

    def _put(self, root: Path, path: str, digest: str | None) -> None:
        data = (root / path).read_bytes()
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(root / path)
        self._lease.check()
        self._objects.put(f"{self._name}/{path}", data)

    def _compare(self, wanted: dict[str, int]) -> None:
        """Raise unless the objects there are those of the store, by name and size."""
        left = dict(wanted)
        for key, size in self._objects.sizes(self._name):
            path = key.removeprefix(f"{self._name}/")
            if left.pop(path, None) != size and "/" in path:
                raise OutputError(
                    f"{path} is not what was sent", self._where, "run again with --overwrite"
                )
        if left:
            raise OutputError(
                f"{min(left)} was removed meanwhile", self._where, "run again with --overwrite"
            )


def _damaged(file: Path) -> VerifyError:
    return VerifyError(
        "what was to be sent is damaged", file, "remove the scratch folder, and run again"
    )


def _sizes(root: Path) -> dict[str, int]:
    """Return the bytes of every file of a store by its path in it."""
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            file = Path(folder, name)
            found[file.relative_to(root).as_posix()] = file.stat().st_size
    return found
