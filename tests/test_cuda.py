"""A CUDA device: the same answers whatever else is in flight."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rasters import picture
from test_models import added_up, setup

from tilenet.models.contract import keeps_batch_contract
from tilenet.models.devices import has_cuda
from tilenet.models.footprint import footprint
from tilenet.models.session import open_session
from tilenet.models.sizes import Wanted, choose_sizes
from tilenet.models.store import find_model

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")


@pytest.fixture(params=["torch fp32", "torch fp16", "inductor fp32", "inductor fp16"])
def session(request):
    made = setup(*request.param.split(), 4, device="cuda")
    return open_session(find_model("nuclei", None, {}), made, "uint8")


def test_a_tile_depends_on_itself_alone(session):
    card = find_model("nuclei", None, {}).card
    assert keeps_batch_contract(session, card, (96, 96))


def test_two_blocks_in_flight_give_what_one_gives(session):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 160, 160), np.uint8) for _ in range(24)]
    alone = [added_up(session, image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: added_up(session, image), images))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["torch", "inductor"])
def test_it_sees_what_the_cpu_sees(backend):
    files, pixels = find_model("nuclei", None, {}), picture(160, 128)
    ours = added_up(open_session(files, setup(backend, "fp32", 4, device="cuda"), "uint8"), pixels)
    theirs = added_up(open_session(files, setup("torch", "fp32", 4), "uint8"), pixels)
    assert np.mean(ours != theirs) < 1e-3


def test_a_batch_takes_what_its_footprint_says():
    import torch

    files, made = find_model("nuclei", None, {}), setup("torch", "fp16", 4, device="cuda")
    needs, session = footprint(files, made), open_session(files, made, "uint8")
    assert needs is not None
    tile = (session.load(picture(512, 512)), 0, 0)
    list(session.scores([tile], (512, 512)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    list(session.scores([tile] * 4, (512, 512)))
    took = torch.cuda.max_memory_allocated() - before
    assert 0.4 < took / (needs.per_pixel * 4 * 512 * 512) < 1.6


def test_a_batch_fits_into_the_device():
    files = find_model("nuclei", None, {})
    found = choose_sizes(files, Wanted((1024, 512), 1, device="cuda"))
    assert (found.tile, found.setup.device) == (1024, "cuda")
    assert choose_sizes(files, Wanted((64,), 1, device="cuda", batch_size=3)).setup.batch_size == 3
