"""A SLURM cluster of this machine, by `tests/slurm/cluster.sh`: submit, wait, cancel."""

import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent / "slurm" / "cluster.sh"
FLOWS = Path(__file__).parents[1] / "workflows" / "slurm"

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def cluster_script(*arguments):
    """Run `cluster.sh` on ports that are free; raises with what it says if it fails."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = {"CTLD_PORT": str(one.getsockname()[1]), "NODE_PORT": str(two.getsockname()[1])}
    done = subprocess.run(
        [SCRIPT, *arguments], env=os.environ | ports, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


@dataclass(frozen=True)
class Job:
    """What SLURM says of one job, or of one task of an array."""

    id: str
    name: str
    state: str
    code: int
    restarts: int
    log: str


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Parameters
    ----------
    environment : dict
        Of all commands, and so of the jobs.
    """

    environment: dict

    def call(self, *line):
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(
            list(map(str, line)), env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, folder, script, *arguments, options=()):
        """Submit a script of `workflows/slurm`; its logs go to `folder`."""
        log = f"--output={folder}/%x-%A_%a-%j.log"
        line = ("sbatch", "--parsable", f"--chdir={folder}", log, *options, FLOWS / script)
        return self.call(*line, *arguments)

    def jobs(self, job=None):
        """Return what SLURM knows of a job and its tasks, or of all jobs."""
        found = []
        for line in self.call(
            "scontrol", "--oneliner", "show", "job", *([job] if job else [])
        ).splitlines():
            values = dict(re.findall(r"(\w+)=(\S*)", line))
            if values.get("ArrayTaskId", "0").isdigit():
                log = Path(values["StdOut"])
                found.append(
                    Job(
                        values["JobId"], values["JobName"], values["JobState"],
                        int(values["ExitCode"].partition(":")[0]), int(values["Restarts"]),
                        log.read_text() if log.is_file() else "",
                    )
                )  # fmt: skip
        return found

    def wait(self, job, seconds=240):
        """Wait until a job and all its tasks (or several, with commas) have ended; return them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            jobs = [one for name in job.split(",") for one in self.jobs(name)]
            waiting = self.call("squeue", "--noheader", "--jobs", job)
            if not waiting and all(one.state in _ENDED for one in jobs):
                return jobs
            time.sleep(0.5)
        raise TimeoutError(f"{self.jobs(job)}")


def environment_of(folder, environment, binaries):
    """Return the environment in which SLURM's commands find the cluster, and its jobs tilenet."""
    path = os.pathsep.join([str(binaries), environment["PATH"]])
    return {**environment, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
