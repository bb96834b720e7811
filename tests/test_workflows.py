"""The files of `workflows/`: each validated by its own tool, and run where it can be.

What needs heavier tools is in `make workflows` (Airflow, Prefect, the Dask operator, linters of
images), `make slurm` and `make images`.
"""

import ast
import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from hera.workflows.models import Workflow

from tilenet import errors

ROOT = Path(__file__).parents[1]
FLOWS = ROOT / "workflows"
IMAGE = ROOT / "examples" / "images" / "fluorescence.png"

SCRIPTS = sorted([*FLOWS.rglob("*.sh"), *FLOWS.rglob("*.sbatch"), *ROOT.glob("tests/*/*.sh")])
RESUMABLE = {6, 9, 130, 143}
"""The exit codes after which a rerun resumes; 7 is done with a warning, the others end it."""
FINAL = {1, 2, 3, 4, 5, 8}


def loaded(path):
    return list(yaml.safe_load_all((FLOWS / path).read_text()))


def needs(tool):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def test_the_exit_codes_are_those_of_the_errors():
    lines = errors.__doc__.replace("(143 for SIGTERM)", "143").splitlines()
    resumable = {
        int(code) for line in lines if "resumable" in line for code in re.findall(r"\b\d+\b", line)
    }
    assert resumable == RESUMABLE
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and "code" in vars(e)]
    known = {kind.code for kind in kinds if kind.__module__ == errors.__name__}
    assert known | {143} == RESUMABLE | FINAL | {7}


# Shell


