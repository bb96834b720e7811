"""Where stdout takes nothing, and nobody reads stderr: one line, the code, and the run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rasters import picture, write_tif

FULL = Path("/dev/full")
COMMANDS = {
    "models": ["models"],
    "models json": ["models", "--json"],
    "info": ["info", "a.tif"],
    "failing json": ["info", "missing.tif", "--json"],
    "version": ["--version"],
    "help": ["--help"],
    "predict": ["predict", "a.tif", "--out", "x.zarr", "--json"],
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    write_tif(folder / "a.tif", picture(40, 50))
    return folder


def start(arguments, here, environment, **options):
    line = [sys.executable, "-m", "tilenet", *map(str, arguments)]
    return subprocess.run(
        line, cwd=here, env=environment, timeout=100, check=False, text=True, **options
    )


def complete(arguments, models, out):
    if arguments[0] != "predict":
        return arguments
    arguments = [out if part == "x.zarr" else part for part in arguments]
    return [*arguments, "--model", models / "conv.onnx"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_stdout(here, environment, models, tmp_path, name, unbuffered):
    arguments = complete(COMMANDS[name], models, tmp_path / "x.zarr")
    with FULL.open("w") as full:
        done = start(arguments, here, environment | {"PYTHONUNBUFFERED": unbuffered},
                     stdout=full, stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode == (3 if name == "failing json" else 6), done.stderr
    assert all(line.startswith("tilenet: ") for line in done.stderr.splitlines()), done.stderr
    assert done.stderr.count("tilenet: error: ") == 1


@pytest.mark.parametrize("name", ["models", "models json", "info"])
def test_a_closed_stdout(here, environment, name):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = start(COMMANDS[name], here, environment, stdout=pipe, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    line = [sys.executable, "-m", "tilenet", *COMMANDS[name]]
    done = subprocess.run(["/bin/sh", "-c", '"$@" >&-', "sh", *line], cwd=here, env=environment,
                          capture_output=True, text=True, timeout=100, check=False)  # fmt: skip
    assert done.returncode == 6
    assert done.stderr == (
        "tilenet: error: the result cannot be written: it is closed; stdout; point it elsewhere\n"
    )


@pytest.mark.parametrize("progress", ["log", "bar", "json"])
@pytest.mark.parametrize("end", ["2>&0", "2>/dev/full", "2>&-"])
def test_nobody_reads_stderr(here, environment, models, tmp_path, progress, end):
    arguments = complete(COMMANDS["predict"], models, tmp_path / "x.zarr")
    line = [sys.executable, "-m", "tilenet", *map(str, arguments), "--progress", progress]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            ["/bin/sh", "-c", f'"$@" {end} </dev/null', "sh", *line], cwd=here, env=environment,
            stdin=pipe, stdout=subprocess.PIPE, timeout=100, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["pixels"] == 2000
    assert (tmp_path / "x.zarr").is_dir()


def test_a_failure_that_nobody_reads(here, environment):
    with FULL.open("w") as full:
        done = start(["info", "missing.tif"], here, environment, stderr=full)
    assert done.returncode == 3
