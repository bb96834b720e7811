"""Many inputs in one run: they overlap, share what they may, and fail alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import networks
import numpy as np
import pytest
from rasters import picture, write_image, write_tif

from tilenet import durable
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import large, task
from tilenet.engine.cluster import open_executor
from tilenet.engine.executor import WorkersDied
from tilenet.engine.folderlock import FOLDER_LOCK, folder_locked
from tilenet.engine.meter import Spans
from tilenet.engine.run import run_many
from tilenet.engine.turns import take_turns
from tilenet.errors import OutputError, ResourceError

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

COUNT = 4
BLOCKS = {"tile": 32, "overlap": 16, "chunk": 64, "block": 128, "precision": "fp32"}
LINE = [word for key, value in BLOCKS.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return networks.conv(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Return a folder of rasters of 4 to 9 blocks."""
    folder = tmp_path_factory.mktemp("scenes")
    for k in range(COUNT):
        pixels = picture(200 + 50 * k, 300, seed=k)
        write_tif(folder / f"{k}.tif", pixels, georeferenced=True)
    return folder


@pytest.fixture(scope="module")
def alone(scenes, model, tmp_path_factory):
    """Return the bytes of each mask, made in a run of its own."""
    out = tmp_path_factory.mktemp("alone")
    for k in range(COUNT):
        predict([scenes / f"{k}.tif"], out / f"{k}.tif", config(model))
    return {k: (out / f"{k}.tif").read_bytes() for k in range(COUNT)}


def config(model, **keys):
    return PredictConfig(model=str(model), **BLOCKS, **keys)


def arguments(folder, out, model):
    return ["predict", folder, "--out", out, "--model", model, "--format", "cog", *LINE]


def made(out):
    return {int(path.stem): path.read_bytes() for path in out.glob("?.tif")}


def hidden(out):
    return [path.name for path in out.rglob(".*")]


class Events:
    """Listens to a run; `wait` returns once something has happened."""

    def __init__(self):
        self.all = []
        self._news = threading.Condition()

    def __call__(self, event):
        with self._news:
            self.all.append((event["event"], Path(event.get("input", "")).stem, dict(event)))
            self._news.notify_all()

    def wait(self, kind, name):
        with self._news:
            return self._news.wait_for(
                lambda: (kind, name) in [one[:2] for one in self.all], timeout=20
            )

    def of(self, *kinds):
        return [one[:2] for one in self.all if one[0] in kinds]


