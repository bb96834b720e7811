"""Compiled networks on disk: the same answers, noticed damage, few of them."""

import os
import shutil
from contextlib import closing

import numpy as np
import pytest
from rasters import picture
from test_models import PRECISIONS

from tilenet.models import compiled
from tilenet.models.compiled import keep_compiled, kept_compiled
from tilenet.models.session import choose, open_session
from tilenet.models.store import find_model


@pytest.fixture
def folder(cache):
    """Return where compiled networks lie, empty."""
    found = cache / "tilenet" / "compiled"
    shutil.rmtree(found, ignore_errors=True)
    return found


@pytest.fixture
def files(models):
    return find_model(str(models / "conv.onnx"), None, {})


def answers(files, *shapes, precision="fp32"):
    """Return the scores of a tile of each shape, by one session."""
    setup = choose(files, backend="openvino", precision=precision)
    session, found = open_session(files, setup, "uint8"), []
    for shape in shapes:
        with closing(session.scores([(picture(*shape), 0, 0)], shape)) as scores:
            found.append(next(scores).copy())
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["nuclei", "conv.onnx"])
def test_a_kept_network_gives_the_same_bytes(models, folder, name, precision):
    files = find_model(str(models / name) if name.endswith("onnx") else name, None, {})
    [first] = answers(files, (64, 64), precision=precision)
    [path] = folder.iterdir()
    made = path.stat().st_ino
    assert np.array_equal(answers(files, (64, 64), precision=precision)[0], first)
    assert [one.stat().st_ino for one in folder.iterdir()] == [made]


@pytest.mark.parametrize("damage", ["a page of zeros", "cut off", "empty"])
def test_a_kept_network_that_was_damaged_is_compiled_again(files, folder, damage):
    [first] = answers(files, (64, 64))
    [path] = folder.iterdir()
    data = path.read_bytes()
    half = len(data) // 2
    damaged = {"a page of zeros": data[:half] + bytes(512) + data[half + 512 :],
               "cut off": data[:half], "empty": b""}  # fmt: skip
    path.write_bytes(damaged[damage])
    assert kept_compiled(path.name) is None
    assert np.array_equal(answers(files, (64, 64))[0], first)
    assert kept_compiled(path.name) is not None


def test_what_openvino_does_not_take_is_compiled_again(files, folder):
    [first] = answers(files, (64, 64))
    [path] = folder.iterdir()
    keep_compiled(path.name, memoryview(b"whole, but no network"))
    assert np.array_equal(answers(files, (64, 64))[0], first)
    assert path.stat().st_size > 100


def test_a_process_keeps_one_shape(files, folder):
    answers(files, (64, 64), (32, 64), (64, 32))
    assert len(os.listdir(folder)) == 1  # noqa: PTH208 - names will do


def test_another_tile_or_kind_of_pixel_is_another_network(files, folder):
    answers(files, (64, 64))
    answers(files, (32, 64))
    setup = choose(files, backend="openvino", precision="fp32")
    session = open_session(files, setup, "uint16")
    with closing(session.scores([(picture(64, 64).astype(np.uint16), 0, 0)], (64, 64))) as scores:
        next(scores)
    assert len(os.listdir(folder)) == 3  # noqa: PTH208 - names will do


def test_what_was_used_longest_ago_goes(folder, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_BYTES", 2500)
    for second, name in enumerate("ab"):
        keep_compiled(name, memoryview(bytes(1000)))
        os.utime(folder / name, (second, second))
    (folder / ".c.tmp").write_bytes(bytes(1000))  # of a process that was killed
    os.utime(folder / ".c.tmp", (0.5, 0.5))
    assert kept_compiled("a") == bytes(1000)
    keep_compiled("d", memoryview(bytes(1000)))
    keep_compiled("more than all", memoryview(bytes(2500)))
    assert sorted(os.listdir(folder)) == ["a", "d"]  # noqa: PTH208 - names will do


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "tilenet" / "compiled"
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    keep_compiled("a", memoryview(bytes(1000)))
    assert kept_compiled("a") is None