@needs("shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(
        ["shellcheck", "--shell=bash", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def shell(environment, tmp_path):
    """Run a line of shell, with `tilenet` on the path, in a folder of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])

    def call(line, **variables):
        return subprocess.run(
            line, env={**environment, "PATH": path, **variables}, cwd=tmp_path, text=True,
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with an image, one with a broken one besides, and the broken one."""
    good, mixed = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("mixed")
    shutil.copy(IMAGE, good)
    shutil.copy(IMAGE, mixed)
    broken = mixed / "broken.tif"
    broken.write_bytes(b"II*\0broken")
    return good, mixed, broken


def test_nightly_warns_of_what_failed_alone(shell, inputs, tmp_path):
    done = shell([FLOWS / "cron" / "nightly.sh", inputs[1], "--out", "masks"], SUMMARY="s.json")
    assert done.returncode == 0, done.stderr
    assert "warning: some inputs failed" in done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    assert sorted(one.get("code", 0) for one in found["outcomes"]) == [0, 3]
    assert (tmp_path / "masks" / "fluorescence.png").is_file()


def test_nightly_does_not_try_again_what_stays_broken(shell, inputs, tmp_path):
    done = shell([FLOWS / "cron" / "nightly.sh", inputs[2], "--out", "mask.zarr"], WAIT="60")
    assert done.returncode == 3
    assert "again" not in done.stderr
    assert json.loads((tmp_path / "tilenet-summary.json").read_text())["exit_code"] == 3


def test_nightly_goes_on_with_a_run_that_was_stopped(environment, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    line = [FLOWS / "cron" / "nightly.sh", IMAGE.with_name("CMU-1-Small-Region.svs"), "--out"]
    line += ["mask.zarr", "--tile", "256", "--block", "768"]
    with subprocess.Popen(
        line, env={**environment, "PATH": path, "WAIT": "0"}, cwd=tmp_path, text=True,
        stderr=subprocess.PIPE,
    ) as script:  # fmt: skip
        journal = tmp_path / ".mask.zarr.tilenet" / "journal.jsonl"
        while not (journal.exists() and journal.stat().st_size):
            assert script.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        _, messages = script.communicate(timeout=200)
    assert script.returncode == 0, messages
    assert "nightly: exit code 143, try 1; again in 0 s" in messages
    assert json.loads((tmp_path / "tilenet-summary.json").read_text())["exit_code"] == 0


# cron and systemd


@needs("crontab")
def test_crontab():
    done = subprocess.run(
        ["crontab", "-n", FLOWS / "cron" / "crontab"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", ["tilenet@.service", "tilenet@.timer"])
def test_systemd(unit):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", FLOWS / "systemd" / unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_knows_the_exit_codes():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(FLOWS / "systemd" / "tilenet@.service")
    codes = {key: {int(c) for c in value.split()} for key, value in unit["Service"].items()
             if key.endswith("ExitStatus")}  # fmt: skip
    assert codes == {
        "SuccessExitStatus": {7},
        "RestartForceExitStatus": RESUMABLE,
        "RestartPreventExitStatus": FINAL,
    }


# Kubernetes and Argo

VERSIONS = ("1.33", "1.37")
"""Of Kubernetes: the first one that knows all that is used, and the newest one known here."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["indexed-job", "cronjob", "daskjob"])
def test_kubernetes_schemas(name, version):
    for document in loaded(f"kubernetes/{name}.yaml"):
        if document["kind"] == "DaskJob":  # its pods here, the whole of it in `make workflows`
            cluster = document["spec"]["cluster"]["spec"]
            specs = [("v1", "Pod", document["spec"]["job"]["spec"])]
            specs += [("v1", "Pod", cluster[part]["spec"]) for part in ("worker", "scheduler")]
            specs += [("v1", "Service", cluster["scheduler"]["service"])]
            documents = [
                {"apiVersion": api, "kind": kind, "metadata": {"name": "x"}, "spec": spec}
                for api, kind, spec in specs
            ]
        else:
            documents = [document]
        for one in documents:
            kubernetes_validate.validate(one, version, strict=True)


def test_kubernetes_knows_the_exit_codes():
    [job], [cron] = loaded("kubernetes/indexed-job.yaml"), loaded("kubernetes/cronjob.yaml")
    for spec in (job["spec"], cron["spec"]["jobTemplate"]["spec"]):
        [rule] = [r for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r]
        assert set(rule["onExitCodes"]["values"]) == FINAL
        assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else no rule is heeded
    [env] = [c["env"] for c in job["spec"]["template"]["spec"]["containers"]]
    assert {"name": "JOB_COMPLETIONS", "value": str(job["spec"]["completions"])} in env


def test_argo():
    [document] = loaded("argo/tilenet.yaml")
    # The model passes over keys that it does not know: what it gives back must be all there was.
    given = Workflow.model_validate(document).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    assert given == document
    expression = document["spec"]["templates"][1]["retryStrategy"]["expression"]
    codes = re.search(r"in \[(.*)\]", expression)[1]
    assert {int(code) for code in codes.split(",")} == RESUMABLE | {137}  # killed: it resumes too


def test_aws_batch():
    model = Session().get_service_model("batch")
    found = {}
    for operation, name in (("RegisterJobDefinition", "job-definition"),
                            ("SubmitJob", "submit-job")):  # fmt: skip
        found[name] = json.loads((FLOWS / "aws-batch" / f"{name}.json").read_text())
        report = ParamValidator().validate(
            found[name], model.operation_model(operation).input_shape
        )
        assert not report.has_errors(), report.generate_report()
        # It passes over keys that it does not know.
        assert not unknown(found[name], model.operation_model(operation).input_shape)
    rules = found["job-definition"]["retryStrategy"]["evaluateOnExit"]
    assert len(rules) <= 5  # more are refused
    codes = {int(rule["onExitCode"]) for rule in rules if "onExitCode" in rule}
    assert codes == RESUMABLE - {130}  # nobody sends SIGINT there
    assert rules[-1] == {"onReason": "*", "action": "EXIT"}
    assert found["submit-job"]["jobDefinition"] == found["job-definition"]["jobDefinitionName"]


def unknown(value, shape):
    """Return the keys of a request that its shape has not."""
    if shape.type_name == "structure":
        more = [key for key in value if key not in shape.members]
        return more + [
            key for name, member in value.items() if name in shape.members
            for key in unknown(member, shape.members[name])
        ]  # fmt: skip
    if shape.type_name == "list":
        return [key for member in value for key in unknown(member, shape.member)]
    return []


def container_commands():
    """Return the commands of containers that end in `tilenet predict`, without tini."""
    [job], [cron] = loaded("kubernetes/indexed-job.yaml"), loaded("kubernetes/cronjob.yaml")
    pods = {"indexed-job": job["spec"], "cronjob": cron["spec"]["jobTemplate"]["spec"]}
    found = {
        name: spec["template"]["spec"]["containers"][0] for name, spec in pods.items()
    } | {"argo": loaded("argo/tilenet.yaml")[0]["spec"]["templates"][1]["container"]}  # fmt: skip
    commands = {name: [*one["command"], *one["args"]] for name, one in found.items()}
    batch = json.loads((FLOWS / "aws-batch" / "job-definition.json").read_text())
    commands["aws-batch"] = batch["containerProperties"]["command"]
    for command in commands.values():
        assert command[:3] == ["tini", "-g", "--"]
    return {name: command[3:] for name, command in commands.items()}


@pytest.mark.parametrize("name", ["indexed-job", "cronjob", "argo", "aws-batch"])
@pytest.mark.parametrize("which", ["good", "mixed", "broken"])
def test_container_commands_run(name, which, shell, inputs, tmp_path):
    given = inputs[("good", "mixed", "broken").index(which)]
    out = "mask.zarr" if which == "broken" else "masks"
    places = {"Ref::input": str(given), "Ref::out": out}
    line = [places.get(word, word) for word in container_commands()[name]]
    done = shell(
        line, INPUT=str(given), OUT=out, PART="1/1", JOB_COMPLETION_INDEX="0",
        JOB_COMPLETIONS="1",
        **({"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "1"}
           if name == "aws-batch" else {}),
    )  # fmt: skip
    assert done.returncode == (3 if which == "broken" else 0), done.stderr
    assert ("warning: some inputs failed" in done.stderr) == (which == "mixed")
    document = json.loads(done.stdout)
    if which != "broken":
        assert (tmp_path / "masks" / "fluorescence.png").is_file()
        assert len(document["runs"]) == 1


# Flows in Python


@pytest.mark.parametrize("name", ["airflow", "prefect"])
def test_flows_know_the_exit_codes(name):
    tree = ast.parse((FLOWS / name / "tilenet_predict.py").read_text())
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("RESUMABLE", "SOME_FAILED")
    }
    assert set(found["RESUMABLE"]) == RESUMABLE
    assert found["SOME_FAILED"] == 7


def test_argo_verifies_what_is_there(shell, inputs, tmp_path):
    templates = {one["name"]: one for one in loaded("argo/tilenet.yaml")[0]["spec"]["templates"]}
    step = templates["verify"]["container"]
    line = [*step["command"], *step["args"]][3:]
    store = ["tilenet", "predict", inputs[0], "--out", "masks/deep", "--format", "zarr"]
    for made in (["tilenet", "predict", inputs[0], "--out", "masks"], store):
        assert shell(made).returncode == 0
    for out in ("masks", "masks/fluorescence.png", "masks/deep/fluorescence.zarr"):
        done = shell(line, OUT=out)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "masks" / "fluorescence.png").open("ab") as file:
        file.write(b"more")
    assert shell(line, OUT="masks").returncode == 8
