"""Schedulers and workers: who may work, who does what, and the same bytes whoever does."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
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
from tilenet.engine import cluster, dasktasks, executor, large, launch, spill, task, tasks
from tilenet.engine.admission import Admission, admitting, choose_here, revoke
from tilenet.engine.columns import Columns
from tilenet.engine.meter import Meter, Spans, host_of
from tilenet.engine.run import run_many
from tilenet.engine.runfolder import run_folder
from tilenet.engine.scheduler import parse_scheduler, read_job_queue
from tilenet.errors import ClusterError, OutputError, ResourceError, UnfitError, UsageError
from tilenet.models.session import Setup
from tilenet.models.store import find_model
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
    ("keywords", "word"),
    [("", "cores"), ('cores = 1\nmemory = "1 GB"\nqueues = "a"', "queues")],
    ids=["missing", "unknown"],
)
def test_keywords_that_dask_jobqueue_refuses(
    cli, scene, models, tmp_path, monkeypatch, keywords, word
):
    sbatch = tmp_path / "sbatch"  # which is not asked for a job
    sbatch.write_text("exit 1")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "jobs.toml").write_text(f"jobs = 1\n[cluster]\n{keywords}\n")
    done = cli("predict", scene, "--out", tmp_path / "x.zarr", "--model", models / "identity.onnx",
               "--scheduler", f"slurm:{tmp_path / 'jobs.toml'}")  # fmt: skip
    assert done.code == 2
    assert word in done.err
    assert not list(tmp_path.glob(".tilenet-keys*"))  # no keys are left


def test_no_batch_system(cli, scene, models, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "jobs.toml").write_text("jobs = 1")
    for kind, program in (("slurm", "sbatch"), ("pbs", "qsub")):
        scheduler = f"{kind}:{tmp_path / 'jobs.toml'}"
        done = cli("predict", scene, "--out", tmp_path / "x.zarr", "--model",
                   models / "identity.onnx", "--scheduler", scheduler)  # fmt: skip
        assert done.code == 2
        assert f"{program} is not there" in done.err


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
    from tilenet.models.devices import has_cuda

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
    monkeypatch.setattr(launch, "_FILE_WAIT", 0.3)
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
            "-CAcreateserial", "-copy_extensions", "copy", "-out", "own.pem")  # fmt: skip
    found = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(folder / "ca.pem"),
             "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}  # fmt: skip
    for role in ("CLIENT", "WORKER", "SCHEDULER"):
        found[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = str(folder / "own.key")
        found[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = str(folder / "own.pem")
    return found


def openssl(folder, *line):
    subprocess.run(["openssl", *line], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.mark.long
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


OTHERS = [
    (lambda folder: other_tilenet(folder, "0.0.9"), "has tilenet 0.0.9, the run 0.1.0"),
    (no_tilenet, "cannot load tilenet"),
    (lambda folder: package(folder, "rasterio", "0.1"), "has rasterio 0.1, the run"),
    (lambda folder: package(folder, "openvino", "0.1"), "has openvino 0.1, the run"),
]


@pytest.mark.long
def test_a_worker_of_another_version(scene, models, tmp_path, environment):
    sleeping = Path(__file__).with_name("sleeping.py")
    with clusters.cluster(tmp_path / "dask", environment) as found:
        # It takes its time, so that the other one gets work too, however late it is.
        found.worker("--preload", sleeping, environment={"TILENET_SLEEP": "0.5"})
        for number, (make, what) in enumerate(OTHERS, 2):
            path = f"{make(tmp_path / str(number))}:{environment.get('PYTHONPATH', '')}"
            other = found.worker(environment={"PYTHONPATH": path}, host=f"127.0.0.{number}")
            wait_for(lambda: count_workers(found) == 2)
            out = tmp_path / "x.zarr"
            with pytest.raises(UnfitError) as caught:
                segment(scene, out, models / "identity.onnx", scheduler=found.address)
            assert caught.value.code == 2
            if "openvino" in what:  # whichever chose is right
                assert re.search("worker tcp://.* has openvino .*, the run", str(caught.value))
            else:
                assert what in str(caught.value)
                assert f"worker tcp://127.0.0.{number}:" in str(caught.value)
            other.kill()
            wait_for(lambda: count_workers(found) == 1)


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
        segment([small.parent], tmp_path / "many", model, **options)
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)
    assert (tmp_path / "many" / "small.png").exists()
    assert not [path for path in (tmp_path / "many").iterdir() if path.name.startswith(".")]


# -- who does what


@pytest.mark.parametrize(("device", "forwards"), [("cpu", 2), ("cuda", 4)])
def test_a_gpu_has_two_more_blocks_in_flight(device, forwards):
    """While the GPU computes in two lanes, two threads read and one is free to join."""
    met, running, most = threading.Barrier(forwards), [], []

    def task(number):
        running.append(number)
        most.append(len(running))
        met.wait(30)  # breaks unless so many come
        running.remove(number)
        return number

    with cluster.open_executor("local", 1, device_class=device) as found:
        work = [(k,) for k in range(3 * forwards)]
        done = run_many(found, task, work, lambda *_: (), lambda *_: None)
        assert sorted(done) == [k for (k,) in work]
        assert max(most) == forwards
        assert found._pool._max_workers == forwards + 1
    with cluster.open_executor("local", 1000, device_class=device) as found:
        assert list(found._client.nthreads().values()) == [forwards + 1]
        assert found.forwards == forwards


@pytest.fixture
def reports(monkeypatch):
    """Return what tasks of runs in this process measured, as they come."""
    found = []
    add = Meter.add

    def adding(self, spans):
        found.append(spans)
        add(self, spans)

    monkeypatch.setattr(Meter, "add", adding)
    return found


QUIET = """
import logging
from tilenet.engine.cluster import open_executor

