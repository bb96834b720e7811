"""Windows sum to one, sums are exact, decisions are argmax; torch gives the same integers."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tilenet.blend import AXIS_ONE, ONE, Blend, Decision, Sums, axis_weights, decide, quantise
from tilenet.lattice import Axis
from tilenet.models import torch_backend
from tilenet.models.lanes import to_device
from tilenet.models.torch_backend import TorchSums
from tilenet.pyramid import halve

ALL = slice(None)
SOFTMAX = Decision("softmax", 0.5, exact=False)
SIGMOID = Decision("sigmoid", 0.5, exact=False)
NONE = Decision("none", 0.5, exact=False)
DECISIONS = [SOFTMAX, SIGMOID, NONE, Decision("sigmoid", 0.3, exact=True)]
STRIDES = [64, 48, 32, 22, 16, 8, 4, 2]  # overlaps 0 to 75 %, and on down to T/32


def weighed(axis, blend):
    total = np.zeros(axis.padded)
    for tile in range(axis.count):
        origin = axis.origin(tile)
        total[origin : origin + axis.side] += axis_weights(axis, tile, blend)
    return total


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 131, 300])
def test_weights_sum_to_one(blend, stride, size):
    divisor = 1 if stride in (22, 2) else min(stride, 8)
    axis = Axis(size, 64, stride, divisor, 100)
    assert np.abs(weighed(axis, blend) - 1).max() < 1e-12
    for tile in range(axis.count):
        weights = axis_weights(axis, tile, blend)
        assert weights.shape == (axis.side,)
        assert weights.min() >= 0
        if blend is not Blend.CROP:
            assert weights.min() > 0


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [65, 300])
def test_crop_cuts_at_mid_overlap(stride, size):
    axis = Axis(size, 64, stride, 1, 100)
    expected = np.zeros(axis.padded, int)
    for tile in range(1, axis.count):
        first, second = axis.origin(tile - 1), axis.origin(tile)
        expected[(first + 64 + second) // 2 :] = tile
    for tile in range(axis.count):
        weights = axis_weights(axis, tile, Blend.CROP)
        assert set(np.unique(weights)) <= {0.0, 1.0}
        origin = axis.origin(tile)
        assert np.array_equal(weights == 1, expected[origin : origin + 64] == tile)


def test_windows_have_their_shape():
    axis = Axis(640, 64, 32, 32, 100)
    gaussian, hann, linear, crop = (axis_weights(axis, 5, blend) for blend in Blend)
    for window in (gaussian, hann, linear, crop):
        assert np.allclose(window, window[::-1])
        assert window[31] == window.max()
    assert np.allclose(hann, np.cos(np.pi * (np.arange(64) - 31.5) / 64) ** 2, atol=1e-5)
    assert np.allclose(linear[:32], np.arange(1, 33) / 33, atol=1e-5)
    assert gaussian[0] < 0.01
    assert np.array_equal(crop, np.repeat([0, 1, 0], [16, 32, 16]))


def some_tiles(decision, channels=3, seed=0):
    """Return scores with weights and places, as over a raster of 90 × 150."""
    rng = np.random.default_rng(seed)
    rows, cols = Axis(90, 32, 8, 8, 64), Axis(150, 32, 16, 8, 64)
    blend = Blend.CROP if decision.exact else Blend.GAUSSIAN
    tiles = []
    for i in range(rows.count):
        for j in range(cols.count):
            scores = rng.random((channels, 32, 32), np.float32)
            if decision.bits:
                scores = (scores - np.float32(0.5)) * np.float32(20)
            weights = axis_weights(rows, i, blend), axis_weights(cols, j, blend)
            tiles.append((scores, rows.origin(i), cols.origin(j), weights))
    return tiles


def added(tiles, decision, kind=Sums, channels=3):
    if kind is Sums:
        sums = Sums(channels, 90, 150, decision)
    else:
        sums = TorchSums(channels, 90, 150, decision, torch.device("cpu"))
    for scores, row, col, weights in tiles:
        sums.add(scores if kind is Sums else torch.from_numpy(scores), row, col, weights)
    return sums


@pytest.mark.parametrize("decision", DECISIONS)
def test_sums_are_the_same_in_any_order_and_close_to_float64(decision):
    tiles = some_tiles(decision)
    one = added(tiles, decision).take(ALL, ALL)
    shuffled = [tiles[k] for k in np.random.default_rng(1).permutation(len(tiles))]
    assert np.array_equal(one, added(shuffled, decision).take(ALL, ALL))
    exact = np.zeros((3, 96 + 32, 160 + 32))
    for scores, row, col, (v, w) in tiles:
        exact[:, row : row + 32, col : col + 32] += scores.astype(np.float64) * np.outer(v, w)
    error = np.abs(one / (ONE >> decision.bits) - exact[:, :90, :150])
    assert error.max() < (1e-6 if not decision.bits else 1e-4)
    assert one.dtype == np.int32


@pytest.mark.parametrize("decision", DECISIONS)
def test_what_no_tile_reaches_is_zero_in_used_memory_too(decision):
    tiles, used = some_tiles(decision), added(some_tiles(decision, seed=5), decision)
    rng = np.random.default_rng(2)
    for count in (0, 1, 7, 30):
        some = [tiles[k] for k in rng.choice(len(tiles), count, replace=False)]
        expected = np.zeros((3, 90 + 32, 150 + 32), np.int32)
        for scores, row, col, (v, w) in some:
            rows = (v * float(AXIS_ONE / (1 << decision.bits))).astype(np.float32)
            cols = (w * float(AXIS_ONE)).astype(np.float32)
            whole = (scores * (rows[:, None] * cols)).astype(np.int32)
            expected[:, row : row + 32, col : col + 32] += whole
        used = used.emptied(3, 90, 150, decision)
        for scores, row, col, weights in some:
            used.add(scores, row, col, weights)
        for sums in (used, added(some, decision)):
            assert np.array_equal(sums.take(ALL, ALL), expected[:, :90, :150])
    assert used.emptied(3, 90, 150, decision) is used
    assert used.emptied(3, 90, 151, decision) is not used


def test_full_scores_never_overflow():
    tiles = [(np.ones_like(s), row, col, weights) for s, row, col, weights in some_tiles(SOFTMAX)]
    sums = added(tiles, SOFTMAX).take(ALL, ALL)
    assert sums.min() >= ONE * (1 - 2**-20)
    assert sums.max() <= ONE * (1 + 2**-22)
    assert (quantise(sums, SOFTMAX) == 255).all()


def test_weights_go_to_a_device_once(monkeypatch):
    gone = []
    monkeypatch.setattr(
        torch_backend, "to_device", lambda *one: (gone.append(one[0]), to_device(*one))[1]
    )
    torch_backend._axis_there.cache_clear()
    tiles = some_tiles(SOFTMAX)
    for _ in "12":
        sums = added(tiles, SOFTMAX, TorchSums)
    assert np.array_equal(sums.take(ALL, ALL), added(tiles, SOFTMAX).take(ALL, ALL))
    kinds = {(axis, part[axis].tobytes()) for *_, part in tiles for axis in (0, 1)}
    assert len(gone) == len(kinds) < len(tiles)


@pytest.mark.parametrize("kind", [Sums, TorchSums])
@pytest.mark.parametrize("decision", [SOFTMAX, NONE])
def test_scores_that_are_not_finite_count_as_zero(kind, decision):
    tiles = some_tiles(decision)
    spoilt, mended = [], []
    for scores, *rest in tiles[:2]:
        bad, good = scores.copy(), scores.copy()
        bad[0, 1, 2], bad[1, 3, 4], bad[2, 5, 6] = np.nan, np.inf, -np.inf
        good[0, 1, 2] = good[1, 3, 4] = good[2, 5, 6] = 0
        spoilt.append((bad, *rest))
        mended.append((good, *rest))
    sums = added(spoilt, decision, kind)
    assert sums.nonfinite == 6
    assert np.array_equal(sums.take(ALL, ALL), added(mended, decision).take(ALL, ALL))


def test_unbounded_scores_are_clamped():
    ones = np.ones(4), np.ones(4)
    sums = Sums(2, 4, 4, NONE)
    sums.add(np.full((2, 4, 4), [[[1e30]], [[-1e30]]], np.float32), 0, 0, ones)
    taken = sums.take(ALL, ALL)
    assert np.array_equal(taken[0], np.full((4, 4), 2**30))
    assert np.array_equal(taken[1], np.full((4, 4), -(2**30)))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.int32,
        st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(1, 9)),
        elements=st.integers(-3, 3),  # few values, so that ties are frequent
    )
)
def test_decide_is_argmax_and_ties_go_to_the_lowest(sums):
    expected = np.argmax(sums, axis=0).astype(np.uint8)
    assert np.array_equal(decide(sums, SOFTMAX), expected)


def test_decide_with_255_classes():
    rng = np.random.default_rng(0)
    sums = rng.integers(0, ONE, (255, 20, 30), dtype=np.int32)
    sums[254, 5] = ONE
    assert np.array_equal(decide(sums, SOFTMAX), np.argmax(sums, axis=0))
    assert (decide(sums, SOFTMAX)[5] == 254).all()


def test_one_channel_is_thresholded():
    level = 0.5
    sums = np.array([[[0, ONE // 2 - 1024, ONE // 2, ONE // 2 + 1, ONE]]], np.int32)
    assert decide(sums, Decision("sigmoid", level, exact=True)).tolist() == [[0, 0, 1, 1, 1]]
    assert decide(sums, SIGMOID).tolist() == [[0, 0, 1, 1, 1]]
    unbounded = np.array([[[0, 300 << 20, -(400 << 20)]]], np.int32)
    assert decide(unbounded, Decision("none", 250.0, exact=True)).tolist() == [[0, 1, 0]]


def test_sigmoid_with_several_channels():
    rng = np.random.default_rng(3)
    sums = rng.integers(0, ONE, (3, 50, 60), dtype=np.int32)
    decision = Decision("sigmoid", 0.7, exact=True)
    best = sums.max(axis=0) >= decision.level
    expected = np.where(best, 1 + np.argmax(sums, axis=0), 0)
    assert np.array_equal(decide(sums, decision), expected)
    assert set(np.unique(expected)) == {0, 1, 2, 3}


@pytest.mark.parametrize("threshold", [4100.0, -4100.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_threshold_beyond_all_scores(threshold, channels):
    # As a sum, 4100 is more than an int32 holds; its low bits alone would be a threshold of 4.
    decision = Decision("none" if channels == 1 else "sigmoid", threshold, exact=True)
    tiles = some_tiles(decision, channels)
    ours = added(tiles, decision, channels=channels).decide(ALL, ALL)
    theirs = added(tiles, decision, TorchSums, channels).decide(ALL, ALL)
    assert np.array_equal(ours, theirs)
    assert (ours == 0).all() if threshold > 0 else (ours > 0).all()


def test_quantise_rounds():
    values = np.array([-1.0, 0.0, 0.2 / 255, 0.8 / 255, 1 / 255, 127 / 255, 254.6 / 255, 1.0, 1.5])
    sums = np.rint(values * ONE).astype(np.int32)[None, None]
    assert quantise(sums, SOFTMAX).ravel().tolist() == [0, 0, 0, 1, 1, 127, 255, 255, 255]
    fewer = np.rint(values * (ONE >> NONE.bits)).astype(np.int32)[None, None]
    assert quantise(fewer, NONE).ravel().tolist() == [0, 0, 0, 1, 1, 127, 255, 255, 255]


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("channels", [1, 2, 3, 9])
def test_torch_gives_the_same_bits(decision, channels):
    tiles = some_tiles(decision, channels, seed=channels)
    ours = added(tiles, decision, channels=channels)
    theirs = added(tiles, decision, TorchSums, channels)
    for rows, cols in ((ALL, ALL), (slice(3, 77), slice(100, 149))):
        assert np.array_equal(ours.take(rows, cols), theirs.take(rows, cols))
        assert np.array_equal(ours.decide(rows, cols), theirs.decide(rows, cols))
        assert np.array_equal(ours.quantise(rows, cols), theirs.quantise(rows, cols))
    for rows in (1, 40, 1000):
        before = ours.take(ALL, ALL).copy()
        ours.shift(rows)
        theirs.shift(rows)
        assert np.array_equal(ours.take(ALL, ALL), theirs.take(ALL, ALL))
        moved = np.zeros_like(before)
        moved[:, : max(0, 90 - rows)] = before[:, rows:]
        assert np.array_equal(ours.take(ALL, ALL), moved)


def majority(four):
    votes = Counter(v for v in four if v != 255)
    if not votes:
        return 255
    most = max(votes.values())
    return next(v for v in four if v != 255 and votes[v] == most)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements=st.sampled_from([0, 1, 2, 255]),
    )
)
def test_halve_is_the_majority(mask):
    height, width = mask.shape
    padded = np.pad(mask, ((0, height % 2), (0, width % 2)), mode="edge")
    expected = [
        [majority([*padded[r, c : c + 2], *padded[r + 1, c : c + 2]]) for c in range(0, width, 2)]
        for r in range(0, height, 2)
    ]
    assert np.array_equal(halve(mask), np.array(expected, np.uint8))


def test_halve_of_a_larger_mask_is_halved_in_parts():
    mask = np.random.default_rng(0).choice(np.array([0, 1, 7, 255], np.uint8), (301, 77))
    upper, lower = halve(mask[:128]), halve(mask[128:])
    assert np.array_equal(halve(mask), np.concatenate([upper, lower]))


def test_no_evidence_never_reaches_a_tiny_threshold():
    sums = np.array([[[0, 1]]], np.int32)
    decision = Decision("sigmoid", 1e-9, exact=False)
    assert decide(sums, decision).tolist() == [[0, 1]]
    assert decide(sums, Decision("sigmoid", 0.0, exact=False)).tolist() == [[1, 1]]
