"""What breaks between hosts, and what follows: the same bytes, or exit 9 and a rerun to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certificates import Authority
from network import Host, switched, wait_until
from workload import BLOCK, Ended, Workload, end, journaled, rasters, remove

HERE = Path(__file__).parent

LOST = 9
BOUND = 240.0  # seconds that any run may take, whatever is broken
_PORT = 8786


@dataclass(frozen=True)
class Size:
    """How large the run is and how long the link is cut.

    Parameters
    ----------
    blocks : int
        On each side.
    sleep : float
        Seconds for which every block's network sleeps, so that the run lasts.
    cut : float
        Seconds.
    """

    blocks: int
    sleep: float
    cut: float


LONG, SHORT = Size(20, 0.2, 30.0), Size(8, 0.2, 6.0)


@dataclass(frozen=True)
class Cluster:
    """A client, a scheduler and two workers, each on a host of its own, under TLS.

    Parameters
    ----------
    folder : Path
        Holds logs and certificates; every host sees it.
    workload : Workload
        What is run.
    authority : Authority
        Of the certificates.
    client, head, alpha, beta : Host
        The hosts.
    size : Size
        Of the run.
    """

    folder: Path
    workload: Workload
    authority: Authority
    client: Host
    head: Host
    alpha: Host
    beta: Host
    size: Size

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return f"tls://{self.head.address}:{_PORT}"

    def start_scheduler(self) -> None:
        """Start the scheduler."""
        line = ["scheduler", "--host", self.head.address, "--port", str(_PORT), "--no-dashboard"]
        self._start(self.head, [*line, *self.authority.options(self.head.name)])

    def start_worker(self, host: Host) -> None:
        """Start a worker that is started again when it ends, as systemd or Kubernetes would."""
        line = ["worker", self.address, "--host", host.address, "--name", host.name]
        line += ["--nthreads", "3", "--memory-limit", "0", "--no-dashboard"]
        line += ["--local-directory", str(self.folder / f"local-{host.name}")]
        line += ["--preload", str(HERE.parent / "sleeping.py"), "--death-timeout", "60"]
        again = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "again"]
        self._start(host, [*line, *self.authority.options(host.name)], again)

    def _start(self, host: Host, line: list[str], before: list[str] | None = None) -> None:
        environment = {
            **self.workload.environment,
            "TILENET_SLEEP": str(self.size.sleep),
            "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
        }
        host.start(
            [*(before or []), sys.executable, "-m", "dask", *line],
            self.folder / f"{host.name}.log",
            env=environment,
            cwd=self.folder,
        )

    def predict(
        self, out: Path, *extra: str, authority: Authority | None = None
    ) -> subprocess.Popen[str]:
        """Start the command on the client's host."""
        shown = (authority or self.authority).client(self.client.name)
        line = self.workload.predict(out, "--scheduler", self.address, *extra)
        return self.workload.start(line, *self.client.prefix, more=shown)

    def written(self, host: Host) -> int:
        """Return how many bytes the worker process of a host has written."""
        total = 0
        for pid in workers(host):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            total += int(dict(line.split(": ") for line in lines)["wchar"])
        return total


def workers(host: Host) -> list[int]:
    """Return the worker processes of a host: the nanny's child."""
    return host.processes("multiprocessing.spawn", "spawn_main")


@contextmanager
def clustered(folder: Path, size: Size) -> Iterator[Cluster]:
    """A cluster that is ready; a folder of its own, and hosts of its own."""
    workload = Workload.at(folder.parent / "work")
    side = size.blocks * BLOCK
    if not (folder.parent / "sized").exists():
        rasters.write_tif(workload.raster, rasters.picture(side, side), georeferenced=True)
        (folder.parent / "sized").touch()
    workload.undisturbed()
    folder.mkdir()
    with switched("client", "head", "alpha", "beta") as hosts:
        authority = Authority(folder / "certificates")
        for host in hosts:
            authority.sign(host.name, host.address)
        cluster = Cluster(folder, workload, authority, *hosts, size)
        cluster.start_scheduler()
        cluster.start_worker(cluster.alpha)
        cluster.start_worker(cluster.beta)
        log = folder / "head.log"
        ready = wait_until(lambda: log.read_text().count("Register worker") >= 2, 90)
        assert ready, log.read_text()[-2000:]
        yield cluster


@dataclass
class Trial:
    """One run on a cluster that something happens to.

    Parameters
    ----------
    cluster : Cluster
        Where.
    out : Path
        The mask.
    process : Popen
        The command.
    figures : dict
        What was measured.
    """

    cluster: Cluster
    out: Path
    process: subprocess.Popen[str]
    figures: dict[str, Any]

    @property
    def done(self) -> int:
        """How many blocks the journal lists."""
        return len(journaled(self.out))

    def at(self, share: float) -> bool:
        """Wait until a share of the blocks is done; False if the run has ended before."""
        count = share * self.cluster.size.blocks**2
        wait_until(lambda: self.process.poll() is not None or self.done >= count, BOUND)
        return self.process.poll() is None


def _whole(_trial: Trial) -> None:
    """Nothing is broken."""


def _cut(pull: Callable[[Host], None], plug: Callable[[Host], None]) -> Callable[[Trial], None]:
    def broken(trial: Trial) -> None:
        """Host alpha is cut off; meanwhile beta's worker dies."""
        cluster, start = trial.cluster, time.monotonic()
        pull(cluster.alpha)
        time.sleep(cluster.size.cut / 3)
        trial.figures["killed"] = _kill(cluster.beta)
        time.sleep(max(0, cluster.size.cut - (time.monotonic() - start)))
        plug(cluster.alpha)

    return broken


