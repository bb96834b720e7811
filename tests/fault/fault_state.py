"""A run folder as a state machine: kill, corrupt, resume, second writer, verify, repair, export.

Every step runs in a forked child, which is really killed (`os._exit` at its nth durable operation)
and leaves what a killed process leaves. Forking, after the imports and before any thread, makes a
step take a tenth of a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import rasters
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from workload import Outcome, Workload, digest, journaled, remove, run_folder

from tilenet import durable, mask_api
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import TilenetError

KILLED = 77
SIDE, BLOCK, TILE = 128, 32, 32


def forked(action: Callable[[], Any], kill_at: int | None = None) -> int:
    """Run `action` in a child; return 0, the code of our error, or KILLED."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99  # an error that is not ours
    try:
        logging.getLogger("tilenet").disabled = True
        if kill_at is not None:
            _arm(kill_at)
        action()
        code = 0
    except TilenetError as error:
        code = error.code
    finally:
        os._exit(code)


def _arm(kill_at: int) -> None:
    """Let this process end at the nth write that lasts, before or after it by turns."""
    count = 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at and count % 2:
                os._exit(KILLED)
            result = function(*arguments, **options)
            if count == kill_at:
                os._exit(KILLED)
            return result

        return call

    for name in ("append", "write", "rename", "sync_directory"):
        setattr(durable, name, deadly(getattr(durable, name)))