if __name__ == "__main__":
    with open_executor("processes:1", 1, device_class="cpu"):
        print(*(logging.getLogger(f"distributed.{one}").getEffectiveLevel()
                for one in ("worker", "nanny", "client")))
"""


def test_dask_keeps_its_log_to_itself(environment, tmp_path):
    """In the process that imports it for a run, too: what it has to say ends up in our errors."""
    (tmp_path / "quiet.py").write_text(QUIET)
    done = subprocess.run(
        [sys.executable, tmp_path / "quiet.py"], env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "50 50 50\n", done.stderr


def test_strips_that_another_host_reads(scene, models, tmp_path, home, expected, reports):
    options = {"scheduler": home.address, "block": 64}
    [found] = segment(scene, tmp_path / "x.zarr", models / "positional.onnx", **options).runs
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)
    assert {host_of(spans.worker) for spans in reports} == {"127.0.0.1", "127.0.0.2"}
    assert 0 < found.strip_bytes_moved < found.strip_bytes
    [alone] = segment(scene, tmp_path / "y.zarr", models / "positional.onnx").runs
    assert alone.strip_bytes_moved == 0


def test_networks_run_where_a_gpu_is_said_to_be(
    scene, models, tmp_path, environment, expected, reports
):
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker("--resources", "GPU=1", "--name", "gpu")
        found.worker(host="127.0.0.2")
        wait_for(lambda: count_workers(found) == 2)
        model, options = models / "positional.onnx", {"scheduler": found.address}
        [result] = segment(scene, tmp_path / "x.zarr", model, **options).runs
        assert {host_of(spans.worker) for spans in reports if spans.forwarded} == {"127.0.0.1"}
        assert {host_of(s.worker) for s in reports if s.pixels} <= {"127.0.0.1", "127.0.0.2"}
        assert result.tiles_forwarded == result.tiles
        reports.clear()
        small = [write_tif(tmp_path / f"{k}.tif", picture(60, 60)) for k in range(3)]
        segment(small, tmp_path / "many", model, **options)
        assert {host_of(spans.worker) for spans in reports} == {"127.0.0.1"}
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)


HIDE = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "openvino" else find(name, *more)
"""


def test_strips_are_mended_where_the_network_runs(
    scene, models, tmp_path, environment, expected, reports, monkeypatch
):
    """A worker that has no network joins; where a strip is lost, another one makes it again."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    path = f"{tmp_path / 'hide'}:{environment.get('PYTHONPATH', '')}"
    lost = []

    def losing(self, blocks, worker):
        noted(self, blocks, worker)
        for strip in (tmp_path / ".x.zarr.tilenet" / "strips").glob("*.strips"):
            if not lost:
                lost.append(strip.name)
                strip.unlink()

    noted = tasks.Hosts.forwarded
    monkeypatch.setattr(tasks.Hosts, "forwarded", losing)
    # Joins go to the worker that cannot run networks, wherever their blocks were forwarded.
    monkeypatch.setattr(tasks.Hosts, "of", lambda _self, _block: no_network)
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker("--resources", "GPU=1")
        found.worker(host="127.0.0.2", environment={"PYTHONPATH": path})
        wait_for(lambda: count_workers(found) == 2)
        no_network = next(one for one in addresses(found) if "127.0.0.2" in one)
        [result] = segment(
            scene, tmp_path / "x.zarr", models / "positional.onnx", scheduler=found.address
        ).runs
    assert lost
    assert result.tiles_forwarded > result.tiles  # the lost strip's, again
    assert np.array_equal(mask(tmp_path / "x.zarr"), expected)
    assert "127.0.0.2" in {host_of(spans.worker) for spans in reports if spans.pixels}


BROKEN = """
import tilenet.engine.task as task