def _kill(host: Host) -> int:
    found = workers(host)
    for pid in found:
        os.kill(pid, 9)
    return len(found)


def _client_cut(trial: Trial) -> None:
    """The client is cut off from the scheduler."""
    trial.cluster.client.pull()
    time.sleep(trial.cluster.size.cut)
    trial.cluster.client.plug()


def _joining(trial: Trial) -> None:
    """Host alpha is cut off, and nobody knows yet, when the command asks for workers."""
    time.sleep(trial.cluster.size.cut)
    trial.cluster.alpha.plug()


def _power(trial: Trial) -> None:
    """Host alpha loses power: no connection is ended."""
    trial.cluster.alpha.lose_power()


def _frozen(trial: Trial) -> None:
    """Host alpha's worker stands still, its connections stay."""
    found = workers(trial.cluster.alpha)
    for pid in found:
        os.kill(pid, 19)
    time.sleep(trial.cluster.size.cut)
    for pid in found:
        os.kill(pid, 18)


def _no_scheduler(trial: Trial) -> None:
    """The scheduler dies, and another takes its place."""
    trial.figures["killed"] = trial.cluster.head.kill("dask", "scheduler")
    time.sleep(5)
    trial.cluster.start_scheduler()


def _no_power_at_the_scheduler(trial: Trial) -> None:
    """The scheduler's host is cut off for good: nobody hears its end."""
    trial.cluster.head.pull()


CASES: dict[str, Callable[[Trial], None]] = {
    "whole": _whole,
    "silent": _cut(Host.pull, Host.plug),
    "down": _cut(Host.down, Host.up),
    "client": _client_cut,
    "joining": _joining,
    "frozen": _frozen,
    "power": _power,
    "scheduler": _no_scheduler,
    "unreachable": _no_power_at_the_scheduler,
}
"""Name: what is done to a run that is under way."""

_NO_RETURN = ("unreachable",)


def try_case(name: str, folder: Path, size: Size) -> tuple[str, dict[str, Any]]:
    """Run one case on a cluster of its own; return what is wrong, "" if nothing is, and figures."""
    figures: dict[str, Any] = {}
    with clustered(folder / name, size) as cluster:
        out = folder / name / "mask.zarr"
        if name == "joining":
            cluster.alpha.pull()
        trial = Trial(cluster, out, cluster.predict(out), figures)
        start = time.monotonic()
        try:
            if name != "joining" and not trial.at(0.1):
                return f"ended early: {end(trial.process).err[-400:]}", figures
            CASES[name](trial)
        finally:
            ended = end(trial.process, max(1, BOUND - (time.monotonic() - start)))
        figures |= {"exit": ended.code, "seconds": round(time.monotonic() - start, 1)}
        figures["mb_written"] = [
            round(cluster.written(host) / 1e6, 1) for host in (cluster.alpha, cluster.beta)
        ]
        problem = _judge(trial, ended, name)
        if name == "whole" and not problem:
            problem = "" if min(figures["mb_written"]) > 1 else "one host did nothing"
    remove(out)
    return problem, figures


def _judge(trial: Trial, ended: Ended, name: str) -> str:
    cluster, out = trial.cluster, trial.out
    if ended.code == 0:
        found = json.loads(ended.out)
        trial.figures["tiles_again"] = found["tiles_forwarded"] - found["tiles"]
        return cluster.workload.compare(out)
    if ended.code != LOST or not ended.is_one_line():
        return f"exit {ended.code}: {ended.err[-600:]}"
    trial.figures["said"] = ended.err.strip().splitlines()[-1]
    kept = trial.done
    if name in _NO_RETURN:
        return cluster.workload.rerun(out)
    again = end(cluster.predict(out), BOUND)
    if again.code:
        return f"the rerun exits {again.code}: {again.err[-600:]}"
    trial.figures["resumed"] = json.loads(again.out)["blocks_resumed"]
    if trial.figures["resumed"] < kept:
        return f"{kept} blocks were done, {trial.figures['resumed']} resumed"
    return cluster.workload.compare(out)


def strangers(folder: Path, size: Size) -> tuple[str, dict[str, Any]]:
    """Try to get in with certificates of another authority, with none, and without TLS."""
    with clustered(folder / "strangers", size) as cluster:
        other = Authority(folder / "other", "another authority")
        other.sign(cluster.client.name, cluster.client.address)
        plain = cluster.address.replace("tls:", "tcp:")
        tries = {
            "another authority": cluster.predict(folder / "a.zarr", authority=other),
            "no certificate": cluster.workload.start(
                cluster.workload.predict(folder / "b.zarr", "--scheduler", cluster.address),
                *cluster.client.prefix,
            ),
            "no TLS": cluster.workload.start(
                cluster.workload.predict(
                    folder / "c.zarr", "--scheduler", plain, "--insecure-cluster"
                ),
                *cluster.client.prefix,
            ),
        }
        figures = {}
        for name, process in tries.items():
            ended = end(process, BOUND)
            figures[name] = ended.code
            if ended.code not in (2, LOST) or not ended.is_one_line():
                return f"{name}: exit {ended.code}: {ended.err[-600:]}", figures
    return "", figures
