"""A mask in an object store: made in a scratch folder here, mirrored there, and taken up again.

What lies there decides. The scratch folder holds an ordinary local run; what it lacks is fetched,
what does not belong to the run there is thrown away.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

from tilenet import durable
from tilenet.engine.document import Finished, finished_of
from tilenet.engine.inspection import Inspection, compare
from tilenet.engine.journal import BlockRecord, Journal, decode
from tilenet.engine.large import JOURNAL
from tilenet.engine.lease import INTERVAL, Lease
from tilenet.engine.mirror import Mirror
from tilenet.engine.objects import Objects
from tilenet.engine.output import check_output, differing, plan_in_progress, tile_of
from tilenet.engine.plan import Plan
from tilenet.engine.recipe import lattice_of
from tilenet.engine.runfolder import (
    LOCK,
    PLAN,
    STORE,
    STRIPS,
    empty,
    locked,
    remove_run_folder,
    run_folder,
)
from tilenet.errors import InputError, OutputError, TilenetError, UsageError, VerifyError
from tilenet.models.store import ModelFiles, cache_folder
from tilenet.sinks import MaskStore, Seal, documents, seal_path
from tilenet.sources import RemoteName
from tilenet.strangers import parse_json

__all__ = ["RemoteOutput"]

_TOKEN = "token"  # noqa: S105 - the name of a file that tells one scratch folder from another
_CLEARING = "clearing"
_MOST = 1 << 32  # bytes of a document: a seal holds the whole journal
_BATCH = 64
_THREADS = 8
_ROOTS = ((3, "zarr.json"), (2, ".zmetadata"))
"""The object of a finished mask that is written last, by Zarr format."""


class RemoteOutput:
    """A mask's place in an object store and its scratch folder here.

    Parameters
    ----------
    place : RemoteName
        ``s3://bucket/…/x.zarr``.
    scratch : Path or None
        In which the scratch folder lies; None: in the user's cache.
    interval : float
        Seconds between two signs of life.

    Raises
    ------
    UsageError
        The name is not such a one, or the extra is not installed.
    """

    def __init__(
        self, place: RemoteName, scratch: Path | None, *, interval: float = INTERVAL
    ) -> None:
        parts = place.url.partition("://")[2].split("/")
        usual = not {"", ".", ".."} & set(parts) and not re.search(r"[?#%\s]", place.url)
        if place.scheme != "s3" or len(parts) < 2 or not usual or place.suffix != ".zarr":
            raise UsageError(
                "a mask elsewhere is s3://bucket/path/NAME.zarr", place, "or write it to a disk"
            )
        self.place, self._name, self._run = place, place.name, f".{place.name}.tilenet"
        self._objects = Objects(RemoteName(place.url.rpartition("/")[0]), place.url)
        self._interval = interval
        digest = hashlib.sha256(place.url.encode()).hexdigest()[:32]
        self._folder = (scratch or cache_folder() / "scratch").absolute() / digest
        self.local = self._folder / place.name

    def known(self) -> Plan | None:
        """Return the plan of an unfinished run, there or here."""
        return self._plan() or plan_in_progress(self.local, overwrite=True)

    def tile(self, files: ModelFiles, usual: int) -> int | None:
        """Return the tile of a mask that is there, or begun, if "auto" means it (`tile_there`)."""
        known = self.known()
        if known is not None:
            return known.automatic_tile(files, usual)
        return tile_of(self._document() or {}, files, usual)

    def look(self, plan: Plan, *, overwrite: bool) -> Finished | None:
        """Return the figures if there is already this plan's complete result, else None.

        Raises
        ------
        OutputError
            There is something else, and it is not to be overwritten.
        """
        document = self._document()
        if document is None or overwrite:
            return None
        self._require_same(plan, document.get("identity", {}), "the output was made by another run")
        done = finished_of(document)
        done.check(plan)
        return done

    def check(self, plan: Plan, *, overwrite: bool) -> Finished | None:
        """Do what `look` does, and remove what a crash has left of a run that was finished."""
        done = self.look(plan, overwrite=overwrite)
        if done is None:
            return None
        if next(self._objects.sizes(self._run), None) is not None or self._folder.exists():
            with self._scratch() as token, self._lease(token, plan) as lease:
                self._clear_run(lease)
                remove_run_folder(self._folder)
        return done

    def inspect(self) -> Inspection:
        """Look at every object of a mask.

        Raises
        ------
        InputError
            Nothing is there.
        VerifyError
            The seal is missing or damaged, so that nothing can be compared.
        """
        if next(self._objects.sizes(self._name), None) is None:
            raise InputError("no such mask", self.place, "check the name")
        for path in (seal_path(3), seal_path(2)):
            found = self._objects.get(f"{self._name}/{path}", _MOST)
            seal = None if found is None else Seal.decode(found.data)
            if seal is not None:
                own = hashlib.sha256(seal.encode()).hexdigest()
                files: dict[str, str | None] = {**seal.files, path: own}
                return compare(Path(self._name), seal.documents, files, self._hashes())
        raise VerifyError(
            "its seal is missing or damaged", self.place, "make the mask again, with --overwrite"
        )

    def _hashes(self) -> Iterator[tuple[str, str | None]]:
        """Yield every object of the mask with its hash."""

        def digest(key: str, size: int) -> tuple[str, str | None]:
            found = self._objects.get(key, size)
            path = key.removeprefix(f"{self._name}/")
            return path, None if found is None else hashlib.sha256(found.data).hexdigest()

        with ThreadPoolExecutor(_THREADS) as pool:
            for some in batched(self._objects.sizes(self._name), _BATCH):
                yield from pool.map(digest, *zip(*some, strict=True))

    @contextmanager
    def owned(self, plan: Plan, *, overwrite: bool) -> Iterator[Mirror]:
        """Own the output; the run is to be made at `local`, and `Mirror.finish` to end it.

        Parameters
        ----------
        plan : Plan
            The run.
        overwrite : bool
            Replace an output or an unfinished run of ours.

        Raises
        ------
        OutputError
            It is another run's, or foreign.
        """
        with self._scratch() as token:
            with self._lease(token, plan) as lease:
                self._settle(plan, lease, overwrite=overwrite)
                done = self._take_up(plan, lease)
                with Mirror(self._objects, self._name, self._run, lease, done) as mirror:
                    yield mirror
                if mirror.finished:
                    self._clear_run(lease)
            if mirror.finished:
                remove_run_folder(self._folder)

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        """Own the scratch folder; yield its token."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder):
            file = self._folder / _TOKEN
            if not file.exists():
                durable.write(file, secrets.token_hex(16).encode())
            yield file.read_text()

    def _lease(self, token: str, plan: Plan) -> Lease:
        key = f"{self._run}/owner"
        return Lease(self._objects, key, token, plan.hash, self.place.url, self._interval)

    def _require_same(self, plan: Plan, theirs: dict[str, Any], what: str) -> None:
        keys = differing(plan.identity(), theirs)
        if keys:
            raise OutputError(
                f"{what} (differs in {', '.join(keys)})", self.place,
                "choose another --out, or --overwrite",
            )  # fmt: skip

    def _plan(self) -> Plan | None:
        found = self._objects.get(f"{self._run}/{PLAN}", _MOST)
        try:
            return None if found is None else Plan.load(found.data)
        except ValueError as error:
            raise OutputError(
                "an unfinished run there does not read", self.place,
                f"remove {self._run} and what lies at the output",
            ) from error  # fmt: skip

    def _document(self) -> dict[str, Any] | None:
        """Return the plan document of a finished mask, None if there is no root."""
        for zarr_format, root in _ROOTS:
            if self._objects.get(f"{self._name}/{root}", _MOST) is None:
                continue
            place = f"{self._name}/{seal_path(3 if zarr_format == 3 else 2)}"
            found = self._objects.get(place, _MOST)
            seal = None if found is None else Seal.decode(found.data)
            if seal is None or "plan" not in seal.documents:
                raise OutputError(
                    "the output exists and is not tilenet's", self.place, "choose another --out"
                )
            return dict(parse_json(seal.documents["plan"]))
        return None

    def _settle(self, plan: Plan, lease: Lease, *, overwrite: bool) -> None:
        """Make what lies there this plan's unfinished run, or nothing; raise if it may not be."""
        if self._objects.get(f"{self._run}/{_CLEARING}", _MOST) is not None:
            self._clear(lease)
        document, known = self._document(), self._plan()
        if document is None and known is None:
            if next(self._objects.sizes(self._name), None) is not None:
                raise OutputError(
                    "there is something at the output that is not tilenet's", self.place,
                    "choose another --out, or move it away",
                )  # fmt: skip
        elif overwrite and (document is not None or known is None or known.hash != plan.hash):
            self._clear(lease)
        elif document is not None:
            raise OutputError(
                "another run has just finished this output", self.place, "look at it, or run again"
            )
        elif known is not None:
            self._require_same(plan, known.identity(), "an unfinished run of this output")
            # One block is made in another way, which the journal shows.
            if known.lattice != plan.lattice and 1 in (known.lattice.blocks, plan.lattice.blocks):
                self._clear(lease)

    def _clear(self, lease: Lease) -> None:
        """Remove a mask and a run of ours; a clearing that is cut short goes on the next time."""
        lease.check()
        self._objects.put(f"{self._run}/{_CLEARING}", b"")
        for _, root in _ROOTS:  # first, so that no reader sees a part of it
            self._objects.delete([f"{self._name}/{root}"])
        self._remove(self._name, lease)
        self._clear_run(lease)

    def _clear_run(self, lease: Lease) -> None:
        """Remove what a run keeps beside the mask, but for its owner."""
        self._remove(f"{self._run}/blocks", lease)
        self._objects.delete([f"{self._run}/{PLAN}"])
        self._objects.delete([f"{self._run}/{_CLEARING}"])

    def _remove(self, folder: str, lease: Lease) -> None:
        for some in batched(self._objects.sizes(folder), 1000):
            lease.check()
            self._objects.delete(key for key, _ in some)

    def _take_up(self, plan: Plan, lease: Lease) -> set[int]:
        """Make the scratch folder hold what lies there; return the blocks that need no sending."""
        known, here = self._plan(), plan_in_progress(self.local, overwrite=True)
        folder = f"{self._run}/blocks"
        names = [key.removeprefix(f"{folder}/") for key, _ in self._objects.sizes(folder)]
        there = {int(name[:-5]) for name in names if re.fullmatch(r"(-1|\d+)\.json", name)}
        if known is not None and there:
            plan = replace(plan, lattice=known.lattice)
        elif here is not None and here.hash == plan.hash:
            plan = replace(plan, lattice=here.lattice)
        whole = self._is_finished_here(plan)
        if not whole and (here is None or (here.hash, here.lattice) != (plan.hash, plan.lattice)):
            empty(self._folder, keep=(LOCK, _TOKEN))
        lease.check()
        self._objects.put(f"{self._run}/{PLAN}", plan.dump())
        if whole or plan.lattice.blocks == 1 or not there:
            return there
        return self._fetch(plan, there)

    def _is_finished_here(self, plan: Plan) -> bool:
        """Whether the scratch folder holds the whole mask, of which a part was not sent."""
        try:
            if check_output(self.local, plan, overwrite=False) is None:
                return False
            return lattice_of(parse_json(documents(self.local)["plan"])) == plan.lattice
        except TilenetError:
            return False

    def _fetch(self, plan: Plan, there: set[int]) -> set[int]:
        """Fetch the blocks that are missing here; return those that are whole there."""
        folder = run_folder(self.local)
        (folder / STRIPS).mkdir(parents=True, exist_ok=True)
        store = MaskStore(folder / STORE, plan.spec)
        if not store.root.exists():
            store.create()
        durable.write(folder / PLAN, plan.dump())
        with Journal(folder / JOURNAL) as journal, ThreadPoolExecutor(_THREADS) as pool:
            good = there & journal.blocks
            for some in batched(sorted(there - good), _BATCH):
                found = pool.map(partial(self._fetch_block, store), some)
                records = [record for record in found if record is not None]
                journal.append(records)
                good |= {record.block for record in records}
        return good

    def _fetch_block(self, store: MaskStore, block: int) -> BlockRecord | None:
        """Fetch one block; None if it is not what its record says, and must be made again."""
        found = self._objects.get(f"{self._run}/blocks/{block}.json", _MOST)
        records = [] if found is None else decode(found.data)[0]
        if [record.block for record in records] != [block]:
            return None
        for path, digest, size in records[0].files:
            if not store.has_chunk(path):
                return None
            if digest is None:
                continue
            chunk = self._objects.get(f"{self._name}/{path}", size)
            if chunk is None or hashlib.sha256(chunk.data).hexdigest() != digest:
                return None
            store.put_back(path, chunk.data)
        return records[0]
