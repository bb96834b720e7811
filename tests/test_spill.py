"""What waits in files: comes back as it went, or not at all."""

import random
from contextlib import closing
from itertools import batched
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilenet.engine.spill import SpillReader, SpillWriter, name_for, needed_by
from tilenet.engine.state import Share, State
from tilenet.lattice import Axis, Lattice

SUMS = np.arange(2 * 7 * 5, dtype=np.int32).reshape(2, 7, 5)


def written(path):
    """Write two sums whose rows come by turns, one of them with gaps, and a mask."""
    file = SpillWriter(path)
    one, two, none = (file.rows(name, shape) for name, shape in (
        ("1", (2, 7, 5)), ("2", (2, 7, 5)), ("none", (2, 0, 5))
    ))  # fmt: skip
    for row in (0, 3, 5):
        one[:, row : row + 2, 0:5] = SUMS[:, row : row + 2]
        two[:, row : row + 1, 1:3] = SUMS[:, row : row + 1, 1:3]
    size = file.close({"mask": SUMS[0].astype(np.uint8), "empty": np.zeros((0, 4))})
    assert size == path.stat().st_size
    return none


def test_what_was_written_is_read(tmp_path):
    written(tmp_path / "3.own")
    expected = np.zeros((2, 2, 7, 5), np.int32)
    expected[0, :, [0, 1, 3, 4, 5, 6]] = SUMS[:, [0, 1, 3, 4, 5, 6]].transpose(1, 0, 2)
    expected[1, :, [0, 3, 5], 1:3] = SUMS[:, [0, 3, 5], 1:3].transpose(1, 0, 2)
    with closing(SpillReader(tmp_path / "3.own")) as file:
        for name, sums in zip("12", expected, strict=True):
            rows = file.rows(name, (2, 7, 5))
            assert np.array_equal(rows[:, 0:7], sums)
            assert np.array_equal(rows[:, 3:5], sums[:, 3:5])
        assert file.rows("none", (2, 0, 5)).size == 0
        mask, empty = file.array("mask"), file.array("empty")
        assert np.array_equal(mask, SUMS[0])
        mask[:] = 0  # it is the reader's own
        assert empty.shape == (0, 4)
        assert file.array("other") is None
        with pytest.raises(ValueError, match="not there"):
            file.rows("1", (2, 7, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["3.own"]


def test_no_damage_goes_unseen(tmp_path):
    path = tmp_path / "3.own"
    written(path)
    whole = path.read_bytes()

    def read():
        with closing(SpillReader(path)) as file:
            file.rows("1", (2, 7, 5)), file.rows("2", (2, 7, 5)), file.array("mask")

    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :])
        with pytest.raises(ValueError, match=r"damaged|no end|not there"):
            read()
        path.write_bytes(whole[:k])
        with pytest.raises(ValueError, match="no end"):
            read()
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        read()


def test_what_is_given_up_leaves_nothing(tmp_path):
    file = SpillWriter(tmp_path / "3.own")
    file.rows("1", (2, 7, 5))[:, 0:7, 0:5] = SUMS
    file.abandon()
    assert not list(tmp_path.iterdir())
    written(tmp_path / "4.own")
    again = SpillWriter(tmp_path / "4.own")
    again.close({})
    again.abandon()  # too late: it is there
    assert [path.name for path in tmp_path.iterdir()] == ["4.own"]


@given(
    sizes=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    overlap=st.sampled_from([0, 16, 32, 48]),
)
def test_every_strip_has_a_file(sizes, overlap):
    """A block's files are needed by itself and by its takers, each of them by one."""
    rows, cols = (Axis(size, 64, 64 - overlap, 16, 128, False) for size in sizes)
    lattice = Lattice(rows, cols)
    for block in range(lattice.blocks):
        files = needed_by(lattice, block)
        takers = [taker for names in files.values() for taker in names]
        assert sorted(takers) == sorted({block, *lattice.takers(block)})
        for name, needing in files.items():
            assert {name_for(lattice, block, taker) for taker in needing} == {name}
        assert name_for(lattice, block, block) in files


@pytest.mark.parametrize("together", [1, 3])
def test_a_file_goes_when_nobody_needs_it_any_more(tmp_path, together):
    axis = Axis(900, 64, 32, 16, 128, False)
    lattice = Lattice(axis, axis)
    plan, journal = SimpleNamespace(lattice=lattice), SimpleNamespace(blocks=set())
    state = State(plan, tmp_path, journal, Share(range(lattice.blocks)))
    left = {
        name: set(takers)
        for block in range(lattice.blocks)
        for name, takers in needed_by(lattice, block).items()
    }
    order = random.Random(0).sample(range(lattice.blocks), lattice.blocks)
    for blocks in batched(order, together):
        for takers in left.values():
            takers.difference_update(blocks)
        free = {name for name, takers in left.items() if not takers}
        assert state.joined(blocks) == free
        left = {name: takers for name, takers in left.items() if name not in free}
    assert not left
