"""What is read of a raster: how much is decoded twice, and by which handle."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasters import picture, write_tif

from tilenet.config import PredictConfig
from tilenet.engine.pack import pack_task
from tilenet.engine.reading import amplification, read_window
from tilenet.engine.request import Job, Request, open_job, plan_for
from tilenet.geometry import Window
from tilenet.lattice import Axis, Lattice
from tilenet.models.session import choose, network_shape
from tilenet.models.store import find_model
from tilenet.sources import open_raster
from tilenet.training.images import ImageRef, open_image


def decoded(lattice, native, margin, *, cached):
    """Count native blocks' pixels as a reader would, block by block."""
    total, size = 0, (lattice.rows.size, lattice.cols.size)
    for row in range(lattice.rows.blocks):
        seen = set()
        for col in range(lattice.cols.blocks):
            window = read_window(lattice, lattice.number(row, col), margin)
            first = max(0, window.row), max(0, window.col)
            last = min(size[0], window.row_stop) - 1, min(size[1], window.col_stop) - 1
            touched = {
                (r, c)
                for r in range(first[0] // native[0], last[0] // native[0] + 1)
                for c in range(first[1] // native[1], last[1] // native[1] + 1)
            }
            new = touched - seen if cached else touched
            seen |= touched
            for r, c in new:
                height = min(size[0], (r + 1) * native[0]) - r * native[0]
                total += height * (min(size[1], (c + 1) * native[1]) - c * native[1])
    return total / (size[0] * size[1])


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    core=st.tuples(st.integers(4, 16), st.integers(4, 16)),
    stride=st.integers(1, 4),
    native=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    margin=st.sampled_from([(0, 0), (5, 9)]),
    cached=st.booleans(),
)
def test_amplification_counts_native_blocks(size, core, stride, native, margin, cached):
    # Cores of a tile and more, as plans have them.
    rows, cols = (Axis(n, 32, 8 * stride, 8, 8 * c) for n, c in zip(size, core, strict=True))
    lattice = Lattice(rows, cols)
    cache = 1 << 40 if cached else 0
    found = amplification(lattice, native, margin, 3, cache)
    exact = decoded(lattice, native, margin, cached=cached)
    if all(axis.tiles(b) for axis in (rows, cols) for b in range(axis.blocks)):
        assert found == pytest.approx(exact)
    else:  # a last block without tiles of its own reads its core only: counted as if it had one
        assert found >= exact - 1e-9


@pytest.mark.alone
def test_amplification_of_very_many_blocks_takes_no_time():
    def lattice(size, core):
        return Lattice(Axis(size, 64, 48, 16, core), Axis(size, 64, 48, 16, core))

    begin = time.monotonic()
    huge = amplification(lattice((1 << 31) - 5, 256), (100, 100), (3, 4), 3, 1 << 30)
    assert time.monotonic() - begin < 2
    # The pattern repeats every lcm(48, 100, 256) pixels, of which a smaller raster has 26.
    small = amplification(lattice((1 << 19) - 5, 256), (100, 100), (3, 4), 3, 1 << 30)
    assert huge == pytest.approx(small, rel=1e-3)


@pytest.mark.parametrize(("native", "most"), [(240, 1.15), (256, 1.1), (512, 1.15)])
def test_a_plan_decodes_little_twice(native, most, tmp_path):
    path = write_tif(tmp_path / "x.tif", np.zeros((3, 9000, 2000), np.uint8), block=native)
    files = find_model("nuclei", None, {})
    config = PredictConfig(model="nuclei")
    request = Request(config, files, network_shape(files), choose(files))
    job = Job(path, tmp_path / "x.zarr")
    plan, _ = plan_for(open_job(job, request).info, job, request, named=True)
    assert 1 < plan.read_amplification <= most
    assert plan.block_levels > 0


@pytest.mark.parametrize("kind", ["png", "palette"])
def test_many_rasters_need_few_handles(kind, tmp_path):
    for k in range(60):
        Image.fromarray(np.full((40, 40), k, np.uint8)).convert(
            "P" if kind == "palette" else "RGB"
        ).save(tmp_path / f"{k}.png")
    files = find_model("nuclei", None, {})
    config = PredictConfig(model="nuclei", format="png")
    request = Request(config, files, network_shape(files), choose(files))
    jobs = [Job(path, tmp_path / "out" / path.stem) for path in sorted(tmp_path.glob("*.png"))]
    gc.disable()
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        items, _ = pack_task(jobs[:30], request)
        opened = [open_image(ImageRef(str(job.path))) for job in jobs[30:]] if kind == "png" else []
        after = len(list(Path("/proc/self/fd").iterdir()))
    finally:
        gc.enable()
    assert len(opened) in (0, 30)
    assert after < before + 10
    assert all((item.error is None) == (kind == "png") for item in items)


def test_reads_one_after_another_share_a_handle(tmp_path):
    raster = open_raster(write_tif(tmp_path / "x.tif", picture(64, 64)))
    for _ in range(4):
        with ThreadPoolExecutor(1) as pool:  # another thread each time
            pool.submit(raster.read, Window(0, 0, 8, 8), np.zeros(3)).result()
    assert len(raster._idle) == 1
