"""Airflow: a night of masks, retried while a rerun resumes.

Put the file into the DAG folder, and set ``tilenet`` where it is not on the workers' path:
``airflow variables set tilenet_command /opt/tilenet/bin/tilenet``. Parameters come with the run:
``airflow dags trigger tilenet_predict --conf '{"input": "/data/slides", "out": "/data/masks"}'``.
"""

from __future__ import annotations

import json
import logging
import subprocess
from datetime import datetime, timedelta
from typing import Any

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.sdk import Param, Variable, dag, get_current_context, task

RESUMABLE = (6, 9, 130, 143)
"""Memory, disk or cluster gone, or stopped: the same command goes on from there."""
SOME_FAILED = 7

_log = logging.getLogger(__name__)


@dag(
    schedule="30 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    params={
        "input": Param("/data/slides", type="string"),
        "out": Param("/data/masks", type="string"),
        "options": Param([], type="array", items={"type": "string"}),
    },
)
def tilenet_predict() -> None:
    """Predict, then tell what was found."""

    @task(retries=5, retry_delay=timedelta(minutes=5), execution_timeout=timedelta(hours=20))
    def predict() -> dict[str, Any]:
        """Run ``tilenet predict``; its JSON goes on to the next task."""
        params = get_current_context()["params"]
        command = Variable.get("tilenet_command", default="tilenet")
        line = [command, "predict", params["input"], "--out", params["out"], *params["options"]]
        done = subprocess.run([*line, "--json"], stdout=subprocess.PIPE, text=True, check=False)
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        if code in RESUMABLE:
            raise AirflowException(f"tilenet ended with {code}: a retry resumes")
        if code not in (0, SOME_FAILED):
            raise AirflowFailException(f"tilenet ended with {code}: a retry would not help")
        return json.loads(done.stdout)

    @task
    def report(found: dict[str, Any]) -> None:
        """Log the pixels of each class, and what failed."""
        for run in found.get("runs", [found]):
            pixels = {one["name"]: one["pixels"] for one in run["classes"]}
            _log.info("%s: %s", run["output"], pixels)
        for failure in found.get("failed", []):
            _log.warning("%s", failure["error"])

    report(predict())


tilenet_predict()
