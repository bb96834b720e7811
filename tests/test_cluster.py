"""Schedulers and workers: who may work, who does what, and the same bytes whoever does."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import clusters
import numpy as np
import pytest
import zarr
from clusters import wait_for
from hypothesis import given
from hypothesis import strategies as st
from rasters import picture, write_tif

import tilenet
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import cluster, run, scheduler
from tilenet.engine.columns import Columns
from tilenet.engine.meter import Meter, host_of
from tilenet.engine.scheduler import parse_scheduler, read_job_queue
from tilenet.errors import ClusterError, UnfitError, UsageError
from tilenet.quiet import without_module

SMALL = {"tile": 64, "overlap": 32, "chunk": 64, "block": 64, "precision": "fp32"}

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def segment(source, out, model, **options):
    config = PredictConfig(model=str(model), **SMALL | options)
    sources = source if isinstance(source, list) else [source]
    return predict(sources, Path(out), config)


def flags(model, **options):
    pairs = {"model": model, **SMALL, **options}
    return [part for key, value in pairs.items() for part in (f"--{key}", str(value))]


def mask(path):
    return zarr.open_group(path, mode="r")["mask"][:]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_tif(tmp_path_factory.mktemp("scene") / "scene.tif", picture(333, 421))


@pytest.fixture(scope="module")
def expected(scene, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "x.zarr"
    segment(scene, out, models / "positional.onnx")
    return mask(out)


@pytest.fixture(scope="module")
def home(tmp_path_factory, environment):
    """A cluster of two workers with two addresses, as if on two hosts."""
    with clusters.cluster(tmp_path_factory.mktemp("home"), environment) as found:
        found.worker()
        found.worker(host="127.0.0.2")
        yield found


# -- which scheduler


def test_what_schedulers_are_called():
    assert parse_scheduler("local").number == 1
    assert parse_scheduler("processes:3").number == 3
    assert parse_scheduler("tls://a:8786").place == "tls://a:8786"
    assert parse_scheduler("file:a b.json").place == "a b.json"
    assert parse_scheduler("k8s:team/dask").place == "team/dask"
    assert parse_scheduler("slurm:a.toml").elsewhere
    assert not parse_scheduler("cuda").elsewhere
    for wrong in (
        "",
        "x",
        "local:1",
        "processes:²",
        "tcp:9",
        "file:",
        "slurm",
        "k8s:a\0b",
        "cuda:0",
    ):
        with pytest.raises(UsageError):
            parse_scheduler(wrong)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "jobs"), ("jobs = 1\nadaptive = [1, 2]", "jobs"), ("adaptive = [3, 2]", "adaptive"),
        ("jobs = 0", "jobs"), ("jobs = 1\nwait = -1", "wait"), ("jobs = 1\ncores = 2", "cores"),
        ("jobs", "read"), ("jobs = 1\ncluster = 3", "cluster"),
    ],
)  # fmt: skip
def test_files_of_jobs_that_are_wrong(cli, scene, tmp_path, text, word):
    (tmp_path / "jobs.toml").write_text(text)
    done = cli("predict", scene, "--out", tmp_path / "x.zarr", "--scheduler",
               f"slurm:{tmp_path / 'jobs.toml'}")  # fmt: skip
    assert done.code == 2
    assert word in done.err
    assert "jobs.toml" in done.err


def test_a_file_of_jobs(tmp_path):
    path = tmp_path / "jobs.toml"
    path.write_text('adaptive = [0, 8]\nwait = 60\n[cluster]\ncores = 2\nmemory = "4 GB"\n')
    found = read_job_queue(path)
    assert (found.jobs, found.adaptive, found.wait) == (None, (0, 8), 60)
    assert found.cluster == {"cores": 2, "memory": "4 GB"}


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("slurm:jobs.toml", "dask_jobqueue", "hpc"), ("k8s:dask", "dask_kubernetes.operator", "k8s")],
)
def test_an_extra_that_is_missing(cli, scene, tmp_path, monkeypatch, name, module, extra):
    monkeypatch.chdir(tmp_path)
    Path("jobs.toml").write_text("jobs = 1")
    with without_module(module):
        done = cli("predict", scene, "--out", "x.zarr", "--scheduler", name)
    assert done.code == 2
    assert f"tilenet[{extra}]" in done.err


def test_no_gpu(cli, scene, tmp_path):
    from tilenet.models.session import has_cuda

    if has_cuda():
        pytest.skip("there is a GPU here")
    done = cli("predict", scene, "--out", tmp_path / "x.zarr", "--scheduler", "cuda")
    assert done.code == 4
    assert "no CUDA device" in done.err


def test_a_device_that_is_not_the_workers_own(cli, scene, tmp_path, home):
    done = cli("predict", scene, "--out", tmp_path / "x.zarr", "--scheduler", home.address,
               "--device", "cuda:1")  # fmt: skip
    assert done.code == 2
    assert "--device" in done.err


def test_by_the_scheduler_file(scene, models, tmp_path, home, expected):
    [found] = segment(
        scene, tmp_path / "x.zarr", models / "positional.onnx", scheduler=f"file:{home.file}"
    ).runs
    assert found.tiles_forwarded == found.tiles
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)


def test_scheduler_files_that_are_none(scene, models, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_FILE_WAIT", 0.3)
    other = tmp_path / "other.json"
    for text in ("[]", "{", '{"address": 3}', '{"address": "http://a"}'):
        other.write_text(text)
        with pytest.raises(UsageError, match="scheduler-file"):
            segment(scene, tmp_path / "x.zarr", models / "identity.onnx", scheduler=f"file:{other}")
    with pytest.raises(ClusterError, match="no scheduler file"):
        segment(scene, tmp_path / "x.zarr", models / "identity.onnx", scheduler="file:none.json")


# -- certificates


def certificates(folder):
    """Make an authority and one certificate by it; returns Dask's environment for them."""
    folder.mkdir()
    subject = ["-subj", "/CN=tilenet-test", "-nodes", "-newkey", "rsa:2048"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    openssl(folder, "req", "-x509", *subject, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2")
    openssl(folder, "req", *subject, *name, "-keyout", "own.key", "-out", "own.csr")
    openssl(folder, "x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", "own.pem", "-days", "2", "-copy_extensions", "copy")  # fmt: skip
    found = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(folder / "ca.pem"),
             "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}  # fmt: skip
    for role in ("CLIENT", "WORKER", "SCHEDULER"):
        found[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = str(folder / "own.key")
        found[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = str(folder / "own.pem")
    return found


def openssl(folder, *line):
    subprocess.run(["openssl", *line], cwd=folder, check=True, capture_output=True, timeout=60)


def test_certificates_from_dasks_configuration(
    scene, models, tmp_path, environment, expected, command
):
    known = environment | certificates(tmp_path / "keys")
    with clusters.cluster(tmp_path / "dask", known, "--protocol", "tls") as found:
        found.worker()
        assert found.address.startswith("tls://")
        line = ["predict", scene, "--out", tmp_path / "x.zarr",
                *flags(models / "positional.onnx", scheduler=found.address)]  # fmt: skip
        done = command(*line)
        assert done.code == 2, done.err
        assert "no certificates" in done.err
        done = subprocess.run(
            [sys.executable, "-m", "tilenet", *map(str, line)], env=known, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)


# -- who may work


def other_tilenet(folder, version):
    """Return a path with tilenet of another version."""
    ours = Path(tilenet.__file__).parent
    shutil.copytree(ours, folder / "tilenet", ignore=shutil.ignore_patterns("bundled", "*.pyc"))
    init = folder / "tilenet" / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', init.read_text()))
    return folder


def package(folder, name, version):
    """Return a path on which a package seems to have another version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def no_tilenet(folder):
    folder.mkdir()
    (folder / "tilenet.py").write_text("raise ImportError('it is not installed here')\n")
    return folder


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: other_tilenet(folder, "0.0.9"), "has tilenet 0.0.9, the run 0.1.0"),
        (no_tilenet, "cannot load tilenet"),
        (lambda folder: package(folder, "rasterio", "0.1"), "has rasterio 0.1, the run"),
        (lambda folder: package(folder, "openvino", "0.1"), "has openvino 0.1, the run"),
    ],
    ids=["tilenet", "without", "rasterio", "openvino"],
)
def test_a_worker_of_another_version(scene, models, tmp_path, environment, make, what):
    other = {"PYTHONPATH": f"{make(tmp_path / 'other')}:{environment.get('PYTHONPATH', '')}"}
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker()
        other_worker = found.worker(environment=other, host="127.0.0.2")
        wait_for(lambda: count_workers(found) == 2)
        with pytest.raises(UnfitError) as caught:
            segment(scene, tmp_path / "x.zarr", models / "identity.onnx", scheduler=found.address)
        assert other_worker.poll() is None
    assert caught.value.code == 2
    assert what in str(caught.value)
    if "openvino" not in what:  # of two that differ in this, the one that chose is right
        assert "tcp://127.0.0.2:" in str(caught.value)


def count_workers(found):
    import distributed

    with distributed.Client(found.address, set_as_default=False, timeout=20) as client:
        return len(client.nthreads())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide a folder from one process")
@pytest.mark.parametrize("hidden", ["out", "in"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a_worker_that_does_not_see_a_folder(models, tmp_path, environment, hidden, many):
    sources = [
        write_tif(tmp_path / "in" / f"{name}.tif", picture(*([60, 60] if many else [200, 200])))
        for name in "ab"
    ]
    (tmp_path / "out").mkdir()
    folder = tmp_path / hidden
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{folder}" && exec "$@"', "sh"]
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker(before=hide)
        out = tmp_path / "out" if many else tmp_path / "out" / "x.zarr"
        options = {"scheduler": found.address}
        if many and hidden == "in":  # as for any input that is not there, the others go on
            failed = segment(sources, out, models / "identity.onnx", **options).failed
            assert [one.code for one in failed] == [3, 3]
            return
        with pytest.raises(UsageError) as caught:
            segment(sources if many else sources[0], out, models / "identity.onnx", **options)
    assert caught.value.code == 2
    assert "the worker tcp://127.0.0.1:" in str(caught.value)
    assert ("run folder" if hidden == "out" else "input") in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == []


def test_a_network_that_workers_see_in_the_run_folder_only(
    scene, models, tmp_path, environment, expected
):
    if os.geteuid() != 0:
        pytest.skip("only root may hide a folder from one process")
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{models}" && exec "$@"', "sh"]
    small = write_tif(tmp_path / "in" / "small.tif", picture(60, 60))
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker(before=hide)
        model, options = models / "positional.onnx", {"scheduler": found.address}
        segment(scene, tmp_path / "x.zarr", model, **options)
        segment([small, small.parent], tmp_path / "many", model, **options)
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)
    assert (tmp_path / "many" / "small.png").exists()
    assert not [path for path in (tmp_path / "many").iterdir() if path.name.startswith(".")]