class TestOverlap:
    def test_the_next_begins_while_the_last_ends(self, scenes, model, alone, tmp_path, monkeypatch):
        """Each export waits for the next raster's first block: without overlap, for ever."""
        events, waited = Events(), []
        finish = large._finish

        def patient(plan, *arguments, **options):
            following = str(int(Path(plan.raster.path).stem) + 1)
            if int(following) < COUNT:
                waited.append(events.wait("progress", following))
            return finish(plan, *arguments, **options)

        monkeypatch.setattr(large, "_finish", patient)
        result = predict([scenes], tmp_path, config(model, format="cog"), listener=events)
        assert waited == [True] * (COUNT - 1)
        assert made(tmp_path) == alone
        assert hidden(tmp_path) == []
        assert [run.blocks for run in result.runs] == [6, 6, 9, 9]
        open_runs = np.cumsum([1 if kind == "start" else -1
                               for kind, _ in events.of("start", "finish")])  # fmt: skip
        assert open_runs.max() == 2
        assert result.forward_seconds <= result.seconds

    def test_only_its_own_inputs_are_closed(self, scenes, model, tmp_path, monkeypatch):
        closed = []
        forget = task.forget_run

        def forgetting(folder):
            before = set(task._workers)
            forget(folder)
            closed.append(
                {key[0] for key in before - set(task._workers)} - {str(folder / "plan.json")}
            )

        monkeypatch.setattr(large, "forget_run", forgetting)
        predict([scenes], tmp_path, config(model))
        assert closed == [set()] * COUNT
        assert not [key for key in task._workers if key[0].startswith(str(tmp_path))]

    def test_one_that_fails_does_not_stop_the_other(self, scenes, model, alone, tmp_path):
        folder = tmp_path / "in"
        shutil.copytree(scenes, folder)
        data = bytearray((folder / "1.tif").read_bytes())
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)  # pixels, not the header
        (folder / "1.tif").write_bytes(data)
        result = predict([folder], tmp_path / "out", config(model, format="cog", strict=True))
        [failed] = result.failed
        assert (Path(failed.input).name, failed.code) == ("1.tif", 3)
        assert made(tmp_path / "out") == {k: v for k, v in alone.items() if k != 1}

    def test_a_disk_too_small_for_two_is_large_enough_for_one(
        self, scenes, model, alone, tmp_path, monkeypatch
    ):
        """While two runs are open, the disk is full: the first to notice waits for the other."""
        events, append, full = Events(), durable.append, []

        def small(fd, data):
            begun, ended = len(events.of("start")), len(events.of("finish"))
            if begun - ended > 1 and not full:
                full.append(begun)
                raise OSError(errno.ENOSPC, "No space left on device", "x")
            append(fd, data)

        monkeypatch.setattr(durable, "append", small)
        result = predict([scenes], tmp_path, config(model, format="cog"), listener=events)
        assert full
        assert result.exit_code == 0
        assert made(tmp_path) == alone
        assert len(events.of("start")) == COUNT + 1

    def test_a_disk_that_stays_full_ends_the_run(self, cli, scenes, model, alone, tmp_path,
                                                  monkeypatch):  # fmt: skip
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device", "x")

        monkeypatch.setattr(durable, "append", full)
        done = cli(*arguments(scenes, tmp_path / "m", model), "--json")
        assert done.code == 6
        assert "the disk is full" in json.loads(done.out)["error"]["what"]
        assert len([e for e in done.err.splitlines() if e.startswith("tilenet: error")]) == 1
        monkeypatch.undo()
        assert cli(*arguments(scenes, tmp_path / "m", model)).code == 0
        assert made(tmp_path / "m") == alone
        assert hidden(tmp_path / "m") == []


class TestTurns:
    """With the real thread pool; the runs are plain functions."""

    @staticmethod
    def drive(works, note=lambda _: None):
        with open_executor("local", 1) as executor:
            return [found for _, found in take_turns(executor, deque(works), note)]

    def test_one_starts_forwards_at_a_time(self):
        starting, most = [], []

        def work(executor):
            starting.append(1)
            most.append(len(starting))
            time.sleep(0.02)
            starting.pop()
            executor.handed_out()
            future = executor.submit(lambda: (None, Spans()))
            executor.result(future)
            return 1

        spans = []
        assert self.drive([work] * 6, spans.append) == [1] * 6
        assert most == [1] * 6
        assert len(spans) == 6

    def test_two_are_open_at_the_most(self):
        open_, most = [], []

        def work(executor):
            open_.append(1)
            most.append(len(open_))
            executor.handed_out()
            time.sleep(0.05)
            open_.pop()

        self.drive([work] * 6)
        assert max(most) == 2

    def test_who_wants_to_be_alone_is(self):
        """Of two that want it, one has ended before the other is; a third begins after both."""
        said = []

        def work(name, *, alone):
            def run(executor):
                said.append(f"{name} begins")
                executor.handed_out()
                time.sleep(0.1)
                if alone:
                    executor.be_alone()
                    executor.be_alone()
                    said.append(f"{name} is alone")
                time.sleep(0.1)
                said.append(f"{name} ends")

            return run

        self.drive([work("a", alone=True), work("b", alone=True), work("c", alone=False)])
        assert said[:2] == ["a begins", "b begins"]
        first, second = said[2][0], said[4][0]
        assert said[2:] == [
            f"{first} is alone", f"{first} ends", f"{second} is alone", f"{second} ends",
            "c begins", "c ends",
        ]  # fmt: skip

    def test_packs_under_which_workers_die(self):
        """The packs are tried raster by raster, when all else is done; the guilty one is lost."""
        order = []

        def task(jobs):
            order.append(jobs)
            if "x" in jobs:
                raise WorkersDied
            return jobs, Spans()

        def work(executor):
            packs = [("ax",), ("bc",), ("de",)]
            found = run_many(executor, task, packs, lambda jobs: [(job,) for job in jobs],
                             lambda jobs: (f"lost {jobs}", Spans()))  # fmt: skip
            return sorted(jobs for jobs, _ in found)

        assert self.drive([work]) == [["a", "bc", "de", "lost x"]]
        assert order[-2:] == ["a", "x"]

    def test_a_failure_in_company_is_looked_at_alone(self):
        def work(executor):
            executor.handed_out()
            time.sleep(0.05)
            raise ResourceError("full")

        found = self.drive([work, work])
        assert [type(one) for one in found] == [ResourceError] * 2

    def test_who_is_stopped_ends(self):
        ended = []

        def work(executor):
            executor.handed_out()
            try:
                while True:
                    executor.check()
                    time.sleep(0.01)
            finally:
                ended.append(1)

        def wrong(executor):
            raise OutputError("wrong")

        with open_executor("local", 1) as executor:
            turns = take_turns(executor, deque([work, wrong]), lambda _: None)
            assert isinstance(next(turns)[1], OutputError)
            turns.close()
        assert ended == [1]


