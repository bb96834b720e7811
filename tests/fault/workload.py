"""What every fault is tried on: a small run whose undisturbed bytes are known.

A tiny network without torch (ONNX, three convolutions) on 16 blocks, so that hundreds of starts
fit; `real` swaps in a U-Net on torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import networks
import rasters

SIDE, BLOCK, TILE, OVERLAP = 640, 160, 64, 16  # over 512, GDAL writes its files on disk
TIMEOUT = 120.0


@dataclass(frozen=True)
class Outcome:
    """What one kind of fault did.

    Parameters
    ----------
    trials : int
        How often it was tried.
    failures : list of str
        One line per trial that broke a promise; empty is good.
    figures : dict
        What else was measured.
    """

    trials: int
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def is_one_line(self) -> bool:
        """Whether a failure said so in one line that says what, without a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("tilenet: error: ")]
        return len(lines) == 1 and "Traceback" not in self.err


@dataclass(frozen=True)
class Workload:
    """One raster, one network, and the command that makes a mask of them.

    Parameters
    ----------
    folder : Path
        Holds the raster, the network and the graph cache.
    model : Path
        The network.
    backend : str
        What runs it.
    """

    folder: Path
    model: Path
    backend: str = "openvino"

    @classmethod
    def at(cls, folder: Path, *, real: bool = False) -> Workload:
        """Make the workload; `real` takes a U-Net on torch."""
        folder.mkdir(parents=True, exist_ok=True)
        raster = folder / "raster.tif"
        if not raster.exists():
            rasters.write_tif(raster, rasters.picture(SIDE, SIDE), georeferenced=True)
        if real:
            model = folder / "unet"
            if not model.exists():
                networks.unet(model)
            return cls(folder, model, "torch")
        model = folder / "conv.onnx"
        if not model.exists():
            networks.three_convolutions(model)
        return cls(folder, model)

    @property
    def raster(self) -> Path:
        """The input."""
        return self.folder / "raster.tif"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: a graph cache of its own, two threads."""
        return {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "2"}

    def predict(self, out: Path, *extra: str) -> list[str]:
        """Return the command line that makes `out`: 16 blocks of a Zarr store or a COG."""
        return [
            sys.executable, "-m", "tilenet", "predict", str(self.raster), "--out", str(out),
            "--model", str(self.model), "--backend", self.backend, "--precision", "fp32",
            "--tile", str(TILE), "--overlap", str(OVERLAP), "--block", str(BLOCK),
            "--chunk", str(BLOCK), "--json", *extra,
        ]  # fmt: skip

    def verify(self, out: Path, *extra: str) -> list[str]:
        """Return the command line that verifies `out`."""
        return [sys.executable, "-m", "tilenet", "verify", str(out), "--json", *extra]

    def start(
        self, line: list[str], *before: str, more: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command line, after `before` (unshare …), in a group of its own.

        `more` joins its environment.
        """
        return subprocess.Popen(
            [*before, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**self.environment, **(more or {})}, start_new_session=True, **options,
        )  # fmt: skip

    def run(self, line: list[str], *before: str, timeout: float = TIMEOUT, **options: Any) -> Ended:
        """Run a command line to its end."""
        return end(self.start(line, *before, **options), timeout)

    def rerun(self, out: Path, *extra: str) -> str:
        """Run without a fault after one; return what is wrong with the result, "" if nothing is."""
        ended = self.run(self.predict(out, *extra))
        if ended.code:
            return f"a rerun exits {ended.code}: {ended.err[-300:]}"
        return self.compare(out)

    def compare(self, out: Path) -> str:
        """Return how a mask differs from the undisturbed one, "" if it does not."""
        left = [path.name for path in out.parent.glob(f".{out.name}.*")]
        if left:
            return f"left behind: {', '.join(left)}"
        want = self.undisturbed(f"undisturbed{''.join(out.suffixes)}")
        return "" if digest(out) == want else "other bytes"

    def undisturbed(self, name: str = "undisturbed.zarr") -> str:
        """Return the digest of a run that nothing disturbs; made once."""
        out = self.folder / name
        if not out.exists():
            ended = self.run(self.predict(out))
            assert ended.code == 0, ended.err
        return digest(out)


def end(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> Ended:
    """Wait for a process; kill its group if it hangs."""
    start = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        return Ended(-999, out, f"{err}\nhung for {timeout} s", time.monotonic() - start)
    return Ended(process.returncode, out, err, time.monotonic() - start)


def wait_for(path: Path, process: subprocess.Popen[str]) -> bool:
    """Wait until `path` is there; False if the process ended before."""
    while not path.exists():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def two_at_a_time(trial: Callable[..., str], arguments: Iterable[tuple[Any, ...]]) -> list[str]:
    """Run trials on two cores; return what each gave, in order."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda values: trial(*values), arguments))


def digest(out: Path) -> str:
    """Return a hash over the names and bytes of a mask and of what lies beside it."""
    total = hashlib.sha256()
    beside = [out, *out.parent.glob(f"{out.name}.*")]
    files = (p for p in out.rglob("*") if p.is_file()) if out.is_dir() else beside
    for file in sorted(files):
        name = file.relative_to(out) if out.is_dir() else file.name.removeprefix(out.name)
        total.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def run_folder(out: Path) -> Path:
    """Return where the work in progress of an output lies."""
    return out.with_name(f".{out.name}.tilenet")


def journaled(out: Path) -> dict[int, dict[str, Any]]:
    """Return the records of an unfinished run that are whole, by block."""
    path = run_folder(out) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line[9:]) for line in lines if line.endswith(b"\n")]
    return {record["block"]: record for record in found}


def remove(out: Path) -> None:
    """Remove a mask, its run folder, and what lies beside it."""
    for path in (out, run_folder(out), *out.parent.glob(f"{out.name}.*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
