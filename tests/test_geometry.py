"""The lattice against brute force: who owns, covers, gives and takes what."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilenet.geometry import Georeference, Window, reflect
from tilenet.lattice import Axis, Lattice


@st.composite
def axes(draw, most=260):
    divisor = draw(st.sampled_from([1, 2, 8, 32]))
    tile = draw(st.integers(1, 4 if divisor == 32 else 6))
    stride = draw(st.integers(1, tile))
    core = draw(st.integers(1, 150))
    fixed = draw(st.booleans())
    size = draw(st.integers(1, most))
    return Axis(size, tile * divisor, stride * divisor, divisor, core, fixed)


def owned(axis, block):
    start, stop = axis.core_range(block)
    return [k for k in range(axis.count) if start <= axis.origin(k) < stop]


def reached(axis, block):
    start, _ = axis.core_range(block)
    ends = [min(axis.origin(k) + axis.side, axis.size) for k in owned(axis, block)]
    return max(ends, default=start)


@settings(max_examples=300, deadline=None)
@given(axes())
def test_tiles_cover_the_padded_axis_and_stay_inside(axis):
    origins = [axis.origin(k) for k in range(axis.count)]
    assert origins == sorted(set(origins))
    assert all(o % axis.divisor == 0 for o in origins)
    assert axis.padded >= axis.size
    assert axis.padded % axis.divisor == axis.side % axis.divisor == 0
    covered = np.zeros(axis.padded, int)
    for origin in origins:
        assert origin + axis.side <= axis.padded
        covered[origin : origin + axis.side] += 1
    assert covered.min() >= 1
    regular = origins[:-1]
    assert regular == [k * axis.stride for k in range(len(regular))]


@settings(max_examples=200, deadline=None)
@given(axes())
def test_padding_is_the_least_that_will_do(axis):
    if axis.fixed:
        assert axis.side == axis.tile
    else:
        assert axis.side <= axis.tile
        assert axis.padded - axis.size < axis.divisor
    without_last = [axis.origin(k) + axis.side for k in range(axis.count - 1)]
    assert max(without_last, default=0) < axis.padded


@settings(max_examples=300, deadline=None)
@given(axes())
def test_cores_partition_and_every_tile_is_owned_once(axis):
    pixels = Counter(p for block in range(axis.blocks) for p in range(*axis.core_range(block)))
    assert pixels == Counter(range(axis.size))
    tiles = [k for block in range(axis.blocks) for k in axis.tiles(block)]
    assert tiles == list(range(axis.count))
    assert all(list(axis.tiles(b)) == owned(axis, b) for b in range(axis.blocks))


@settings(max_examples=200, deadline=None)
@given(axes(most=110))
def test_reach_givers_takers_and_shared_against_brute_force(axis):
    for block in range(axis.blocks):
        start, stop = axis.core_range(block)
        tiles = owned(axis, block)
        first = axis.origin(tiles[0]) if tiles else start
        assert axis.reach(block) == (first, reached(axis, block))
        givers = [b for b in range(block) if reached(axis, b) > start]
        assert list(axis.givers(block)) == (list(range(givers[0], block)) if givers else [])
        end = reached(axis, block)
        takers = [b for b in range(block + 1, axis.blocks) if axis.core_range(b)[0] < end]
        assert list(axis.takers(block)) == takers
        furthest = max((reached(axis, b) for b in givers), default=start)
        assert axis.shared(block) == min(furthest, stop) - start


@settings(max_examples=200, deadline=None)
@given(axes())
def test_neighbours_are_all_tiles_that_overlap(axis):
    for tile in range(axis.count):
        here = axis.origin(tile)
        offsets = [axis.origin(k) - here for k in range(axis.count)]
        assert axis.neighbours(tile) == tuple(o for o in offsets if abs(o) < axis.side)


@settings(max_examples=60, deadline=None)
@given(axes(most=90), axes(most=90))
def test_strips_of_a_lattice_against_brute_force(rows, cols):
    lattice = Lattice(rows, cols)
    assert lattice.tiles == rows.count * cols.count
    blocks = range(min(lattice.blocks, 120))
    given_by = {block: set(lattice.givers(block)) for block in blocks}
    for giver in blocks:
        taken = set(lattice.takers(giver)) & set(blocks)
        reach = lattice.reach(giver)
        touched = {b for b in blocks if b != giver and reach.intersection(lattice.core(b)).pixels}
        assert taken == touched
        assert {b for b in blocks if giver in given_by[b]} == touched
        assert lattice.number(*lattice.position(giver)) == giver


def test_cores_narrower_than_a_tile_reach_far():
    axis = Axis(size=100, tile=32, stride=16, divisor=8, core=5)
    assert [axis.origin(k) for k in range(axis.count)] == [0, 16, 32, 48, 64, 72]
    assert axis.padded == 104
    assert list(axis.takers(0)) == [1, 2, 3, 4, 5, 6]
    assert list(axis.tiles(1)) == []
    assert list(axis.givers(6)) == [0, 1, 2, 3, 4, 5]


def test_a_fixed_tile_pads_a_small_axis():
    axis = Axis(size=10, tile=64, stride=48, divisor=1, core=64, fixed=True)
    assert (axis.padded, axis.side, axis.count) == (64, 64, 1)
    assert axis.reach(0) == (0, 10)


def test_redundancy():
    axis = Axis(size=96, tile=64, stride=32, divisor=32, core=64)
    assert Lattice(axis, axis).redundancy == pytest.approx(4 * 64 * 64 / (96 * 96))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 4), (40, 130)])
def test_reflect_is_numpys(size, before, after):
    expected = np.pad(np.arange(size), (before, after), mode="reflect")
    assert np.array_equal(reflect(-before, size + after, size), expected)
    middle = reflect(size // 2, size + after, size)
    assert np.array_equal(middle, expected[before + size // 2 :])


def test_window():
    one, other = Window(2, 3, 10, 20), Window(5, 0, 100, 8)
    common = one.intersection(other)
    assert common == Window(5, 3, 7, 5)
    assert (common.row_stop, common.col_stop, common.pixels) == (12, 8, 35)
    assert one.intersection(Window(50, 50, 5, 5)).pixels == 0
    array = np.arange(20 * 30).reshape(20, 30)
    assert np.array_equal(array[common.slices()], array[5:12, 3:8])
    assert np.array_equal(array[2:, 3:][common.slices(2, 3)], array[5:12, 3:8])


def test_scaled_keeps_the_corner():
    place = Georeference(
        transform=(10.0, 1.0, 500.0, 2.0, -10.0, 900.0), mpp=(0.5, 0.25), rpcs=(("A", "1"),),
        gcps=((10.0, 20.0, 1.0, 2.0, 3.0),),
    )  # fmt: skip
    scaled = place.scaled(2.0, 4.0)
    assert scaled.transform == (40.0, 2.0, 500.0, 8.0, -20.0, 900.0)
    assert scaled.mpp == (1.0, 1.0)
    assert scaled.gcps == ((5.0, 5.0, 1.0, 2.0, 3.0),)
    assert scaled.rpcs == ()
    assert place.scaled(1, 1) == place