class AcceleratorError(RuntimeError):
    pass

def drive(*_):
    raise AcceleratorError("CUDA error: unspecified launch failure\\nSearch for it")

def dask_setup(worker):
    task.drive = drive
"""


def test_a_worker_whose_device_failed_takes_no_more_tasks(
    scene, models, tmp_path, environment, expected
):
    preload = tmp_path / "broken.py"
    preload.write_text(BROKEN)
    model, out = models / "positional.onnx", tmp_path / "x.zarr"
    with clusters.cluster(tmp_path / "dask", environment) as found:
        broken = found.worker("--preload", preload)
        with pytest.raises(ResourceError) as caught:
            segment(scene, out, model, scheduler=found.address)
        assert caught.value.code == 6
        assert caught.value.what == "the device failed: CUDA error: unspecified launch failure"
        assert broken.wait(60) == 6
        found.worker()
        segment(scene, out, model, scheduler=found.address)
    assert np.array_equal(mask(out), expected)
    assert "tilenet worker: the device failed" in (tmp_path / "dask" / "log").read_text()


def addresses(found):
    import distributed

    with distributed.Client(found.address, set_as_default=False, timeout=20) as client:
        return list(client.nthreads())


def test_workers_come_and_go(models, tmp_path, environment, monkeypatch, reports):
    """One joins, one retires, one is killed, while a run goes on: the same bytes."""
    import distributed

    for module in (dasktasks, executor):
        monkeypatch.setattr(module, "LOOK", 0.2)
    scene = write_tif(tmp_path / "scene.tif", picture(900, 900))
    model = models / "positional.onnx"
    segment(scene, tmp_path / "expected.zarr", model)
    reports.clear()
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker("--name", "first")
        journal = tmp_path / ".x.zarr.tilenet" / "journal.jsonl"

        def change():
            wait_for(lambda: journal.exists() and journal.stat().st_size)
            second = found.worker("--name", "second")
            found.worker("--name", "third", host="127.0.0.2")
            wait_for(lambda: len({spans.worker for spans in list(reports)}) == 3)
            with distributed.Client(found.address, set_as_default=False) as client:
                client.retire_workers(names=["first"], close_workers=True)
            done = len(reports)
            wait_for(lambda: len(reports) > done + 4)
            second.kill()

        changing = threading.Thread(target=change)
        changing.start()
        [result] = segment(scene, tmp_path / "x.zarr", model, scheduler=found.address).runs
        changing.join()
    assert result.blocks == 225
    assert len({spans.worker for spans in reports}) == 3
    assert np.array_equal(mask(tmp_path / "x.zarr"), mask(tmp_path / "expected.zarr"))


def test_all_workers_go_and_another_comes(models, tmp_path, environment, monkeypatch, reports):
    """Dask forgets what had best go to those that are gone; it is handed in again."""
    for module in (dasktasks, executor):
        monkeypatch.setattr(module, "LOOK", 0.5)
    scene = write_tif(tmp_path / "scene.tif", picture(600, 600))
    model = models / "positional.onnx"
    segment(scene, tmp_path / "expected.zarr", model)
    reports.clear()
    with clusters.cluster(tmp_path / "dask", environment) as found:
        workers = [found.worker(), found.worker(host="127.0.0.2")]
        wait_for(lambda: count_workers(found) == 2)

        def change():
            wait_for(lambda: len(reports) > 8)
            for worker in workers:
                worker.kill()
            found.worker(host="127.0.0.3")

        changing = threading.Thread(target=change)
        changing.start()
        segment(scene, tmp_path / "x.zarr", model, scheduler=found.address)
        changing.join()
    assert "127.0.0.3" in {host_of(spans.worker) for spans in reports}
    assert np.array_equal(mask(tmp_path / "x.zarr"), mask(tmp_path / "expected.zarr"))


def test_a_mask_is_finished_without_workers(scene, models, tmp_path, environment, monkeypatch):
    """An adaptive cluster sends them away when the last block is made; the export needs none."""
    for module in (dasktasks, executor):
        monkeypatch.setattr(module, "LOOK", 0.2)
    monkeypatch.setattr(launch, "_GRACE", 0.3)
    export = large.export
    with clusters.cluster(tmp_path / "dask", environment) as found:
        worker = found.worker()

        def alone(document, spec, read, *arguments, **options):
            worker.kill()
            worker.wait()
            wait_for(lambda: not addresses(found))

            def slow(window):
                for _ in range(6):
                    time.sleep(0.25)
                    pixels = read(window)
                return pixels

            return export(document, spec, slow, *arguments, **options)

        monkeypatch.setattr(large, "export", alone)
        segment(scene, tmp_path / "x.tif", models / "positional.onnx", scheduler=found.address)
    assert (tmp_path / "x.tif").is_file()


def test_a_worker_that_is_lost_while_it_chooses(scene, models, tmp_path, environment, monkeypatch):
    for module in (dasktasks, executor):
        monkeypatch.setattr(module, "LOOK", 0.1)
    monkeypatch.setattr(launch, "_GRACE", 1.0)
    with clusters.cluster(tmp_path / "dask", environment) as found:
        worker = found.worker()
        submit = dasktasks.DaskTasks.submit

        def lose(self, function, *arguments, **options):
            if function is choose_here:
                worker.kill()
                worker.wait()
                wait_for(lambda: not addresses(found))
            return submit(self, function, *arguments, **options)

        monkeypatch.setattr(dasktasks.DaskTasks, "submit", lose)
        with pytest.raises(ClusterError, match="are gone"):
            segment(scene, tmp_path / "x.zarr", models / "positional.onnx", scheduler=found.address)


TWICE = """
import sys
from pathlib import Path
from tilenet.api import predict
from tilenet.config import PredictConfig

