"""Two workers, a scheduler and a client on hosts of their own, under TLS (`make cluster`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "hosts"


@pytest.mark.long
def test_a_host_is_cut_off_and_a_worker_dies(environment):
    """The short form of `make cluster`: a silent cut of six seconds, a kill in between."""
    line = [sys.executable, str(SUITE)]
    lacking = subprocess.run(
        [*line, "--lacking"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()
    if lacking:
        pytest.skip(lacking)
    path = os.pathsep.join(filter(None, [str(SUITE.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*line, "--short", "silent"], env={**environment, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"killed": 1' in done.stdout
