"""Parts: shares of one run that know nothing of each other, and join into the bytes of one run."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from rasters import picture, write_image, write_tif
from stores import ome
from test_geometry import axes
from test_invalid import damage

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.engine import large as engine_large
from tilenet.engine import runfolder
from tilenet.engine.journal import KILLS, NEIGHBOUR, Journal, decode
from tilenet.engine.lost import lose_block
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import LOCK, PLAN, locked, part_locked, run_folder, set_up_alone
from tilenet.errors import OutputError, UsageError
from tilenet.lattice import Lattice
from tilenet.part import Part

SMALL = {"tile": 64, "overlap": 48, "chunk": 64, "block": 64, "precision": "fp32"}
SIDE = 500  # 64 blocks

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def run(source, out, model, part=None, **options):
    config = PredictConfig(model=str(model), part=part, **SMALL | options)
    [result] = predict([Path(source)], Path(out), config).runs
    return result


def run_parts(source, out, model, parts, **options):
    return [run(source, out, model, part, **options) for part in parts]


def line(source, out, model, *more, **options):
    pairs = [(f"--{key}", str(value)) for key, value in (SMALL | options).items()]
    return ["predict", str(source), "--out", str(out), "--model", str(model),
            *itertools.chain(*pairs), *map(str, more)]  # fmt: skip


def contents(folder):
    """Return every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def journaled(out, part):
    journal = run_folder(out) / f"journal.{Part.parse(part, {}).name}.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_tif(folder / "a.tif", picture(SIDE, SIDE, seed=5), georeferenced=True)


@pytest.fixture(scope="module")
def model(models):
    return models / "positional.onnx"


KINDS = {
    "x.zarr": {"probabilities": True},
    "x.tif": {"probabilities": True, "blend": "hann"},
    "x.png": {"probabilities": False},
}


@pytest.fixture(scope="module")
def undisturbed(source, model, tmp_path_factory):
    """Return what one run leaves, by the output's name."""
    found = {}
    for name, options in KINDS.items():
        folder = tmp_path_factory.mktemp("undisturbed")
        assert run(source, folder / name, model, **options).blocks == 64
        found[name] = contents(folder)
    return found


# -- who does what


@given(st.integers(0, 1000), st.integers(1, 70))
def test_shares_are_disjoint_complete_and_even(items, count):
    shares = [Part(k, count).range_of(items) for k in range(1, count + 1)]
    assert list(itertools.chain(*shares)) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    dealt = [Part(k, count).every(range(items)) for k in range(1, count + 1)]
    assert sorted(itertools.chain(*dealt)) == list(range(items))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_part_has_a_single_item(count):
    assert [len(Part(k, count).range_of(1)) for k in range(1, count + 1)] == [1] + [0] * (count - 1)


@given(axes(), axes(), st.data())
def test_bands_of_blocks(rows, cols, data):
    lattice = Lattice(rows, cols)
    start = data.draw(st.integers(0, lattice.blocks))
    blocks = range(start, data.draw(st.integers(start, lattice.blocks)))
    cores = [lattice.core(block) for block in blocks]
    assert sum(band.pixels for band in lattice.bands(blocks)) == sum(c.pixels for c in cores)
    owned = [lattice.own_tiles(block) for block in blocks]
    assert lattice.tiles_in(blocks) == sum(len(r) * len(c) for r, c in owned)


SLURM = {"MIN": "1", "MAX": "8", "STEP": "1", "COUNT": "8"}


