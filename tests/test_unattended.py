"""What nobody is there to see: dead workers, stuck reads, full disks, two owners."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import zarr
from rasters import picture, write_tif

from tilenet import durable, watchdog
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import room
from tilenet.engine.journal import BlockRecord, Journal
from tilenet.engine.runfolder import LOCK, locked
from tilenet.errors import OutputError

SMALL = ("--tile", 32, "--overlap", 16, "--chunk", 64, "--block", 128, "--precision", "fp32")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tif(tmp_path_factory.mktemp("source") / "a.tif", picture(500, 500))


def mask_of(out):
    return np.asarray(zarr.open_group(out, mode="r", use_consolidated=False)["mask"][...])


KILLER = """
import os
from tilenet.sources.raster import Raster
read = Raster.read
def deadly(self, window, *rest):
    if (window.row, window.col) == (128, 128):
        os.kill(os.getpid(), 9)
    return read(self, window, *rest)
Raster.read = deadly
"""


@pytest.mark.long
def test_a_block_that_kills_its_workers(source, models, environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    out, line = tmp_path / "x.zarr", [sys.executable, "-m", "tilenet", "predict", str(source)]
    line += ["--out", str(out), "--model", str(models / "conv.onnx"), "--json", *map(str, SMALL)]
    done = subprocess.run(
        [*line, "--scheduler", "processes:2"], env={**environment, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    found = json.loads(done.stdout)
    # Block 5 of 4 × 4, and what its tiles would have given to its neighbours.
    assert found["blocks_invalid"] == [5, 6, 9, 10]
    assert [p["block"] for p in found["invalid"] if "died" in p["why"]] == [5]
    assert found["tiles_forwarded"] < found["tiles"] == 961
    whole = tmp_path / "whole.zarr"
    predict([source], whole, PredictConfig(model=str(models / "conv.onnx"), tile=32, overlap=16,
                                           chunk=64, block=128, precision="fp32"))  # fmt: skip
    mask, expected = mask_of(out), mask_of(whole)
    lost = np.zeros(mask.shape, bool)
    for place in found["invalid"]:
        rows = slice(place["row"], place["row"] + place["height"])
        lost[rows, place["col"] : place["col"] + place["width"]] = True
    assert lost.sum() == (128 + 16) ** 2
    assert (mask[lost] == 255).all()
    assert (mask[~lost] == expected[~lost]).all()


STUCK = """
import time
import zlib
from pathlib import Path
from tilenet.sources.raster import Raster
Raster._read = lambda *_, **__: time.sleep(60)
"""


@pytest.mark.alone
@pytest.mark.parametrize("size", [60, 500])
@pytest.mark.parametrize("where", ["open", "read"])
def test_a_read_that_does_not_end(models, environment, tmp_path, size, where):
    source, env = write_tif(tmp_path / "a.tif", picture(size, size)), dict(environment)
    line = [sys.executable, "-m", "tilenet", "predict", str(source), "--out"]
    line += [str(tmp_path / "x.zarr"), "--model", str(models / "conv.onnx"), *map(str, SMALL)]
    fd = os.open(source, os.O_RDWR)
    if where == "open":  # the kernel lets nobody else open the file while we hold this
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    else:
        (tmp_path / "sitecustomize.py").write_text(STUCK)
        env["PYTHONPATH"] = str(tmp_path)
    start = time.monotonic()
    done = subprocess.run(
        [*line, "--read-timeout", "2"], env=env, capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    os.close(fd)
    assert time.monotonic() - start < 30
    assert done.returncode == 6, done.stderr
    [error] = [one for one in done.stderr.splitlines() if one.startswith("tilenet: error: ")]
    assert "a read has not ended" in error
    assert "a.tif" in error


def test_reads_in_time_wake_nobody(monkeypatch):
    late = []
    monkeypatch.setattr(watchdog, "_act", None)
    watchdog.watch_reads(late.append)
    with watchdog.watched("a", 60):
        time.sleep(1.2)
    assert not late
    assert not watchdog._reads
    monkeypatch.setattr(watchdog, "_act", late.append)
    with watchdog.watched("b", 0.1):
        time.sleep(1.5)
    assert late[0].where == "b"


STOPPED = """
import os, sys, time
from tilenet.watchdog import watch_reads, watched

watch_reads(lambda error: os._exit(error.code))
print("began", flush=True)
with watched("slide.tif", 5):
    began = time.process_time()
    while time.process_time() - began < 1:
        pass
"""


def test_a_process_that_is_stopped_is_no_late_read(environment):
    """Ctrl-Z, a suspended job, a freezer: the read goes on afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], env=environment, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0


def test_a_run_that_cannot_fit(cli, source, models, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx",
               *SMALL)  # fmt: skip
    assert done.code == 6
    assert "0.1 MB free" in done.err
    assert "or more" in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_says_what_it_takes(cli, source, models, tmp_path):
    line = ("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx")
    planned = json.loads(cli(*line, *SMALL, "--dry-run", "--json").out)["estimate"]
    assert 500 * 500 // 64 < planned["disk_bytes_at_least"] < 4_000_000


def test_a_local_run_says_nothing_of_other_hosts(cli, source, models, tmp_path):
    line = ("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx")
    done = cli(*line, *SMALL)
    assert "MB of the run folder\n" in done.err
    assert "host" not in done.err


def test_two_owners(tmp_path):
    """Where locks are granted to everybody, the first owner stops before it writes again."""
    with locked(tmp_path) as owner:
        with Journal(tmp_path / "journal", owner.check) as journal:
            journal.append([BlockRecord(0, (), {}, 0, 0)])
            (tmp_path / LOCK).write_text("another")
            with pytest.raises(OutputError, match="taken over"):
                journal.append([BlockRecord(1, (), {}, 0, 0)])
        assert (tmp_path / "journal").read_bytes().count(b"\n") == 1


def test_a_journal_of_two_owners_counts_each_block_once(tmp_path):
    record = BlockRecord(3, (), {1: 10}, 4, 0)
    with Journal(tmp_path / "journal") as journal:
        journal.append([record])
    (tmp_path / "journal").write_bytes(2 * (tmp_path / "journal").read_bytes())
    with Journal(tmp_path / "journal") as journal:
        assert journal.pixels == {1: 10}
        assert journal.dump().count(b"\n") == 1


def test_a_journal_that_cannot_be_taken_up_is_closed(tmp_path):
    """Its line is whole, but another version's."""
    body = b'{"block": 3, "colour": "red"}'
    path, handles = tmp_path / "journal", Path("/proc/self/fd")
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    before = len(list(handles.iterdir()))
    with pytest.raises((KeyError, TypeError)):
        Journal(path)
    assert len(list(handles.iterdir())) == before
    assert path.read_bytes().endswith(body + b"\n")


@pytest.mark.parametrize("address", ["tcp://10.1.2.3:8786", "tcp://scheduler:8786"])
def test_a_scheduler_that_anybody_can_reach(cli, source, models, tmp_path, address):
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx",
               *SMALL, "--scheduler", address)  # fmt: skip
    assert done.code == 2
    assert "--insecure-cluster" in done.err


def test_a_full_disk_says_what_is_needed_and_free(cli, source, models, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(durable, "append", full)
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx",
               *SMALL)  # fmt: skip
    assert done.code == 6
    [error] = [line for line in done.err.splitlines() if line.startswith("tilenet: error: ")]
    assert "the disk is full: " in error
    assert "MB free, and the run needs" in error
    monkeypatch.undo()
    assert cli("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx",
               *SMALL).code == 0  # fmt: skip
