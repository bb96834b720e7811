"""Forward and join of blocks, with a network of numpy: the cut into blocks never shows."""

from threading import Lock

import numpy as np
import pytest

from tilenet.blend import Blend, Decision, Sums, axis_weights, decide, quantise
from tilenet.engine.block import BlockJob, drive, join
from tilenet.engine.reading import read_window
from tilenet.geometry import Window, reflect
from tilenet.lattice import Axis, Lattice

TILE, DIVISOR = 32, 8
STRIDES = {0: 32, 25: 24, 50: 16, 62: 16, 75: 8}  # overlap in %, rounded down to the divisor


class Numpy:
    """A session whose scores depend on the pixels and on the place inside the tile."""

    def __init__(self, channels, positional=True):
        self.channels, self.lock = channels, Lock()
        self.seen = 0
        self._positional = positional

    def load(self, pixels):
        return pixels

    def sums(self, height, width, decision):
        return Sums(self.channels, height, width, decision)

    def reuse(self, sums):
        pass

    def scores(self, tiles, shape, took=None):
        height, width = shape
        for pixels, row, col in tiles:
            self.seen += 1
            yield self._one(pixels[:, row : row + height, col : col + width])

    def _one(self, pixels):
        values = pixels.astype(np.float32) / np.float32(255)
        if not self._positional:
            return values
        k = np.arange(1, self.channels + 1, dtype=np.float32)[:, None, None]
        _, rows, cols = np.indices(pixels.shape, dtype=np.float32)[:, :1]
        wave = np.sin(k * values[:1] * 7 + rows * np.float32(0.31) * k + cols * np.float32(0.17))
        raised = wave + np.float32(1.5)
        return (raised / raised.sum(axis=0)).astype(np.float32)


def image_of(height, width, bands=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (bands, height, width)).astype(np.uint8)


def lattice_of(height, width, stride, core, *, tile=TILE, fixed=False):
    return Lattice(*(Axis(n, tile, stride, DIVISOR, core, fixed) for n in (height, width)))


def read(image, window):
    rows = reflect(window.row, window.row_stop, image.shape[-2])
    cols = reflect(window.col, window.col_stop, image.shape[-1])
    return image[..., rows[:, None], cols]


def job_for(lattice, block, session, decision, blend, valid=None, **options):
    window = read_window(lattice, block)
    return BlockJob(
        lattice,
        block,
        None if valid is None else read(valid, window),
        channels=session.channels,
        blend=blend,
        decision=decision,
        **options,
    )


def forward(lattice, block, image, session, decision, blend, **options):
    job = job_for(lattice, block, session, decision, blend, **options)
    pixels = session.load(read(image, read_window(lattice, block)))
    drive(session, [(job, pixels)], lattice.tile_shape)
    return job.finish()


def run(lattice, image, session, decision, blend, *, seed=None, valid=None, skip=True):
    """Forward all blocks, in a random order if there is a seed, then join; return everything."""
    order = np.arange(lattice.blocks)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    halves = {
        int(b): forward(lattice, int(b), image, session, decision, blend,
                        probabilities=True, valid=valid, skip=skip)
        for b in order
    }  # fmt: skip
    mask = np.zeros(image.shape[1:], np.uint8)
    prob = np.zeros((session.channels, *image.shape[1:]), np.uint8)
    for b in order[::-1]:
        block = int(b)
        own, core = halves[block], lattice.core(block)
        strips = {g: halves[g].strips[block] for g in lattice.givers(block)}
        join(lattice, block, own, strips, decision)
        mask[core.slices()] = own.mask
        prob[(slice(None), *core.slices())] = own.probabilities
    return mask, prob, halves


