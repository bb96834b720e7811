"""Tile and batch by memory: what is known of it, what a network takes, what is chosen."""

import json
import os
import resource

import networks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasters import picture, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.memory import memory_limit
from tilenet.models.footprint import Footprint, footprint
from tilenet.models.session import choose
from tilenet.models.sizes import Wanted, choose_sizes
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


@pytest.fixture
def limited(command, needs):
    """Run `tilenet` in a process that may have so much memory that so many pixels fit."""

    def call(pixels, *arguments):
        # As the README says: 85 % of memory, less 200 MiB, is the network's.
        limit = int((needs.fixed + needs.per_pixel * pixels + 200 * MIB) / 0.85)

        def lower():
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        return command("predict", *arguments, "--precision", "fp32", preexec_fn=lower)

    return call


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
    ],
)
def test_control_groups_limit_memory(tmp_path, groups, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit(tmp_path) == (expected or machine)


@given(
    st.integers(0, 1 << 34), st.integers(1, 1 << 14), st.integers(1, 1 << 12), st.integers(1, 64)
)
def test_a_footprint_is_the_line_through_two_trials(fixed, per_pixel, side, more):
    sides = (side, side + more)
    found = Footprint.through(sides, tuple(fixed + per_pixel * one * one for one in sides))
    assert found == Footprint(fixed, per_pixel)
    for pixels in (0, 1, 12345):
        assert found.pixels_in(fixed + per_pixel * pixels) == pixels
    assert found.pixels_in(fixed - 1) == 0


def test_what_a_network_takes_is_near_what_it_holds(needs):
    # Between its 64 hidden channels in fp32 and a few copies of all it has.
    assert 64 * 4 < needs.per_pixel < 4 * 64 * 4
    assert 20 * MIB < needs.fixed < 500 * MIB


@pytest.mark.parametrize("damage", ["", '{"fixed": -5, "per_pixel": 0.5}'])
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
    found = choose_sizes(files, Wanted((64, 32)))
    assert (found.tile, found.setup.batch_size, found.why) == (64, 1, "")
    assert sorted((cache / "tilenet/footprints").glob("*")) == before


@pytest.mark.parametrize(("pixels", "tile"), [(800**2, 768), (10, 256)])
def test_memory_makes_tiles_smaller(limited, wide, tmp_path, pixels, tile):
    raster = write_tif(tmp_path / "r.tif", picture(300, 200))
    done = limited(
        pixels, raster, "--out", tmp_path / "m.zarr", "--model", wide, "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)["estimate"]
    assert (found["tile"], found["overlap"]) == (tile, tile // 4)
    assert f"tile {tile}, not 1024: the network would take" in done.err


def test_a_tile_that_was_asked_for_stays(limited, wide, tmp_path):
    raster = write_tif(tmp_path / "r.tif", picture(300, 200))
    line = (raster, "--out", tmp_path / "m.zarr", "--model", wide, "--tile", "1024", "--dry-run")
    done = limited(800**2, *line, "--json")
    assert json.loads(done.out)["estimate"]["tile"] == 1024
    assert "the network would take" not in done.err


def test_what_memory_chose_is_what_asking_for_it_gives(limited, command, wide, tmp_path):
    raster = write_tif(tmp_path / "r.tif", picture(900, 800))
    line = ("--model", wide, "--json", "--block", "768")
    less = limited(800**2, raster, "--out", tmp_path / "less.zarr", *line)
    assert less.code == 0, less.err
    asked = command(
        "predict", raster, "--out", tmp_path / "asked.zarr", *line, "--tile", "768",
        "--precision", "fp32",
    )  # fmt: skip
    ours, theirs = (json.loads(done.out) for done in (less, asked))
    assert ours["plan_hash"] == theirs["plan_hash"]
    assert ours["tiles"] == theirs["tiles"] == 4


def test_a_run_goes_on_with_the_tile_it_began_with(limited, command, wide, tmp_path):
    raster, out = write_tif(tmp_path / "r.tif", picture(900, 800)), tmp_path / "m.zarr"
    line = (raster, "--out", out, "--model", wide, "--json", "--block", "768")
    first = limited(800**2, *line, "--part", "1/2")
    assert first.code == 0, first.err
    assert json.loads(first.out)["complete"] is False
    dry = command("predict", *line, "--precision", "fp32", "--dry-run")
    assert json.loads(dry.out)["estimate"]["tile"] == 768
    second = command("predict", *line, "--precision", "fp32", "--part", "2/2")
    assert second.code == 0, second.err
    assert json.loads(second.out)["complete"] is True
    config = PredictConfig(model=str(wide), tile=768, precision="fp32", block=768)
    [whole] = predict([raster], tmp_path / "whole.zarr", config).runs
    assert whole.plan_hash == json.loads(second.out)["plan_hash"]


def test_a_batch_that_was_asked_for_counts(limited, wide, tmp_path):
    raster = write_tif(tmp_path / "r.tif", picture(300, 200))
    line = (raster, "--out", tmp_path / "m.zarr", "--model", wide, "--dry-run", "--json")
    done = limited(800**2, *line, "--batch-size", "4")
    found = json.loads(done.out)["estimate"]
    assert (found["tile"], found["batch_size"]) == (256, 4)