source, out, model = sys.argv[1:]
config = PredictConfig(model=model, tile=32, overlap=16, chunk=16, block=16, precision="fp32")
for name in ("a.zarr", "b.zarr"):
    assert predict([Path(source)], Path(out) / name, config).runs[0].blocks > 256
"""


@pytest.mark.long
def test_a_process_may_run_twice(scene, models, tmp_path, environment):
    """Dask's defaults, which come with its import, are there for the second run too."""
    line = [sys.executable, "-W", "error", "-c", TWICE, scene, tmp_path, models / "pointwise.onnx"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(mask(tmp_path / "a.zarr"), mask(tmp_path / "b.zarr"))


# -- what it shows


def fetch(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


@pytest.mark.long
def test_counters_and_report(scene, models, tmp_path, environment, command):
    with clusters.cluster(tmp_path / "dask", environment) as found:
        found.worker()
        line = flags(models / "positional.onnx", scheduler=found.address)
        done = command("predict", scene, "--out", tmp_path / "x.zarr", *line, "--json",
                       "--dask-report", tmp_path / "report.html")  # fmt: skip
        assert done.code == 0, done.err
        result = json.loads(done.out)
        [address] = re.findall(r"counters: (http://127\.0\.0\.1:\d+/metrics)", done.err)
        assert "dask_scheduler_workers" in fetch(address)
        values = dict(
            re.findall(r"^(tilenet_\w+_total) (\S+)$", fetch(worker_metrics(found)), re.M)
        )
    assert float(values["tilenet_pixels_total"]) == result["pixels"]
    assert float(values["tilenet_tiles_forwarded_total"]) == result["tiles"]
    assert float(values["tilenet_strip_bytes_total"]) == result["strip_bytes"]
    assert "strips took" in done.err
    assert "<html" in (tmp_path / "report.html").read_text()[:2000]
    assert "forward_task" in (tmp_path / "report.html").read_text()


def worker_metrics(found):
    import distributed

    with distributed.Client(found.address, set_as_default=False, timeout=20) as client:
        [worker] = client.scheduler_info()["workers"].values()
    return f"http://{worker['host']}:{worker['services']['dashboard']}/metrics"


def test_a_report_that_cannot_be(cli, scene, models, tmp_path):
    done = cli("predict", scene, "--out", tmp_path / "x.zarr", *flags(models / "identity.onnx"),
               "--dask-report", tmp_path / "none" / "report.html")  # fmt: skip
    assert done.code == 2
    assert "--dask-report" in done.err
    assert not (tmp_path / "x.zarr").exists()


# -- columns


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.data())
def test_every_block_is_handed_out_once(rows, cols, count, data):
    """Whoever comes and goes, and whatever an earlier run has done."""
    done = data.draw(st.sets(st.integers(0, rows * cols - 1)))
    state = bytearray(block in done for block in range(rows * cols))
    columns = Columns(rows, cols, lambda start, stop: state.find(0, start, stop))
    everybody = {f"{host}{number}": host for host in "ab" for number in range(3)}
    names = st.sets(st.sampled_from(sorted(everybody)), min_size=1)
    found = []
    while columns.left:
        places = {name: everybody[name] for name in sorted(data.draw(names))}
        for _ in range(data.draw(st.integers(1, 5))):
            blocks = columns.take(data.draw(st.sampled_from(sorted(places))), places, count)
            assert len(blocks) <= count
            found += blocks
    assert sorted(found) == [block for block in range(rows * cols) if block not in done]


def handed_out(rows, cols, places, speed):
    """Let workers of some speeds take blocks; returns who took what, in order."""
    state = bytearray(rows * cols)
    columns = Columns(rows, cols, lambda start, stop: state.find(0, start, stop))
    taken, clock = {}, dict.fromkeys(places, 0.0)
    while columns.left:
        worker = min(clock, key=clock.__getitem__)
        for block in columns.take(worker, places, 1):
            taken[block] = worker
        clock[worker] += 1 / speed(worker)
    return taken


def test_neighbours_sit_together():
    rows, cols = 40, 40
    places = {f"{host}{number}": f"host{host}" for host in range(4) for number in range(2)}
    taken = handed_out(rows, cols, places, lambda _: 1.0)
    crossing = sum(
        places[taken[block]] != places[taken[block + step]]
        for block in range(rows * cols)
        for step in (1, cols)
        if block + step < rows * cols and (step == cols or (block + 1) % cols)
    )
    assert crossing == 3 * rows  # three borders from top to bottom; by turns it would be nearly all


def test_nobody_runs_ahead():
    """A host that is ten times as fast helps the others: what waits for a neighbour is bounded."""
    rows, cols = 40, 40
    places = {"a": "a", "b": "b"}
    taken = handed_out(rows, cols, places, lambda worker: 10.0 if worker == "a" else 1.0)
    front = [0, 0]
    for block in taken:
        half = block % cols // (cols // 2)
        front[half] = max(front[half], block // cols)
        assert abs(front[0] - front[1]) <= 4


def test_what_a_killed_run_has_under_way_writes_nothing_into_the_next(
    scene, models, tmp_path, monkeypatch
):
    out = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(large, "_finish", lambda *_a, **_k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            segment(scene, out, models / "identity.onnx")
    folder = run_folder(out)
    (folder / "old.run").write_text('{"elsewhere": false, "versions": {}}')
    worker = task._worker(str(folder / "plan.json"), "old")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    worker.forward_to_files(0, Spans())
    with closing(spill.SpillReader(folder / "strips/0.own")) as half:
        decided = half.array("mask")
    for path in (folder / "strips").iterdir():
        path.unlink()
    revoke(folder)
    with pytest.raises(OutputError, match="another run has begun here"):
        worker.forward_to_files(0, Spans())
    with pytest.raises(OutputError, match="another run has begun here"):
        worker.write(0, decided, None)
    del before[folder / "old.run"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    task.forget_run(folder)


COPIES = {"empty": lambda _: b"", "zeros": lambda data: bytes(len(data)), "whole": bytes}


@pytest.mark.parametrize("damage", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_network_is_not_trusted_for_being_there(models, tmp_path, damage):
    """After a power cut it may be empty, or all zeros."""
    files = find_model(str(models / "conv.onnx"), None, {})
    whole, copy = files.weights.read_bytes(), tmp_path / "models" / f"{files.sha256}.onnx"
    copy.parent.mkdir()
    copy.write_bytes(damage(whole))
    before, setup = copy.stat(), Setup("openvino", "cpu", "fp32", 1, 1, "")
    with admitting(tmp_path, files, {}, elsewhere=True) as token:
        found, _ = Admission.check_in(tmp_path, token).network(files, setup)
    assert (found.weights, found.weights.read_bytes()) == (copy, whole)
    assert os.path.samestat(copy.stat(), before) == (damage(whole) == whole)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [copy.name]
