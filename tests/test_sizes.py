"""Tile and batch by memory: what is known of it, what a network takes, what is chosen."""

import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace

import networks
import pytest
from conftest import Done
from hypothesis import given
from hypothesis import strategies as st
from rasters import picture, write_tif

from tilenet.apart import run_apart
from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.controlgroups import cpu_limit
from tilenet.mask_api import verify
from tilenet.memory import memory_limit
from tilenet.models.devices import cores
from tilenet.models.footprint import Footprint, footprint
from tilenet.models.session import Setup, choose
from tilenet.models.sizes import Wanted, choose_sizes, decide
from tilenet.models.store import find_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return an ONNX file of a network that takes a few hundred bytes per pixel."""
    return networks.conv(tmp_path_factory.mktemp("wide") / "wide.onnx", hidden=64)


@pytest.fixture(scope="module")
def files(wide):
    return find_model(str(wide), None, {})


@pytest.fixture(scope="module")
def needs(files):
    """Return what the network takes, as this machine tells."""
    return footprint(files, choose(files, precision="fp32"))


def enough(needs, tile):
    """Return the memory with which a tile is chosen, as the README says, and a little more."""
    side = min(4, cores()) if tile <= 512 else 1  # small tiles are forwarded side by side
    took = needs.fixed + needs.per_pixel * side * tile * tile
    return int((took + 4 * 3 * tile * (1536 + tile) + 200 * MIB) / 0.85) + MIB


@pytest.fixture
def limited(command, environment):
    """Run `tilenet predict` in a process that may have so much memory."""

    def call(limit, *arguments, cache=None):
        def lower():
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        own = {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
        line = [sys.executable, "-m", "tilenet", "predict", *arguments, "--precision", "fp32"]
        done = subprocess.run(
            list(map(str, line)), capture_output=True, text=True, env=environment | own,
            timeout=120, check=False, preexec_fn=lower,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def raster(tmp_path):
    return write_tif(tmp_path / "r.tif", picture(300, 200))


@pytest.fixture
def larger(tmp_path):
    """Return a raster of four blocks, and the options that make them."""
    return write_tif(tmp_path / "r.tif", picture(900, 800))


def estimated(done):
    assert done.code == 0, done.err
    return json.loads(done.out)["estimate"]


def write_groups(root, groups, files):
    """Write what Linux shows of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/job", {"job/memory.max": "max"}, None),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "70000"}, 70000),
        ("0::/", {"memory.max": "60000"}, 60000),
        ("3:cpu:/x\n2:memory:/job", {"memory/job/memory.limit_in_bytes": "50000"}, 50000),
        # In a container, whose group has another name there than for the kernel.
        ("2:memory:/docker/1", {"memory/memory.limit_in_bytes": "40000"}, 40000),
        ("2:cpu:/job", {"job/memory.max": "1"}, None),
        ("0::/a\u2028b", {"a\u2028b/memory.high": "30000"}, 30000),
        ("nonsense", {}, None),
    ],
)
def test_control_groups_limit_memory(tmp_path, groups, files, expected):
    write_groups(tmp_path, groups, files)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit(tmp_path) == (expected or machine)


@given(
    st.integers(0, 1 << 34), st.integers(1, 1 << 14), st.integers(1, 1 << 12), st.integers(1, 64)
)
def test_a_footprint_is_the_line_through_two_trials(fixed, per_pixel, side, more):
    sides = (side, side + more)
    found = Footprint.through(sides, tuple(fixed + per_pixel * one * one for one in sides))
    assert found == Footprint(fixed, per_pixel)
    assert found.of(12345) == fixed + 12345 * per_pixel


ON_CPU = Setup("torch", "cpu", "fp32", 2, 1, "")
ON_GPU = Setup("torch", "cuda", "fp16", 2, 4, "")


def room_for(needs, pixels, tile, channels, lanes):
    return needs.of(pixels) + 4 * channels * tile * (1536 + tile) * lanes + 200 * MIB


@pytest.mark.parametrize("tile", [1024, 768, 512, 256])
def test_the_largest_tile_that_fits(tile):
    needs, wanted = Footprint(300 * MIB, 1000.0), Wanted((1024, 768, 512, 256), 2)
    room = room_for(needs, tile * tile, tile, 2, 1)
    assert decide(needs, room, ON_CPU, wanted).tile == tile
    found = decide(needs, room - 1, ON_CPU, wanted)
    assert found.tile == max(256, {1024: 768, 768: 512, 512: 256, 256: 256}[tile])
    assert ("may fail" in found.why) == (tile == 256)


