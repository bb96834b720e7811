"""Pixels that cannot be read get no answer, are listed, and change nothing elsewhere."""

import json

import numpy as np
import pytest
import rasterio
import zarr
from rasters import picture, write_tif

from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.sources import open_raster
from tilenet.sources.salvage import salvage

SIDE, NATIVE, TILE = 500, 64, 32
SMALL = ("--tile", TILE, "--overlap", 16, "--chunk", 64, "--precision", "fp32", "--json")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)


def damage(path, blocks):
    """Overwrite the stored bytes of some native blocks (row, col) with nonsense."""
    with rasterio.open(path) as src:
        tags = [
            (int(src.get_tag_item(f"BLOCK_OFFSET_{c}_{r}", "TIFF", bidx=1)),
             int(src.get_tag_item(f"BLOCK_SIZE_{c}_{r}", "TIFF", bidx=1)))
            for r, c in blocks
        ]  # fmt: skip
    data = bytearray(path.read_bytes())
    for offset, size in tags:
        data[offset : offset + size] = bytes([0xA5]) * size
    path.write_bytes(data)


def windows(blocks):
    whole = Window(0, 0, SIDE, SIDE)
    return [Window(r * NATIVE, c * NATIVE, NATIVE, NATIVE).intersection(whole) for r, c in blocks]


@pytest.fixture
def source(tmp_path):
    return write_tif(tmp_path / "a.tif", picture(SIDE, SIDE), block=NATIVE)


def mask_of(out):
    return np.asarray(zarr.open_group(out, mode="r", use_consolidated=False)["mask"][...])


LOST = [(0, 0), (2, 3), (7, 7)]


@pytest.mark.parametrize("block", [128, 512])  # many blocks, and one, which is a pack
def test_unreadable_blocks(cli, source, models, tmp_path, block):
    line = ("--model", models / "conv.onnx", *SMALL, "--block", block)
    assert cli("predict", source, "--out", tmp_path / "whole.zarr", *line).code == 0
    damage(source, LOST)
    done = cli("predict", source, "--out", tmp_path / "x.zarr", *line)
    assert done.code == 7
    assert done.err.count("tilenet: error: ") == 1
    found = json.loads(done.out)
    places = {(p["row"], p["col"], p["height"], p["width"]) for p in found["invalid"]}
    assert places == {(w.row, w.col, w.height, w.width) for w in windows(LOST)}
    assert found["blocks_invalid"] == ([0] if block == 512 else [0, 5, 15])
    lost = np.zeros((SIDE, SIDE), bool)
    near = lost.copy()
    for w in windows(LOST):
        lost[w.slices()] = True
        near[max(0, w.row - TILE) : w.row_stop + TILE, max(0, w.col - TILE) : w.col_stop + TILE] = 1
    mask, whole = mask_of(tmp_path / "x.zarr"), mask_of(tmp_path / "whole.zarr")
    assert ((mask == 255) == lost).all()
    assert (mask[~near] == whole[~near]).all()


def test_the_same_bytes_however_it_is_cut(cli, source, models, tmp_path):
    damage(source, LOST)
    masks = []
    for block in (64, 128, 512):
        out = tmp_path / f"{block}.zarr"
        cli("predict", source, "--out", out, "--model", models / "conv.onnx", *SMALL,
            "--block", block)  # fmt: skip
        masks.append(mask_of(out))
    assert (masks[0] == masks[1]).all()
    assert (masks[0] == masks[2]).all()


def test_a_finished_mask_with_gaps_says_so_again(cli, source, models, tmp_path):
    damage(source, LOST)
    line = ("predict", source, "--out", tmp_path / "x.tif", "--model", models / "conv.onnx", *SMALL)
    assert cli(*line).code == 7
    again = cli(*line)
    assert again.code == 7
    assert len(json.loads(again.out)["invalid"]) == 3


@pytest.mark.parametrize("block", [128, 512])
def test_strict(cli, source, models, tmp_path, block):
    damage(source, LOST)
    line = ("--model", models / "conv.onnx", *SMALL, "--block", block)
    done = cli("predict", source, "--out", tmp_path / "x.zarr", *line, "--strict")
    assert done.code == 3
    assert not (tmp_path / "x.zarr").exists()
    if block == 128:  # what was done before is not lost, and strict it stays
        assert cli("predict", source, "--out", tmp_path / "x.zarr", *line).code == 7
        done = cli("predict", source, "--out", tmp_path / "x.zarr", *line, "--strict")
        assert done.code == 3


def test_nothing_can_be_read(cli, source, models, tmp_path):
    damage(source, [(r, c) for r in range(8) for c in range(8)])
    done = cli("predict", source, "--out", tmp_path / "x.zarr", "--model", models / "conv.onnx",
               *SMALL, "--block", 128)  # fmt: skip
    assert done.code == 3
    assert not (tmp_path / "x.zarr").exists()


def test_one_of_a_folder(cli, source, models, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "bc":
        (tmp_path / "in" / f"{name}.tif").write_bytes(source.read_bytes())
    damage(tmp_path / "in" / "b.tif", LOST)
    done = cli("predict", tmp_path / "in", "--out", tmp_path / "out", "--model",
               models / "conv.onnx", *SMALL)  # fmt: skip
    assert done.code == 7
    found = json.loads(done.out)
    assert len(found["runs"]) == 2
    assert [(one["code"], one["input"][-5:]) for one in found["failed"]] == [(7, "b.tif")]
    assert done.err.splitlines()[-1].startswith("tilenet: error: 1 of 2 inputs failed")


def test_salvage_reads_what_it_can():
    data = np.arange(70 * 90).reshape(1, 70, 90)
    bad = {(16, 32), (64, 80)}
    reads = []

    def read(window):
        reads.append(window)
        for row, col in bad:
            if Window(row, col, 16, 16).intersection(window).pixels:
                raise ValueError("damaged")
        return data[(slice(None), *window.slices())], None

    damaged = []
    box = Window(3, 5, 67, 85)
    pixels, valid = salvage(read, box, (16, 16), np.full((1, 1, 1), -1), damaged)
    expected = data[(slice(None), *box.slices())].copy()
    lost = np.zeros(valid.shape, bool)
    for row, col in bad:
        part = Window(row, col, 16, 16).intersection(box)
        lost[part.slices(box.row, box.col)] = True
    expected[:, lost] = -1
    assert (pixels == expected).all()
    assert (valid == ~lost).all()
    assert {(w.row, w.col) for w in damaged} == bad
    assert len(reads) < 24  # by halves, not one by one


def test_want_of_memory_is_not_the_file_s_fault():
    def read(window):
        raise MemoryError

    with pytest.raises(MemoryError):
        salvage(read, Window(0, 0, 64, 64), (16, 16), np.zeros((1, 1, 1)), [])


def test_a_stream_has_no_blocks_to_lose(tmp_path):
    path = tmp_path / "a.png"
    with rasterio.open(path, "w", driver="PNG", height=80, width=80, count=3, dtype="uint8") as dst:
        dst.write(picture(80, 80))
    path.write_bytes(path.read_bytes()[:6000])
    damaged = []
    with pytest.raises(InputError, match="cannot be read"):
        open_raster(path).read(Window(0, 0, 80, 80), np.zeros(3), damaged)
    assert not damaged
