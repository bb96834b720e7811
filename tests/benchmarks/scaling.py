"""How a run grows with its workers: `make bench-scaling`, or `scaling.py FOLDER [--only idle]`.

A real scheduler, real workers in processes of their own, the real command. Their network sleeps for
as long as a real one computes, and gives one answer (`tests/sleeping.py`), so that 32 workers fit
on two cores; reading, sums, strips, chunks, journal and every fsync are real. Dask's profiler,
which wakes every worker 100 times a second, is off: its workers have cores of their own.

Then what the scheduler and the command cost for 10⁵ blocks whose tasks do nothing, and what a block
does to the file system. Written as JSON with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rasterio
from rasterio.errors import NotGeoreferencedWarning

sys.path.insert(0, str(Path(__file__).parent))
import inputs

HERE = Path(__file__).resolve().parent
WORKERS = (1, 2, 4, 8, 16, 32)
BLOCK, TILE, OVERLAP = 256, 256, 128
"""Of the sleeping runs: a block owns four tiles."""

PER_WORKER, SLEEP = 40, 0.4
"""Blocks for each worker; seconds that a tile's network sleeps, 1.6 a block."""

MANY = 100_000
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Cluster:
    """A scheduler and workers on this machine.

    Parameters
    ----------
    address : str
        Of the scheduler.
    scheduler : int
        Its process.
    workers : list of int
        Theirs.
    """

    address: str
    scheduler: int
    workers: list[int]

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds that the scheduler and all workers have taken."""
        return cpu_seconds(self.scheduler), sum(map(cpu_seconds, self.workers))


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has taken, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_mib(pid: int, key: str = "VmRSS") -> float:
    """Return the memory that a process holds (VmHWM: has held at the most)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(key)