@pytest.mark.parametrize("batch", [4, 2, 1])
def test_the_largest_batch_that_fits_on_a_gpu(batch):
    needs, wanted = Footprint(300 * MIB, 1000.0), Wanted((1024, 512), 2, device="cuda")
    room = room_for(needs, 2 * batch * 1024 * 1024, 1024, 2, 2)
    found = decide(needs, room, ON_GPU, wanted)
    assert (found.tile, found.setup.batch_size, found.why) == (1024, batch, "")
    less = decide(needs, room - 1, ON_GPU, wanted)
    assert (less.tile, less.setup.batch_size) == {
        4: (1024, 2), 2: (1024, 1), 1: (512, 4)
    }[batch]  # fmt: skip


@given(st.floats(0, 1e11), st.integers(1, 8), st.integers(1, 64))
def test_neither_batch_nor_threads_change_the_tile(room, batch, threads):
    needs, tiles = Footprint(300 * MIB, 1000.0), (1024, 768, 512, 256)
    free = decide(needs, room, ON_GPU, Wanted(tiles, 3))
    asked = decide(
        needs, room, replace(ON_GPU, threads=threads), Wanted(tiles, 3, batch_size=batch)
    )
    assert (asked.tile, asked.setup.batch_size) == (free.tile, batch)


def test_a_tile_that_could_not_be_tried_is_not_chosen():
    found = decide(Footprint(300 * MIB, math.inf), 1e12, ON_CPU, Wanted((1024, 512), 2))
    assert found.tile == 512
    assert "more than could be tried" in found.why


def test_what_a_network_takes_is_near_what_it_holds(needs):
    # Between its 64 hidden channels in fp32 and a few copies of all it has.
    assert 64 * 4 < needs.per_pixel < 4 * 64 * 4
    assert 20 * MIB < needs.fixed < 500 * MIB


@pytest.mark.parametrize(
    "damage", ["", '{"fixed": -5, "per_pixel": 0.5}', '{"fixed": 1, "per_pixel": Infinity}']
)
def test_a_footprint_is_kept_and_tried_again_if_damaged(cache, files, needs, damage):
    setup = choose(files, precision="fp32")
    kept = {path: path.read_text() for path in (cache / "tilenet/footprints").iterdir()}
    [path] = [one for one, text in kept.items() if Footprint(**json.loads(text)) == needs]
    try:
        path.write_text(json.dumps({"fixed": 7, "per_pixel": 11.0}))
        assert footprint(files, setup) == Footprint(7, 11.0)
        path.write_text(damage)
        again = footprint(files, setup)
        assert again.per_pixel == pytest.approx(needs.per_pixel, rel=0.2)
        assert Footprint(**json.loads(path.read_text())) == again
    finally:
        path.write_text(kept[path])


def test_a_network_that_does_not_run_has_none(tmp_path):
    path = networks.pointwise(tmp_path / "gone.onnx")
    files = find_model(str(path), None, {})
    path.unlink()
    assert footprint(files, choose(files, precision="fp32")) is None


def test_with_memory_enough_nothing_is_tried(cache, tmp_path):
    files = find_model(str(networks.conv(tmp_path / "new.onnx", seed=99)), None, {})
    before = sorted((cache / "tilenet/footprints").glob("*"))
    found = choose_sizes(files, Wanted((64, 32), 3))
    assert (found.tile, found.setup.batch_size, found.why) == (64, 1, "")
    assert sorted((cache / "tilenet/footprints").glob("*")) == before


