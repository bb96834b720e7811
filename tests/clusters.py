"""Dask clusters of real processes on this machine."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager


def wait_for(true, seconds=60.0, what="nothing came"):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Cluster:
    """A scheduler, and workers that come and go.

    Parameters
    ----------
    folder : Path
        Where it stands; its log lies there.
    environment : dict
        Of all its processes.
    """

    def __init__(self, folder, environment, *options):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.environment = folder, environment
        self.file = folder / "scheduler.json"
        self.log = (folder / "log").open("w")
        self.processes = []
        self.start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address",
            "127.0.0.1:0", "--scheduler-file", self.file, *options,
        )  # fmt: skip
        wait_for(lambda: self.file.exists() and self.file.read_text().endswith("}"))
        self.address = json.loads(self.file.read_text())["address"]

    def start(self, *line, before=(), environment=None):
        """Start one of Dask's programs."""
        process = subprocess.Popen(
            [*map(str, before), sys.executable, "-m", "dask", *map(str, line)],
            env=self.environment | (environment or {}), stdout=self.log, stderr=self.log,
            cwd=self.folder,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def worker(self, *options, host="127.0.0.1", **how):
        """Start a worker, without a nanny: what is killed stays dead."""
        return self.start(
            "worker", "--scheduler-file", self.file, "--nthreads", "2", "--no-nanny", "--host",
            host, "--dashboard-address", "127.0.0.1:0", "--local-directory", self.folder / "local",
            *options, **how,
        )  # fmt: skip

    def close(self):
        for process in self.processes[::-1]:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.log.close()


@contextmanager
def cluster(folder, environment, *options):
    """Start a scheduler; yields a `Cluster`, and ends all of it."""
    found = Cluster(folder, environment, *options)
    try:
        yield found
    finally:
        found.close()