def pss_mib(pid: int) -> float:
    """Return the memory of a process, what it shares with others by its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:")) / 1024


@contextmanager
def cluster(folder: Path, workers: int, preload: Path, **more: str) -> Iterator[Cluster]:
    """Start a scheduler as one does by hand, and workers (`workers.py`)."""
    file, log = folder / "scheduler.json", folder / "cluster.log"
    file.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    environment["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "false"
    line = ["-m", "dask", "scheduler", "--scheduler-file", str(file), "--no-dashboard"]
    line += ["--host", "127.0.0.1", "--port", "0"]
    parts: list[subprocess.Popen[str]] = []
    with log.open("w") as said:

        def start(line: list[str], stdout: Any) -> subprocess.Popen[str]:
            parts.append(
                subprocess.Popen(
                    [sys.executable, *line], stdout=stdout, stderr=said, env=environment, text=True
                )
            )
            return parts[-1]

        try:
            scheduler = start(line, said)
            wait_for(file.exists)
            address = json.loads(file.read_text())["address"]
            line = [str(HERE / "workers.py"), address, str(workers), str(folder / "local")]
            many = start([*line, str(preload)], subprocess.PIPE)
            assert many.stdout is not None
            pids = [int(pid) for pid in many.stdout.readline().split()]
            wait_for(lambda: log.read_text().count("Register worker") >= workers)
            yield Cluster(address, scheduler.pid, pids)
        finally:
            for part in reversed(parts):
                part.send_signal(signal.SIGTERM)
                part.wait()


def wait_for(true: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the cluster does not start"
        time.sleep(0.1)


def sparse(folder: Path, height: int, width: int) -> Path:
    """Return a GeoTIFF that holds no pixels: reading it costs nearly nothing."""
    path = folder / f"sparse-{height}x{width}.tif"
    if not path.exists():
        tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "interleave": "pixel"}
        profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "bigtiff": "yes", **tiles}
        with rasterio.open(path, "w", height=height, width=width, sparse_ok=True, **profile):
            pass
    return path


def predict(raster: Path, model: Path, out: Path, *options: str) -> tuple[dict[str, Any], float]:
    """Run the command; return its JSON and the CPU seconds that it took itself."""
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "tilenet", "predict", str(raster), "--model", str(model)]
    done = subprocess.run(
        [*line, "--out", str(out), "--json", *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shutil.rmtree(out)
    return json.loads(done.stdout), cpu


def sleeping(folder: Path, count: int, per_worker: int, sleep: float) -> dict[str, Any]:
    """Return how a run whose network sleeps fares on so many workers."""
    model, out = inputs.null_network(folder, 2), folder / "sleeping.zarr"
    cut = ["--block", BLOCK, "--chunk", BLOCK, "--tile", TILE, "--overlap", OVERLAP]
    line = [*map(str, cut), "--precision", "fp32"]
    value = f"{sleep}:constant"
    with cluster(folder, count, HERE.parent / "sleeping.py", TILENET_SLEEP=value) as found:
        line += ["--scheduler", found.address]
        # The first run makes the workers open what they need: on cores of their own in a real
        # cluster, on two here.
        predict(sparse(folder, 2 * BLOCK, 2 * count * BLOCK), model, out, *line)
        before, start = found.cpu(), time.perf_counter()
        raster = sparse(folder, count * BLOCK, per_worker * BLOCK)
        run, command = predict(raster, model, out, *line)
        process = time.perf_counter() - start
        scheduler, workers = (b - a for a, b in zip(before, found.cpu(), strict=True))
        memory = sum(map(pss_mib, found.workers))
    blocks, ideal = run["blocks"], run["tiles_forwarded"] * sleep / count
    return {
        "workers": count, "blocks": blocks, "ideal": ideal, "seconds": run["seconds"],
        "forward_seconds": run["forward_seconds"],
        "process_seconds": process, "efficiency": ideal / run["seconds"],
        "command_cpu_ms_per_block": 1000 * command / blocks,
        "scheduler_cpu_ms_per_block": 1000 * scheduler / blocks,
        "worker_cpu_ms_per_block": 1000 * workers / blocks,
        "read_ms_per_block": 1000 * run["read_seconds"] / blocks,
        "write_ms_per_block": 1000 * run["write_seconds"] / blocks,
        "cores_used": (command + scheduler + workers) / process, "workers_pss_mib": memory,
    }  # fmt: skip


def drive(folder: Path, address: str, block: int, count: int) -> dict[str, float]:
    """Run blocks whose tasks do nothing (`idle.py`), in this process; return what it took."""
    from tilenet.config import PredictConfig
    from tilenet.engine.cluster import open_executor
    from tilenet.engine.journal import Journal
    from tilenet.engine.request import Job, Request, open_job, plan_for
    from tilenet.engine.run import run_blocks
    from tilenet.engine.runfolder import PLAN, STRIPS
    from tilenet.models.session import choose, network_shape
    from tilenet.models.store import find_model

    model = inputs.null_network(folder, 2)
    files = find_model(str(model), None, {})
    config = PredictConfig(model=str(model), tile=64, overlap=32, block=block, chunk=block)
    request = Request(config, files, network_shape(files), choose(files))
    raster = sparse(folder, 250 * block, count // 250 * block)
    run = folder / "idle"
    shutil.rmtree(run, ignore_errors=True)
    (run / STRIPS).mkdir(parents=True)
    job = Job(raster, folder / "idle.zarr")
    plan, _ = plan_for(open_job(job, request).info, job, request, named=True)
    (run / PLAN).write_bytes(plan.dump())
    blocks = plan.lattice.blocks
    with open_executor(address, blocks) as executor, Journal(run / "journal") as journal:
        memory = rss_mib(os.getpid())
        cpu, start = time.process_time(), time.perf_counter()
        run_blocks(plan, run, journal, executor, lambda _: None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert len(journal.blocks) == blocks
    shutil.rmtree(run)
    grown = rss_mib(os.getpid(), "VmHWM") - memory
    return {"blocks": blocks, "seconds": seconds, "cpu": cpu, "rss_mib_grown": grown}


def idle(folder: Path, block: int, count: int) -> dict[str, float]:
    """Return what the scheduler and the command cost for blocks whose tasks do nothing."""
    with cluster(folder, 2, HERE / "idle.py") as found:
        before, memory = found.cpu(), rss_mib(found.scheduler)
        line = [str(folder), "--drive", found.address, str(block), str(count)]
        done = subprocess.run(
            [sys.executable, __file__, *line], stdout=subprocess.PIPE, text=True, check=True
        )
        scheduler, workers = (b - a for a, b in zip(before, found.cpu(), strict=True))
        peak = rss_mib(found.scheduler, "VmHWM")
    driven = json.loads(done.stdout)
    share = 1e5 / driven["blocks"]
    return {
        "block": block, "blocks": driven["blocks"],
        "blocks_per_second": driven["blocks"] / driven["seconds"],
        "scheduler_cpu_s_per_1e5": share * scheduler, "scheduler_rss_mib": peak,
        "scheduler_rss_mib_grown": peak - memory,
        "command_cpu_s_per_1e5": share * driven["cpu"],
        "command_rss_mib_grown": driven["rss_mib_grown"],
        "worker_cpu_s_per_1e5": share * workers,
    }  # fmt: skip


def files(folder: Path) -> dict[str, float]:
    """Return what a block of the default size does to the file system, counted in one process."""
    from tilenet.api import predict as run
    from tilenet.config import PredictConfig

    counts: Counter[str] = Counter()
    names = {"os.rename": "renames", "os.remove": "removes"}
    raster, out = inputs.raster(folder, 8192, "deflate"), folder / "files.zarr"
    shutil.rmtree(out, ignore_errors=True)
    lock, sync = threading.Lock(), os.fsync

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        name = names.get(event, "")
        if event == "open" and isinstance(arguments[0], str) and ".tilenet/" in arguments[0]:
            name = "writes" if arguments[2] & (os.O_WRONLY | os.O_RDWR) else "reads"
        if name:
            with lock:
                counts[name] += 1

    def counted(fd: Any) -> None:
        counts["fsyncs"] += 1
        sync(fd)

    sys.addaudithook(count)
    os.fsync = counted
    try:
        done = run([raster], out, PredictConfig(model=str(inputs.null_network(folder, 2))))
    finally:
        os.fsync = sync
    found = dict(counts)  # before what the benchmark itself removes
    stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    blocks = done.runs[0].blocks if hasattr(done, "runs") else done.blocks
    strips = done.runs[0].strip_bytes if hasattr(done, "runs") else done.strip_bytes
    return {
        "blocks": blocks, "strip_mb_per_block": strips / blocks / 1e6,
        "stored_mb_per_block": stored / blocks / 1e6,
        **{f"{name}_per_block": number / blocks for name, number in sorted(found.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="+", choices=("workers", "idle", "files"))
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS))
    parser.add_argument("--per-worker", type=int, default=PER_WORKER, help="blocks")
    parser.add_argument("--sleep", type=float, default=SLEEP, help="seconds for a tile")
    parser.add_argument("--blocks", type=int, default=MANY, help="blocks that do nothing")
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.drive:
        address, block, count = options.drive
        sys.stdout.write(json.dumps(drive(options.folder, address, int(block), int(count))))
        return
    chosen = options.only or ["workers", "idle", "files"]
    target = options.folder / "scaling.json"
    document = json.loads(target.read_text()) if target.exists() else {}
    document |= {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {n: version(n) for n in ("tilenet", "dask", "distributed", "zarr")},
        "command": "make bench-scaling",
    }

    def keep(key: str, row: Any) -> None:
        document[key] = row
        target.write_text(json.dumps(document, indent=1))

    def say(row: dict[str, Any]) -> dict[str, Any]:
        cells = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        sys.stdout.write(", ".join(cells) + "\n")
        sys.stdout.flush()
        return row

    if "workers" in chosen:
        rows = []
        for count in options.workers:
            rows.append(say(sleeping(options.folder, count, options.per_worker, options.sleep)))
            keep("workers", rows)
    if "idle" in chosen:
        keep("idle", [say(idle(options.folder, size, options.blocks)) for size in (1536, 64)])
    if "files" in chosen:
        keep("files", say(files(options.folder)))


if __name__ == "__main__":
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    main()