def slurm(task, **changed):
    return {
        f"SLURM_ARRAY_TASK_{key}": value for key, value in {**SLURM, "ID": task, **changed}.items()
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (slurm("3"), Part(3, 8)),
        (slurm("0", MIN="0", MAX="7"), Part(1, 8)),
        (slurm("12", MIN="4", MAX="12", STEP="4", COUNT="3"), Part(3, 3)),
        (slurm("7", MIN="7", MAX="7", COUNT="1"), Part(1, 1)),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "10"}, Part(1, 10)),
        ({"AWS_BATCH_JOB_NODE_INDEX": "3", "AWS_BATCH_JOB_NUM_NODES": "4"}, Part(4, 4)),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "5"}, Part(3, 5)),
    ],
)
def test_what_schedulers_say(environment, expected):
    assert Part.parse("auto", environment) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "SLURM_ARRAY_TASK_ID, AWS_BATCH_JOB_ARRAY_INDEX"),
        ({"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETIONS is not set"),
        ({"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "5"}, "no number: x"),
        ({"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "5"}, "no part 6/5"),
        ({"SLURM_ARRAY_TASK_ID": "2"}, "SLURM_ARRAY_TASK_MIN is not set"),
        (slurm("7", MIN="1", MAX="7", COUNT="3"), "not evenly numbered"),  # --array=1,3,7
    ],
)
def test_what_schedulers_do_not_say(environment, told):
    with pytest.raises(UsageError, match=told):
        Part.parse("auto", environment)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/4/2", "", "1.0/2"])
def test_no_part(cli, source, model, tmp_path, text):
    done = cli(*line(source, tmp_path / "x.zarr", model, "--part", text))
    assert done.code == 2
    assert "part" in done.err
    assert not list(tmp_path.iterdir())


def test_auto_on_the_command_line(cli, source, model, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    dry = line(source, tmp_path / "x.zarr", model, "--part", "auto", "--dry-run", "--json")
    refused = cli(*dry)
    assert refused.code == 2
    assert "JOB_COMPLETIONS" in refused.err
    monkeypatch.setenv("JOB_COMPLETIONS", "4")
    assert json.loads(cli(*dry).out)["estimate"]["part"] == "2/4"


# -- the same bytes

FOUR = ("1/4", "2/4", "3/4", "4/4")


ORDERS = [
    *(("x.zarr", order) for order in [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]),
    ("x.tif", (3, 1, 0, 2)),
    ("x.png", (2, 3, 1, 0)),
]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_any_order(source, model, tmp_path, undisturbed, name, order):
    out, options = tmp_path / name, KINDS[name]
    results = run_parts(source, out, model, [FOUR[k] for k in order], **options)
    assert [one.complete for one in results] == [False, False, False, True]
    assert [one.blocks_done for one in results] == [16, 32, 48, 64]
    assert [one.part for one in results] == [FOUR[k] for k in order]
    forwarded = sum(one.tiles_forwarded for one in results)
    # In order, every strip is there when it is wanted; else edge tiles are forwarded again.
    assert (forwarded == results[0].tiles) == (order == (0, 1, 2, 3))
    assert contents(tmp_path) == undisturbed[name]


def test_before_the_last_part_there_is_no_mask(cli, source, model, tmp_path, undisturbed):
    out, options = tmp_path / "x.zarr", line(source, tmp_path / "x.zarr", model, "--probabilities")
    first = cli(*options, "--part", "2/2")
    assert (first.code, first.out) == (0, "")
    assert "part 2/2: 32 of 64 blocks of" in first.err
    assert not out.exists()
    again = cli(*options, "--part", "2/2", "--json", "--csv", tmp_path / "areas.csv")
    found = json.loads(again.out)
    assert (again.code, found["complete"], found["tiles_forwarded"]) == (0, False, 0)
    assert (found["part"], found["blocks"], found["blocks_done"]) == ("2/2", 64, 32)
    assert not (tmp_path / "areas.csv").exists()
    last = cli(*options, "--part", "1/2")
    assert (last.code, last.out) == (0, f"{out}\n")
    assert "class" in last.err
    assert contents(tmp_path) == undisturbed["x.zarr"]
    after = cli(*options, "--part", "2/2", "--json")
    found = json.loads(after.out)
    assert (after.code, found["complete"], found["tiles_forwarded"]) == (0, True, 0)
    assert sum(one["pixels"] for one in found["classes"]) == SIDE * SIDE


@pytest.fixture
def start(environment):
    """Start commands as processes of their own; none outlives the test."""
    running = []

    def call(arguments):
        command = [sys.executable, "-m", "tilenet", *arguments]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    yield call
    for process in running:
        process.kill()
        process.communicate()


def test_all_at_once_one_killed_and_run_again(start, source, model, tmp_path, undisturbed):
    out = tmp_path / "x.zarr"
    begin = {
        part: line(source, out, model, "--probabilities", "--json", "--part", part) for part in FOUR
    }
    processes = {part: start(arguments) for part, arguments in begin.items()}
    wait_for(lambda: journaled(out, "3/4") >= 2)
    processes["3/4"].send_signal(signal.SIGKILL)
    found = {}
    for part, process in processes.items():
        output, error = process.communicate(timeout=120)
        if part != "3/4":
            assert process.returncode == 0, error
            found[part] = json.loads(output)
    assert processes["3/4"].returncode == -signal.SIGKILL
    assert not any(one["complete"] for one in found.values())
    assert not out.exists()
    assert journaled(out, "3/4") < 16
    again = start(begin["3/4"])
    output, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert json.loads(output)["complete"]
    assert contents(tmp_path) == undisturbed["x.zarr"]


@pytest.mark.parametrize("name", ["x.zarr", "x.tif"])
def test_all_at_once(start, source, model, tmp_path, undisturbed, name):
    flags = {key: value for key, value in KINDS[name].items() if key != "probabilities"}
    arguments = line(source, tmp_path / name, model, "--probabilities", "--json", **flags)
    processes = [start([*arguments, "--part", part]) for part in FOUR]
    done = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, done
    assert sum(json.loads(output)["complete"] for output, _ in done) >= 1
    assert contents(tmp_path) == undisturbed[name]


def test_other_counts_and_whole_runs_go_on_with_what_is_left(source, model, tmp_path, undisturbed):
    out, options = tmp_path / "x.zarr", KINDS["x.zarr"]
    done = [one.blocks_done for one in run_parts(source, out, model, ["2/8", "1/3"], **options)]
    assert done == [8, 22]  # blocks 8 to 15, 0 to 21
    whole = run(source, out, model, **options)
    assert (whole.complete, whole.blocks_resumed) == (True, 22)
    assert contents(tmp_path) == undisturbed["x.zarr"]


def test_more_parts_than_blocks(source, model, tmp_path):
    options = {"block": 256, "chunk": 256}
    names = [f"{k}/6" for k in range(1, 7)]
    results = run_parts(source, tmp_path / "x.zarr", model, names, **options)
    assert results[0].blocks == 4
    assert results[-1].complete
    run(source, tmp_path / "y.zarr", model, **options)
    assert contents(tmp_path / "x.zarr") == contents(tmp_path / "y.zarr")


def test_parts_go_on_after_a_killed_whole_run(start, source, model, tmp_path, undisturbed):
    out = tmp_path / "x.zarr"
    whole = start(line(source, out, model, "--probabilities"))
    journal = run_folder(out) / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 6)
    whole.send_signal(signal.SIGKILL)
    whole.communicate()
    before = len(decode(journal.read_bytes())[0])
    assert 0 < before < 60
    results = run_parts(source, out, model, ["2/2", "1/2"], **KINDS["x.zarr"])
    assert results[0].blocks_resumed == before
    assert results[1].complete
    assert contents(tmp_path) == undisturbed["x.zarr"]


def test_a_part_with_blocks_of_another_size_follows_the_first(source, model, tmp_path, undisturbed):
    out, options = tmp_path / "x.zarr", KINDS["x.zarr"]
    assert run(source, out, model, "1/2", **options).blocks == 64
    assert run(source, out, model, "2/2", **options | {"block": 128, "batch_size": 3}).complete
    assert contents(tmp_path) == undisturbed["x.zarr"]


@pytest.mark.long
def test_parts_with_worker_processes(command, source, model, tmp_path, undisturbed):
    for part in ("2/2", "1/2"):
        arguments = line(source, tmp_path / "x.zarr", model, "--probabilities", "--part", part)
        done = command(*arguments, "--scheduler", "processes:2")
        assert done.code == 0, done.err
    assert contents(tmp_path) == undisturbed["x.zarr"]


def test_strips_that_are_damaged_or_lost(source, model, tmp_path, undisturbed):
    out, options = tmp_path / "x.zarr", KINDS["x.zarr"]
    run_parts(source, out, model, ["1/3", "3/3"], **options)
    strips = sorted((run_folder(out) / "strips").glob("*.strips"))
    assert strips
    for k, path in enumerate(strips):
        if k % 2:
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert run(source, out, model, "2/3", **options).complete
    assert contents(tmp_path) == undisturbed["x.zarr"]


def test_what_others_wait_for_is_made_first(start, source, model, tmp_path):
    out = tmp_path / "x.zarr"
    process = start(line(source, out, model, "--part", "1/2"))
    wait_for(lambda: journaled(out, "1/2") >= 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert journaled(out, "1/2") < 30
    given = {int(path.stem) for path in (run_folder(out) / "strips").glob("*.strips")}
    assert len(given & set(range(24, 32))) >= 5  # of 8; some may be under way


def test_a_block_that_another_part_gave_up(source, model, tmp_path):
    """Nobody forwards it again, and its neighbours do without it."""
    out, lost, options = tmp_path / "x.zarr", 20, KINDS["x.zarr"]
    run(source, out, model, "3/3", **options)
    folder = run_folder(out)
    plan = Plan.load((folder / PLAN).read_bytes())
    with Journal(folder / "journal.1-of-3.jsonl") as journal:
        journal.append([lose_block(folder, plan, lost)])
    for mark in (folder / "strips").glob("*.lost"):  # as after a power cut
        mark.unlink()
    second = run(source, out, model, "2/3", **options)
    assert (second.complete, second.blocks_invalid) == (False, (28, 29))
    first = run(source, out, model, "1/3", **options)
    assert (first.complete, first.blocks_invalid) == (True, (20, 21, 28, 29))
    assert {one.why for one in first.invalid} == {KILLS, NEIGHBOUR}
    gone = np.zeros((SIDE, SIDE), bool)
    gone[plan.lattice.core(lost).slices()] = True
    for taker in (21, 28, 29):
        gone[plan.lattice.strip(lost, taker).slices()] = True
    run(source, tmp_path / "y.zarr", model, **options)
    mask, expected = (
        np.asarray(zarr.open_group(path, mode="r", use_consolidated=False)["mask"][...])
        for path in (out, tmp_path / "y.zarr")
    )
    assert np.array_equal(mask == 255, gone)
    assert np.array_equal(mask[~gone], expected[~gone])


def test_within_a_mask(model, source, tmp_path):
    keep = np.zeros((1, SIDE, SIDE), np.uint8)
    keep[:, 100:420, 80:200] = 1
    within = write_tif(tmp_path / "keep.tif", keep, georeferenced=True)
    options = {"within": str(within), "probabilities": True}
    whole = run(source, tmp_path / "one" / "x.zarr", model, **options)
    results = run_parts(source, tmp_path / "x.zarr", model, reversed(FOUR), **options)
    assert results[-1].complete
    assert results[-1].tiles_skipped == whole.tiles_skipped > 0
    assert contents(tmp_path / "x.zarr") == contents(tmp_path / "one" / "x.zarr")


def test_an_area(model, source, tmp_path):
    geopandas = pytest.importorskip("geopandas", reason="polygons take the extra vector")
    from shapely.geometry import Point

    place = Point(500000 + 2500, 5000000 - 2500).buffer(1800)
    geopandas.GeoDataFrame(geometry=[place], crs="EPSG:32633").to_file(tmp_path / "aoi.gpkg")
    options = {"aoi": tmp_path / "aoi.gpkg"}
    run(source, tmp_path / "one" / "x.zarr", model, **options)
    assert run_parts(source, tmp_path / "x.zarr", model, ["3/3", "1/3", "2/3"], **options)[
        2
    ].complete
    assert contents(tmp_path / "x.zarr") == contents(tmp_path / "one" / "x.zarr")


def test_pixels_that_cannot_be_read(cli, models, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(SIDE, SIDE), block=64)
    damage(source, [(0, 1), (7, 2), (7, 7)])
    options = line(source, tmp_path / "x.zarr", models / "conv.onnx")
    assert cli(*options).code == 7
    whole = contents(tmp_path / "x.zarr")
    shutil.rmtree(tmp_path / "x.zarr")
    done = [cli(*options, "--json", "--part", part) for part in ("2/3", "3/3", "1/3")]
    assert [one.code for one in done] == [0, 7, 7]
    found = [json.loads(one.out) for one in done]
    assert [one["blocks_invalid"] for one in found] == [[], [58, 63], [1, 58, 63]]
    assert contents(tmp_path / "x.zarr") == whole


# -- who may do what at once


def test_another_plan_is_refused(source, model, tmp_path):
    out = tmp_path / "x.zarr"
    run(source, out, model, "1/2")
    before = {k: v for k, v in contents(tmp_path).items() if not k.endswith("lock")}
    with pytest.raises(OutputError, match="blend"):
        run(source, out, model, "2/2", blend="hann")
    assert {k: v for k, v in contents(tmp_path).items() if not k.endswith("lock")} == before
    assert run(source, out, model, "2/2").complete
    with pytest.raises(OutputError, match="blend"):
        run(source, out, model, "2/2", blend="hann")


def test_a_part_is_run_once_at_a_time(source, model, tmp_path):
    out = tmp_path / "x.zarr"
    folder = run_folder(out)
    folder.mkdir()
    with part_locked(folder, Part(1, 2)):
        with pytest.raises(OutputError, match="part 1/2 is already running"):
            run(source, out, model, "1/2")
        with pytest.raises(OutputError, match="another run is writing"):
            run(source, out, model)
        assert not run(source, out, model, "2/2").complete
    with locked(folder), pytest.raises(OutputError, match="a whole run is writing"):
        run(source, out, model, "1/2")
    assert run(source, out, model, "1/2").complete


def test_a_part_leaves_what_others_may_need(source, model, tmp_path):
    """Only who is alone can tell what was left behind: others are at work beside a part."""
    out = tmp_path / "x.zarr"
    run(source, out, model, "1/3")
    others = [run_folder(out) / name for name in ("strips/.50.own.0123abcd.tmp", "theirs.run")]
    for path in others:
        path.write_text("{}")
    assert not run(source, out, model, "2/3").complete
    assert all(path.exists() for path in others)
    assert run(source, out, model, "3/3").complete


def test_the_same_part_twice_at_once(start, source, model, tmp_path):
    out = tmp_path / "x.zarr"
    arguments = line(source, out, model, "--part", "1/2")
    first = start(arguments)
    wait_for(lambda: journaled(out, "1/2") >= 1)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(arguments)
    _, error = second.communicate(timeout=120)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 5
    assert "part 1/2 is already running" in error
    _, error = first.communicate(timeout=120)
    assert first.returncode == 0, error


STOPS = [
    (name, stop)
    for name, last in (("x.zarr", "publish"), ("x.tif", "export"))
    for stop in ("upper_levels", last, "remove_run_folder")
]


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_a_finisher_that_is_killed(source, model, tmp_path, undisturbed, monkeypatch, name, stop):
    """Whatever was cut short, any part finishes it."""
    out, options, real = tmp_path / name, KINDS[name], getattr(engine_large, stop)
    run(source, out, model, "1/2", **options)

    def die(*arguments, **keywords):
        if stop in ("publish", "export"):
            real(*arguments, **keywords)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(engine_large, stop, die)
        with pytest.raises(SystemExit):
            run(source, out, model, "2/2", **options)
    assert run_folder(out).exists()
    again = run(source, out, model, "1/2", **options)
    assert (again.complete, again.tiles_forwarded) == (True, 0)
    assert contents(tmp_path) == undisturbed[name]


def test_parts_that_come_while_the_mask_is_finished_wait(
    source, model, tmp_path, undisturbed, monkeypatch
):
    out, options, real = tmp_path / "x.zarr", KINDS["x.zarr"], engine_large.publish
    run(source, out, model, "1/2", **options)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def slow(*arguments, **keywords):
        inside.set()
        assert go_on.wait(60)
        real(*arguments, **keywords)

    monkeypatch.setattr(engine_large, "publish", slow)

    def call(part):
        results.append(run(source, out, model, part, **options))

    threads = [threading.Thread(target=call, args=[part]) for part in ("2/2", "1/2")]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    time.sleep(0.5)
    assert results == []
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert [one.complete for one in results] == [True, True]
    assert sorted(one.tiles_forwarded > 0 for one in results) == [False, True]
    assert contents(tmp_path) == undisturbed["x.zarr"]


def test_a_part_that_waits_can_be_stopped(start, source, model, tmp_path):
    folder = run_folder(tmp_path / "x.zarr")
    folder.mkdir()
    with locked(folder, last_part=True):
        process = start(line(source, tmp_path / "x.zarr", model, "--part", "1/2"))
        wait_for(lambda: f"{folder / LOCK}" in opened_by(process.pid))
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=10)
    assert process.returncode == 143
    assert error.count("tilenet: error: interrupted") == 1


def opened_by(pid):
    """Return the names of a process's open files."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            names.append(str(link.readlink()))
    return names


def test_where_locks_are_granted_to_everybody(tmp_path, monkeypatch):
    """There the later owner's name is found by the earlier one before it writes again."""
    monkeypatch.setattr(runfolder.fcntl, "flock", lambda _fd, _how: None)
    with part_locked(tmp_path, Part(1, 2)) as one, part_locked(tmp_path, Part(2, 2)) as other:
        one.check()
        other.check()
        with part_locked(tmp_path, Part(1, 2)) as again:
            with pytest.raises(OutputError, match="taken over"):
                one.check()
            again.check()
            other.check()
            with locked(tmp_path):
                for owner in (other, again):
                    with pytest.raises(OutputError, match="taken over"):
                        owner.check()
    with (
        pytest.raises(OutputError, match="taken over"),
        set_up_alone(tmp_path),
        set_up_alone(tmp_path),
    ):
        pass


def test_an_old_name_in_the_lock_is_no_owner(source, model, tmp_path):
    """A part that finished a mask and was killed has left its name."""
    folder = run_folder(tmp_path / "x.zarr")
    folder.mkdir()
    (folder / LOCK).write_bytes(b"part 0123")
    assert not run(source, tmp_path / "x.zarr", model, "1/2").complete
    with (folder / LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else has it


@pytest.mark.parametrize(
    ("more", "told"), [(("--overwrite",), "replace each other's work"), ((), "s3")]
)
def test_what_parts_cannot_do(cli, source, model, tmp_path, more, told):
    out = tmp_path / "x.zarr"
    options = line(source, out, model, "--part", "1/2", *more)
    if told == "s3":
        options[options.index(str(out))] = "s3://bucket/x.zarr"
        options += ["--allow-remote", "--scratch", str(tmp_path)]
        told = "parts of a mask need a disk"
    done = cli(*options)
    assert done.code == 2
    assert told in done.err
    assert not list(tmp_path.iterdir())


def test_the_dry_run_of_a_part(cli, source, model, tmp_path):
    found = []
    for part in ("1/3", "2/3", "3/3"):
        done = cli(*line(source, tmp_path / "x.zarr", model, "--part", part, "--dry-run", "--json"))
        found.append(json.loads(done.out)["estimate"])
    assert [one["part"] for one in found] == ["1/3", "2/3", "3/3"]
    assert [one["part_blocks"] for one in found] == [22, 21, 21]
    assert sum(one["part_tiles"] for one in found) == found[0]["tiles"]
    assert not list(tmp_path.iterdir())


# -- small rasters, several inputs


def test_a_small_raster_is_the_first_parts(cli, model, tmp_path):
    source = write_tif(tmp_path / "a.tif", picture(50, 60))
    options = line(source, tmp_path / "x.zarr", model, "--json")
    before = cli(*options, "--part", "2/2")
    found = json.loads(before.out)
    assert (before.code, found["complete"], found["blocks_done"]) == (0, False, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    first = json.loads(cli(*options, "--part", "1/2").out)
    assert (first["complete"], first["part"], first["blocks_done"]) == (True, "1/2", 1)
    after = cli(*options, "--part", "2/2")
    assert (after.code, json.loads(after.out)["complete"]) == (0, True)
    run(source, tmp_path / "y.zarr", model)
    assert contents(tmp_path / "x.zarr") == contents(tmp_path / "y.zarr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of seven small rasters and one of four blocks."""
    path = tmp_path_factory.mktemp("images")
    for k in range(7):
        write_image(path / f"{'deep/' if k % 2 else ''}i{k}.png", picture(40 + k, 50, seed=k))
    write_tif(path / "large.tif", picture(110, 120))
    return path


def test_several_inputs(cli, folder, model, tmp_path):
    def call(name, *more):
        return cli(*line(folder, tmp_path / name, model, "--format", "png", "--json", *more))

    assert call("one").code == 0
    done = [call("parts", "--part", part) for part in ("3/3", "1/3", "2/3")]
    assert [one.code for one in done] == [0, 0, 0]
    runs = [json.loads(one.out)["runs"] for one in done]
    assert sorted(map(len, runs)) == [2, 3, 3]
    assert all(one["complete"] for one in itertools.chain(*runs))
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert "part 2/3: 3 of 8 inputs" in done[2].err
    again = json.loads(call("parts", "--part", "1/3").out)
    assert [one["tiles_forwarded"] for one in again["runs"]] == [0, 0, 0]
    nothing = call("parts", "--part", "9/9")
    assert (nothing.code, json.loads(nothing.out)["runs"]) == (0, [])
    replaced = call("parts", "--part", "2/3", "--overwrite")
    assert (replaced.code, len(json.loads(replaced.out)["runs"])) == (0, 3)
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_inputs_named_in_any_order(cli, folder, model, tmp_path):
    names = sorted(map(str, folder.glob("*.png")))
    made = []
    for part, order in (("1/2", names), ("2/2", names[::-1])):
        options = line(order[0], tmp_path, model, "--json", "--part", part)
        made += json.loads(cli(*options[:2], *order[1:], *options[2:]).out)["runs"]
    assert sorted(one["input"] for one in made) == names


def test_two_inputs_of_one_name_are_refused_whosever_they_are(cli, model, tmp_path):
    for ending in ("png", "bmp"):
        write_image(tmp_path / "in" / f"a.{ending}", picture(20, 20))
    for part in ("1/2", "2/2"):
        done = cli(*line(tmp_path / "in", tmp_path / "out", model, "--part", part))
        assert done.code == 5
        assert "one mask" in done.err


def test_the_dry_run_of_several_inputs(cli, folder, model, tmp_path):
    options = line(folder, tmp_path / "out", model, "--dry-run", "--json")
    found = [
        json.loads(cli(*options, "--part", part).out)["estimate"] for part in ("1/3", "2/3", "3/3")
    ]
    assert sorted(map(len, found)) == [2, 3, 3]
    inputs = [one["input"] for one in itertools.chain(*found)]
    assert len(set(inputs)) == 8


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_label_of_an_image(model, source, tmp_path, zarr_format):
    pixels = picture(SIDE, SIDE, seed=5)
    for name, parts in (("one", [None]), ("parts", ["2/2", "1/2"])):
        image = ome(tmp_path / name / "i.ome.zarr", pixels, zarr_format=zarr_format, levels=2)
        for part in parts:
            config = PredictConfig(model=str(model), part=part, into=image, **SMALL)
            [result] = predict([source], None, config).runs
        assert result.complete
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