class RunFolder(RuleBasedStateMachine):
    """What any sequence of misfortunes may leave, and what the same command makes of it.

    Threads make the moment of a kill a little random, so rules look at the folder themselves (a
    precondition would have to come out the same in every replay), and nothing is shrunk.
    """

    workload: Workload  # set before the machine runs

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tilenet-state-", dir=self.workload.folder))
        self.out = self.folder / "x.zarr"
        self.damaged = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _predict(self, out: Path | None = None, **options: Any) -> Callable[[], Any]:
        config = PredictConfig(
            model=str(self.workload.model), tile=TILE, overlap=16, chunk=BLOCK, block=BLOCK,
            precision="fp32", probabilities=True, **options,
        )  # fmt: skip
        return lambda: predict([self.workload.raster], out or self.out, config)

    @property
    def finished(self) -> bool:
        return self.out.exists()

    @initialize()
    def canon(self) -> None:
        for name in ("canon.zarr", "canon.tif"):
            if not (self.workload.folder / name).exists():
                assert forked(self._predict(self.workload.folder / name)) == 0
        self.whole = digest(self.workload.folder / "canon.zarr")

    @rule(kill_at=st.integers(1, 250))
    def killed_run(self, kill_at: int) -> None:
        if self.damaged:
            return
        before = journaled(self.out)
        assert forked(self._predict(), kill_at) in (0, KILLED)
        if not self.finished:
            assert before.items() <= journaled(self.out).items()

    @rule()
    def whole_run(self) -> None:
        if self.damaged:
            return
        assert forked(self._predict()) == 0
        assert self.finished
        assert not run_folder(self.out).exists()

    @rule(kill_at=st.integers(1, 250))
    def killed_overwrite(self, kill_at: int) -> None:
        if not (self.finished and not self.damaged):
            return
        assert forked(self._predict(overwrite=True), kill_at) in (0, KILLED)

    @rule(seed=st.integers(0, 1 << 16))
    def strips_rot(self, seed: int) -> None:
        if not (not self.finished and journaled(self.out)):
            return
        strips = sorted((run_folder(self.out) / "strips").glob("*.strips"))
        if strips:
            flip(random.Random(seed).choice(strips), seed)

    @rule(cut=st.integers(1, 300))
    def torn_journal(self, cut: int) -> None:
        if not (not self.finished and journaled(self.out)):
            return
        path = run_folder(self.out) / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])

    @rule()
    def other_parameters(self) -> None:
        if not (not self.damaged and (self.finished or journaled(self.out))):
            return
        before = tree(self.folder)
        assert forked(self._predict(blend="crop")) == 5
        assert tree(self.folder) == before

    @rule()
    def second_writer(self) -> None:
        if not (not self.finished and (run_folder(self.out) / "lock").exists()):
            return
        with (run_folder(self.out) / "lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = tree(self.folder)
            assert forked(self._predict()) == 5
            assert tree(self.folder) == before

    @rule(seed=st.integers(0, 1 << 16))
    def rot(self, seed: int) -> None:
        if not (self.finished and not self.damaged):
            return
        files = sorted(p for p in self.out.rglob("*") if p.is_file())
        flip(random.Random(seed).choice(files), seed)
        self.damaged = True

    @rule(seed=st.integers(0, 1 << 16))
    def loss(self, seed: int) -> None:
        if not (self.finished and not self.damaged):
            return
        files = sorted(p for p in self.out.rglob("*") if p.is_file() and "seal" not in str(p))
        random.Random(seed).choice(files).unlink()
        self.damaged = True

    @rule()
    def verify(self) -> None:
        if not (self.finished):
            return

        def check() -> None:
            failure = mask_api.verify(self.out).failure()
            if failure is not None:
                raise failure

        assert forked(check) == (8 if self.damaged else 0)

    @rule()
    def repair(self) -> None:
        if not (self.finished):
            return
        assert forked(lambda: mask_api.verify(self.out, repair=True)) == 0
        self.damaged = False

    @rule(kill_at=st.integers(1, 6))
    def killed_repair(self, kill_at: int) -> None:
        if not (self.finished):
            return
        assert forked(lambda: mask_api.verify(self.out, repair=True), kill_at) in (0, KILLED)
        self.damaged = digest(self.out) != self.whole

    @rule()
    def export(self) -> None:
        if not (self.finished):
            return
        out = self.folder / "x.tif"
        assert forked(lambda: mask_api.export(self.out, out)) == (8 if self.damaged else 0)
        if not self.damaged:
            assert digest(out) == digest(self.workload.folder / "canon.tif")
            remove(out)
            out.with_name("x.prob.tif").unlink()

    @rule(kill_at=st.integers(1, 6))
    def killed_export(self, kill_at: int) -> None:
        if not (self.finished and not self.damaged):
            return
        out = self.folder / "x.tif"
        forked(lambda: mask_api.export(self.out, out), kill_at)
        if out.exists():
            assert digest(out) == digest(self.workload.folder / "canon.tif")
        for path in self.folder.glob("x.*tif*"):
            path.unlink()

    @invariant()
    def a_mask_is_whole_or_not_there(self) -> None:
        if self.finished and not self.damaged:
            assert digest(self.out) == self.whole

    @invariant()
    def what_is_journaled_is_on_disk(self) -> None:
        store = run_folder(self.out) / "store"
        for record in journaled(self.out).values() if store.exists() else ():
            for path, sha256, _ in record["files"]:
                if sha256 is None:
                    assert not (store / path).exists()
                else:
                    found = hashlib.sha256((store / path).read_bytes()).hexdigest()
                    assert found == sha256


def flip(path: Path, seed: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but for locks, whose owner's name changes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p): p.read_bytes() for p in files}


def play(folder: Path, examples: int, steps: int) -> None:
    """Run the machine; raises AssertionError with the steps that break a promise."""
    rasters.write_tif(folder / "raster.tif", rasters.picture(SIDE, SIDE), georeferenced=True)
    RunFolder.workload = Workload.at(folder)
    run_state_machine_as_test(
        RunFolder,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )  # fmt: skip


def run(folder: Path, *, long: bool) -> Outcome:
    """Play 40 games of 16 steps, or 1,000 of 40."""
    examples, steps = (1000, 40) if long else (40, 16)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        play(folder, examples, steps)
    except AssertionError as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return Outcome(examples, [f"{error!r} {notes}"])
    return Outcome(examples, figures={"steps": steps})