def reference(lattice, image, session, decision, blend):
    """Return the sums over the whole raster at once, without blocks."""
    rows, cols = lattice.rows, lattice.cols
    sums = Sums(session.channels, rows.size, cols.size, decision)
    padded = read(image, Window(0, 0, rows.padded, cols.padded))
    places = [(i, j) for i in range(rows.count) for j in range(cols.count)]
    tiles = [(padded, rows.origin(i), cols.origin(j)) for i, j in places]
    for (i, j), scores in zip(places, session.scores(tiles, lattice.tile_shape), strict=True):
        weights = axis_weights(rows, i, blend), axis_weights(cols, j, blend)
        sums.add(scores, rows.origin(i), cols.origin(j), weights)
    return sums.take(slice(None), slice(None))


@pytest.mark.parametrize("channels", [2, 8])
@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("overlap", STRIDES)
def test_blocks_never_show(channels, blend, overlap):
    image, session = image_of(75, 101), Numpy(channels)
    decision = Decision("softmax", 0.5, exact=blend is Blend.CROP)
    whole = reference(lattice_of(75, 101, STRIDES[overlap], 500), image, session, decision, blend)
    for core in (500, 64, 32, 13):
        lattice = lattice_of(75, 101, STRIDES[overlap], core)
        session.seen = 0
        mask, prob, halves = run(lattice, image, session, decision, blend, seed=core)
        assert session.seen == lattice.tiles == sum(h.tiles_forwarded for h in halves.values())
        assert np.array_equal(mask, decide(whole, decision))
        assert np.array_equal(prob, quantise(whole, decision))
        assert_frames_equal(lattice, halves, whole)
    assert len(np.unique(mask)) == channels


def assert_frames_equal(lattice, halves, whole):
    """A frame and the neighbours' strips add up to the sums of the whole raster, bit for bit."""
    for block, own in halves.items():
        core = lattice.core(block)
        rows, cols = lattice.shared(block)
        sums = np.zeros((whole.shape[0], core.height, core.width), np.int32)
        sums[:, :rows] = own.top
        sums[:, rows:, :cols] = own.left
        for giver in lattice.givers(block):
            part = lattice.strip(giver, block).slices(core.row, core.col)
            sums[(slice(None), *part)] += halves[giver].strips[block]
        here = whole[(slice(None), *core.slices())]
        assert np.array_equal(sums[:, :rows], here[:, :rows])
        assert np.array_equal(sums[:, rows:, :cols], here[:, rows:, :cols])


def test_a_fixed_tile_larger_than_the_raster():
    image, session = image_of(20, 45), Numpy(3)
    decision = Decision("softmax", 0.5, exact=False)
    lattice = lattice_of(20, 45, 24, 16, fixed=True)
    assert lattice.tile_shape == (32, 32)
    whole = reference(lattice, image, session, decision, Blend.HANN)
    mask, prob, _ = run(lattice, image, session, decision, Blend.HANN, seed=0)
    assert np.array_equal(mask, decide(whole, decision))
    assert np.array_equal(prob, quantise(whole, decision))


SIZES = [(1, 1), (31, 31), (32, 32), (33, 33), (97, 53), (1, 2000), (2, 33)]


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_identity_gives_the_image_back(blend, size, activation):
    image, session = image_of(*size, bands=2), Numpy(2, positional=False)
    decision = Decision(activation, 0.5, exact=blend is Blend.CROP)
    for stride in (8, 16, 24, 32):
        for core in (32, 500):
            lattice = lattice_of(*size, stride, core)
            _, prob, _ = run(lattice, image, session, decision, blend)
            assert np.array_equal(prob, image)


@pytest.mark.parametrize("blend", [Blend.GAUSSIAN, Blend.CROP])
def test_a_strip_remade_alone_is_the_same(blend):
    image, session = image_of(90, 110), Numpy(4)
    decision = Decision("softmax", 0.5, exact=blend is Blend.CROP)
    lattice = lattice_of(90, 110, 16, 40)
    fewer = 0
    for block in range(lattice.blocks):
        own = forward(lattice, block, image, session, decision, blend)
        for taker, strip in own.strips.items():
            only = lattice.strip(block, taker)
            again = forward(lattice, block, image, session, decision, blend, only=only)
            assert np.array_equal(again.strips[taker], strip)
            fewer += again.tiles_forwarded < own.tiles_forwarded
    assert fewer > 0