STOPPER = """
import time
from tilenet.engine import large, task
finish = large._finish
def slow(plan, folder, out, journal, check, **options):
    print("tilenet-test: finishing", flush=True)
    for _ in range(3000):
        check()
        time.sleep(0.01)
    return finish(plan, folder, out, journal, check, **options)
large._finish = slow
forward = task.Worker.forward
def slowly(self, *arguments, **options):
    time.sleep(0.3)
    return forward(self, *arguments, **options)
task.Worker.forward = slowly
"""


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both(scenes, model, alone, environment, tmp_path, number, cli):
    """While one is exported and the other is forwarded."""
    (tmp_path / "sitecustomize.py").write_text(STOPPER)
    out, summary = tmp_path / "m", tmp_path / "run.json"
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    process = subprocess.Popen(
        [sys.executable, "-m", "tilenet", *map(str, arguments(scenes, out, model)), "--summary",
         str(summary)], env={**environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "finishing" in process.stdout.readline()
    while not (out / ".1.tif.tilenet" / "plan.json").exists():
        time.sleep(0.05)
    assert json.loads(summary.read_text())["exit_code"] is None
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode == 128 + number
    assert [line for line in err.splitlines() if "error" in line] == [
        f"tilenet: error: interrupted; {number.name}; the same command resumes"
    ]
    record = json.loads(summary.read_text())
    assert (record["exit_code"], record["open"], record["inputs"]) == (128 + number, COUNT, COUNT)
    assert record["error"]["what"] == "interrupted"
    assert {name for name in hidden(out) if name.endswith("tilenet")} == {
        ".0.tif.tilenet", ".1.tif.tilenet",
    }  # fmt: skip
    assert not (out / FOLDER_LOCK).exists()
    assert cli(*arguments(scenes, out, model)).code == 0
    assert made(out) == alone
    assert hidden(out) == []


@pytest.mark.alone
def test_a_signal_ends_a_pack(model, environment, tmp_path):
    """Hundreds of small rasters in one task: it ends at the next one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nfrom tilenet.sources.raster import Raster\nread = Raster.read\n"
        "def slow(*arguments):\n    time.sleep(1)\n    return read(*arguments)\n"
        "Raster.read = slow\n"
    )
    for k in range(60):
        write_image(tmp_path / "in" / f"{k}.png", picture(30, 40, seed=k))
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    process = subprocess.Popen(
        [sys.executable, "-m", "tilenet", *map(str, arguments(tmp_path / "in", tmp_path / "m",
         model))], env={**environment, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "tilenet: model" in process.stderr.readline()
    time.sleep(1.5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert time.monotonic() - start < 10
    assert process.returncode == 143
    assert "interrupted" in err


KILLER = """
import os
from tilenet.sources.raster import Raster
read = Raster.read
def deadly(self, window, *rest):
    block = (window.row, window.col) == (128, 128) and self.info.path.endswith("1.tif")
    if block or self.info.path.endswith("small.png"):
        os.kill(os.getpid(), 9)
    return read(self, window, *rest)
Raster.read = deadly
"""


@pytest.mark.long
def test_what_kills_its_workers_costs_its_own_mask_only(
    scenes, model, alone, environment, tmp_path
):
    """A block of one raster, and a small one in a pack with others, beside two that are sound."""
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    images, out = tmp_path / "images", tmp_path / "m"
    images.mkdir()
    for k in range(3):
        shutil.copy(scenes / f"{k}.tif", images)
    for name in ("fellow", "small"):
        write_image(images / f"{name}.png", picture(40, 50))
    done = subprocess.run(
        [sys.executable, "-m", "tilenet", *map(str, arguments(images, out, model)),
         "--json", "--scheduler", "processes:2"],
        env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    result = json.loads(done.stdout)
    invalid = {Path(run["output"]).stem: run["blocks_invalid"] for run in result["runs"]}
    assert invalid == {"0": [], "1": [4, 5], "2": [], "fellow": []}  # 5 needs tiles of 4's
    assert [Path(one["input"]).name for one in result["failed"]] == ["1.tif", "small.png"]
    assert {k: made(out)[k] for k in (0, 2)} == {k: alone[k] for k in (0, 2)}
    assert (out / "fellow.tif").exists()
    assert not (out / "small.tif").exists()
    assert hidden(out) == []


class TestFolderLock:
    @pytest.mark.alone
    def test_a_second_run_is_refused_at_once(self, cli, scenes, model, tmp_path):
        with folder_locked(tmp_path / "m"):
            start = time.monotonic()
            done = cli(*arguments(scenes, tmp_path / "m", model))
            assert time.monotonic() - start < 2
            assert list((tmp_path / "m").iterdir()) == [tmp_path / "m" / FOLDER_LOCK]
        assert done.code == 5
        [line] = done.err.splitlines()
        assert f"another run (process {os.getpid()} on " in line
        assert not (tmp_path / "m").exists()

    def test_of_a_dead_run_is_nobodys(self, tmp_path):
        (tmp_path / FOLDER_LOCK).write_text("process 1 on mars")
        with folder_locked(tmp_path):
            assert (tmp_path / FOLDER_LOCK).read_text() != "process 1 on mars"
        assert hidden(tmp_path) == []

    def test_parts_share_it(self, tmp_path):
        with folder_locked(tmp_path, shared=True):
            other = folder_locked(tmp_path, shared=True)
            other.__enter__()
            with pytest.raises(OutputError, match="another run"), folder_locked(tmp_path):
                pass
            other.__exit__(None, None, None)
            assert hidden(tmp_path) == [FOLDER_LOCK]
            with pytest.raises(OutputError, match="another run"), folder_locked(tmp_path):
                pass
        assert hidden(tmp_path) == []

    def test_one_at_a_time_of_many(self, tmp_path):
        """Whoever gets in is alone there, though the file comes and goes."""
        inside, entered, refused = [], [], []

        def try_often():
            for _ in range(100):
                try:
                    with folder_locked(tmp_path):
                        inside.append(1)
                        entered.append(len(inside))
                        inside.pop()
                except OutputError:
                    refused.append(1)

        threads = [threading.Thread(target=try_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(entered) == {1}
        assert len(entered) + len(refused) == 400
        assert hidden(tmp_path) == []

    @pytest.mark.alone
    def test_parts_that_come_while_others_leave(self, tmp_path):
        """None is refused, though the file and its folder come and go."""
        errors, entered, end = [], [], time.monotonic() + 2

        def come_and_go():
            try:
                while time.monotonic() < end:
                    with folder_locked(tmp_path / "m", shared=True):
                        entered.append(1)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(entered) > 40

    @pytest.mark.alone
    def test_a_part_does_not_wait_for_long(self, tmp_path):
        with folder_locked(tmp_path):
            start = time.monotonic()
            with pytest.raises(OutputError, match="another run"):
                folder_locked(tmp_path, shared=True).__enter__()
            assert 1 < time.monotonic() - start < 5
