"""Prefect: a night of masks, retried while a rerun resumes.

``python workflows/prefect/tilenet_predict.py INPUT OUT [options of predict]`` runs it once;
``prefect deploy workflows/prefect/tilenet_predict.py:masks`` puts it on a schedule.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from prefect import flow, get_run_logger, task

RESUMABLE = (6, 9, 130, 143)
"""Memory, disk or cluster gone, or stopped: the same command goes on from there."""
SOME_FAILED = 7


class Resumable(RuntimeError):
    """The run stopped in a way from which a rerun goes on."""


def _resumes(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Resumable)


@task(retries=5, retry_delay_seconds=[60, 300, 900, 900, 900], retry_condition_fn=_resumes)
def predict(source: str, out: str, options: list[str], command: str = "tilenet") -> dict[str, Any]:
    """Run ``tilenet predict`` and return its JSON."""
    line = [command, "predict", source, "--out", out, *options, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    if code in RESUMABLE:
        raise Resumable(f"tilenet ended with {code}")
    if code not in (0, SOME_FAILED):
        raise RuntimeError(f"tilenet ended with {code}: a retry would not help")
    return json.loads(done.stdout)


@flow(name="tilenet-masks")
def masks(
    source: str, out: str, options: list[str] | None = None, command: str = "tilenet"
) -> dict[str, Any]:
    """Make masks of `source` in `out`, and log the pixels of each class and what failed."""
    found = predict(source, out, options or [], command)
    logger = get_run_logger()
    for run in found.get("runs", [found]):
        logger.info("%s: %s", run["output"], {c["name"]: c["pixels"] for c in run["classes"]})
    for failure in found.get("failed", []):
        logger.warning("%s", failure["error"])
    return found


if __name__ == "__main__":
    masks(sys.argv[1], sys.argv[2], sys.argv[3:])