@pytest.mark.parametrize(("fits", "tile"), [(1024, 1024), (768, 768), (64, 256)])
def test_memory_makes_tiles_smaller(limited, wide, needs, raster, tmp_path, fits, tile):
    line = (raster, "--out", tmp_path / "m.zarr", "--model", wide, "--dry-run", "--json")
    done = limited(enough(needs, fits), *line)
    found = estimated(done)
    assert (found["tile"], found["overlap"]) == (tile, tile // 4)
    assert (f"tile {tile}, not 1024: a run would take about" in done.err) == (tile < 1024)
    assert ("may fail" in done.err) == (fits == 64)


def test_what_was_asked_for_stays(limited, wide, needs, raster, tmp_path):
    line = (raster, "--out", tmp_path / "m.zarr", "--model", wide, "--dry-run", "--json")
    done = limited(enough(needs, 512), *line, "--tile", "1024", "--batch-size", "3")
    found = estimated(done)
    assert (found["tile"], found["batch_size"]) == (1024, 3)
    assert "a run would take" not in done.err


def test_how_it_is_run_does_not_change_the_tile(limited, wide, needs, raster, tmp_path):
    line = (raster, "--out", tmp_path / "m.zarr", "--model", wide, "--dry-run", "--json")
    for options in ((), ("--batch-size", "4"), ("--scheduler", "processes:2")):
        assert estimated(limited(enough(needs, 768), *line, *options))["tile"] == 768


def test_a_network_of_global_context_keeps_its_tile(limited, needs, raster, tmp_path):
    path = networks.conv(tmp_path / "g.onnx", hidden=64, context="global", tile=1024)
    line = (raster, "--out", tmp_path / "m.zarr", "--model", path, "--dry-run", "--json")
    assert estimated(limited(enough(needs, 512), *line))["tile"] == 1024


def test_a_trial_without_room_leads_to_the_smallest_tile(limited, raster, tmp_path):
    path = networks.conv(tmp_path / "huge.onnx", hidden=1500)
    line = (raster, "--out", tmp_path / "m.zarr", "--model", path, "--dry-run", "--json")
    done = limited(1100 * MIB, *line, cache=tmp_path / "cache")
    assert estimated(done)["tile"] == 256
    assert "more than could be tried" in done.err
    assert not (tmp_path / "cache/tilenet/footprints").exists()


def test_a_divisor_larger_than_what_is_tried(limited, raster, tmp_path):
    path = networks.conv(tmp_path / "d.onnx", hidden=8, divisor=512)
    line = (raster, "--out", tmp_path / "m.zarr", "--model", path, "--dry-run", "--json")
    assert estimated(limited(700 * MIB, *line))["tile"] in (1024, 512)


def test_trials_import_nothing_from_the_folder_they_stand_in(files, tmp_path, monkeypatch):
    (tmp_path / "secrets.py").write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    done = run_apart("tilenet.durable", "temporary", b"")  # it wants an argument
    assert b"missing 1 required positional argument" in done.stderr


def test_what_memory_chose_is_what_asking_for_it_gives(limited, wide, needs, larger, tmp_path):
    line = ("--model", wide, "--json", "--block", "768")
    less = limited(enough(needs, 768), larger, "--out", tmp_path / "less.zarr", *line)
    assert less.code == 0, less.err
    config = PredictConfig(model=str(wide), tile=768, precision="fp32", block=768)
    [asked] = predict([larger], tmp_path / "asked.zarr", config).runs
    assert json.loads(less.out)["plan_hash"] == asked.plan_hash
    assert asked.tiles == 4


def test_a_mask_goes_on_with_its_own_tile(limited, command, wide, needs, larger, tmp_path):
    out, few = tmp_path / "m.zarr", enough(needs, 768)
    line = (larger, "--out", out, "--model", wide, "--json", "--block", "768")
    first = limited(few, *line, "--part", "1/2")
    assert (first.code, json.loads(first.out)["complete"]) == (0, False), first.err
    more = ("predict", *line, "--precision", "fp32")
    dry = estimated(command(*more, "--dry-run"))
    assert (dry["tile"], dry["finished"]) == (768, False)
    second = command(*more, "--part", "2/2")
    assert (second.code, json.loads(second.out)["complete"]) == (0, True), second.err
    # It is finished: where there is more memory, and where there is less, the same command knows.
    dry = estimated(command(*more, "--dry-run"))
    assert (dry["tile"], dry["finished"]) == (768, True)
    for again in (command(*more), limited(enough(needs, 512), *line)):
        assert again.code == 0, again.err
        assert json.loads(again.out)["tiles_forwarded"] == 0
    assert command(*more, "--tile", "1024").code == 5
    assert verify(out).ok
    assert estimated(command(*more, "--overwrite", "--dry-run"))["tile"] == 1024


def test_a_mask_of_a_tile_that_was_asked_for_is_another(command, wide, raster, tmp_path):
    line = ("predict", raster, "--out", tmp_path / "m.zarr", "--model", wide)
    assert command(*line, "--tile", "768").code == 0
    done = command(*line)
    assert done.code == 5
    assert "differs in overlap, tile" in done.err


def test_a_folder_of_masks_goes_on_with_their_tiles(limited, command, wide, needs, tmp_path):
    for k in range(3):
        write_tif(tmp_path / "in" / f"{k}.tif", picture(90, 80, seed=k))
    line = (tmp_path / "in", "--out", tmp_path / "masks", "--model", wide, "--json")
    first = limited(enough(needs, 768), *line)
    assert first.code == 0, first.err
    again = command("predict", *line, "--precision", "fp32")
    assert again.code == 0, again.err
    assert [run["tiles_forwarded"] for run in json.loads(again.out)["runs"]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/job", {"job/cpu.max": "max 100000"}, None),
        ("0::/job/step", {"job/step/cpu.max": "400000 100000", "job/cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "250000",
                              "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("nonsense", {}, None),
    ],
)  # fmt: skip
def test_control_groups_limit_processors(tmp_path, groups, files, expected):
    write_groups(tmp_path, groups, files)
    assert cpu_limit(tmp_path) == expected