def half_valid(height, width):
    valid = np.ones((height, width), bool)
    valid[:, : width // 2] = False
    valid[height // 2, 3] = True  # a lone pixel keeps its tiles
    valid[5:9, width - 9] = False
    return valid


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("core", [500, 48, 13])
def test_skipped_tiles_change_no_kept_pixel(blend, core):
    image, session = image_of(130, 150), Numpy(3)
    valid = half_valid(130, 150)
    decision = Decision("softmax", 0.5, exact=blend is Blend.CROP)
    lattice = lattice_of(130, 150, 24, core)
    mask, prob, halves = run(lattice, image, session, decision, blend, valid=valid)
    whole, whole_prob, every = run(
        lattice, image, session, decision, blend, valid=valid, skip=False
    )
    forwarded = sum(h.tiles_forwarded for h in halves.values())
    skipped = sum(h.tiles_skipped for h in halves.values())
    assert forwarded + skipped == lattice.tiles == sum(h.tiles_forwarded for h in every.values())
    assert skipped == tiles_without(lattice, valid) > lattice.tiles // 4
    assert np.array_equal(mask, whole)
    assert np.array_equal(prob, whole_prob)
    assert np.array_equal(mask == 255, ~valid)
    assert not prob[:, ~valid].any()
    unrestricted, _, _ = run(lattice, image, session, decision, blend)
    assert np.array_equal(mask[valid], unrestricted[valid])


def tiles_without(lattice, valid):
    height, width = lattice.tile_shape
    origins = [
        (lattice.rows.origin(i), lattice.cols.origin(j))
        for i in range(lattice.rows.count)
        for j in range(lattice.cols.count)
    ]
    return sum(not valid[r : r + height, c : c + width].any() for r, c in origins)


def test_nothing_valid():
    image, session = image_of(60, 60), Numpy(2)
    lattice = lattice_of(60, 60, 16, 32)
    decision = Decision("softmax", 0.5, exact=False)
    nowhere = np.zeros((60, 60), bool)
    mask, prob, halves = run(lattice, image, session, decision, Blend.HANN, valid=nowhere)
    assert session.seen == 0
    assert (mask == 255).all()
    assert not prob.any()
    assert sum(h.tiles_skipped for h in halves.values()) == lattice.tiles


def test_rasters_of_a_pack_share_batches():
    session, decision = Numpy(3), Decision("softmax", 0.5, exact=False)
    lattice = lattice_of(40, 40, 16, 64)
    images = [image_of(40, 40, seed=k) for k in range(3)]
    alone = [forward(lattice, 0, i, session, decision, Blend.GAUSSIAN).mask for i in images]
    jobs = [job_for(lattice, 0, session, decision, Blend.GAUSSIAN) for _ in images]
    pairs = [
        (job, read(image, read_window(lattice, 0))) for job, image in zip(jobs, images, strict=True)
    ]
    drive(session, pairs, lattice.tile_shape)
    for job, expected in zip(jobs, alone, strict=True):
        assert np.array_equal(job.finish().mask, expected)


def test_scores_that_are_not_finite_are_counted():
    class Spoilt(Numpy):
        def _one(self, pixels):
            scores = super()._one(pixels)
            scores[0, 0, 0] = np.nan
            return scores

    lattice = lattice_of(60, 60, 16, 40)
    decision = Decision("softmax", 0.5, exact=False)
    _, _, halves = run(lattice, image_of(60, 60), Spoilt(2), decision, Blend.GAUSSIAN)
    assert sum(h.nonfinite for h in halves.values()) == lattice.tiles
