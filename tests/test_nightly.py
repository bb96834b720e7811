"""Runs that nobody watches: hundreds of slides, some broken, every night the same command."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import rasterio
import tifffile
from conftest import Done
from PIL import Image
from rasters import picture, write_image, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.progress import progress_of
from tilenet.record import Record

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

SLIDES, BROKEN = 500, 5
SIZES = [(300, 420), (512, 512), (700, 900), (1200, 1000)]
STAMP = 64  # pixels a side that differ from slide to slide


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a network that gives its input back: the class of a pixel is its strongest band."""
    return networks.identity(tmp_path_factory.mktemp("model") / "strongest.onnx")


def classes_of(height, width, seed):
    """Return fields of three classes, (h, w)."""
    coarse = np.random.default_rng(seed).integers(0, 3, (height // 40 + 1, width // 40 + 1))
    return np.kron(coarse, np.ones((40, 40), int))[:height, :width].astype(np.uint8)


def coloured(classes):
    """Return (h, w, 3) pixels whose strongest band is the class."""
    return np.where(np.arange(3) == classes[..., None], 220, 40).astype(np.uint8)


class Scanner:
    """Writes pyramidal, tiled slides: four by a library, the others as copies with a new stamp."""

    def __init__(self, folder):
        self.folder = folder
        self._templates = [self._template(k) for k in range(len(SIZES))]

    def _template(self, k):
        path, classes = self.folder / f"template{k}.tif", classes_of(*SIZES[k], seed=k)
        pixels = coloured(classes)
        with tifffile.TiffWriter(path) as tif:
            for level in range(2):
                tif.write(pixels[:: 1 << level, :: 1 << level], tile=(64, 64), photometric="rgb",
                          subfiletype=level, metadata=None)  # fmt: skip
        with tifffile.TiffFile(path) as tif:
            place, size = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
        assert size == STAMP * STAMP * 3
        data = bytearray(path.read_bytes())
        path.unlink()
        return classes, data, place

    def write(self, k):
        """Write slide number k; returns the mask it must have."""
        classes, data, place = self._templates[k % len(SIZES)]
        classes, data = classes.copy(), bytearray(data)
        classes[:STAMP, :STAMP] = np.random.default_rng(1000 + k).integers(0, 3, (STAMP, STAMP))
        stamp = coloured(classes[:STAMP, :STAMP]).tobytes()
        data[place : place + len(stamp)] = stamp
        path = self.folder / f"ward{k % 7}" / f"slide{k:03}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path, classes


def broken_slides(folder, whole):
    """Write five files that are no slides, each in a way of its own."""
    data = bytearray(whole.read_bytes())
    # In its directory: of one that ends later, a part could be read and gets a mask.
    (folder / "truncated.tif").write_bytes(data[:100])
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.svs").write_text("These are notes, and not a slide.\n" * 50)
    # An image of a terapixel in a file of some bytes.
    bomb = bytearray(data)
    start = struct.unpack_from("<I", bomb, 4)[0]
    for k in range(struct.unpack_from("<H", bomb, start)[0]):
        entry = start + 2 + 12 * k
        if struct.unpack_from("<H", bomb, entry)[0] in (256, 257):
            struct.pack_into("<HII", bomb, entry + 2, 4, 1, 1 << 30)
    (folder / "bomb.tif").write_bytes(bomb)
    directory = bytearray(data)
    struct.pack_into("<I", directory, 4, 0xFFFFFFF0)
    (folder / "directory.tif").write_bytes(directory)
    return {"truncated", "empty", "text", "bomb", "directory"}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Return a folder of slides, five of them broken, and the masks that the others must have."""
    folder = tmp_path_factory.mktemp("slides")
    scanner = Scanner(folder)
    truth = dict(scanner.write(k) for k in range(SLIDES - BROKEN))
    assert len(broken_slides(folder, next(iter(truth)))) == BROKEN
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in truth}) == len(truth)
    return folder, {path.relative_to(folder).with_suffix(".png"): c for path, c in truth.items()}


def nightly(slides, out, model, *more):
    return ["predict", slides[0], "--out", out, "--model", model, "--tile", 512, "--overlap", 64,
            "--precision", "fp32", "--json", *more]  # fmt: skip


@pytest.fixture(scope="module")
def night(slides, model, environment, tmp_path_factory):
    """Run the command over all slides, in another process."""
    out = tmp_path_factory.mktemp("night") / "masks"
    line = nightly(slides, out, model, "--summary", out.parent / "run.json")
    done = subprocess.run(
        [sys.executable, "-m", "tilenet", *map(str, line)], env=environment, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    return out, Done(done.returncode, done.stdout, done.stderr)


def errors(done):
    return [line for line in done.err.splitlines() if line.startswith("tilenet: error: ")]


class TestManySlides:
    def test_all_but_the_broken_have_the_right_mask(self, slides, night):
        out, done = night
        assert done.code == 7, done.err
        masks = {path.relative_to(out): np.asarray(Image.open(path)) for path in out.rglob("*.png")}
        assert masks.keys() == slides[1].keys()
        assert len(masks) == SLIDES - BROKEN
        wrong = [name for name, mask in masks.items() if (mask != slides[1][name]).any()]
        assert not wrong

    def test_five_lines_and_a_summary(self, night):
        _, done = night
        *lines, last = errors(done)
        assert len(lines) == BROKEN
        for name in ("truncated.tif", "empty.svs", "text.svs", "bomb.tif", "directory.tif"):
            assert len([line for line in lines if name in line]) == 1
        assert last == f"tilenet: error: {BROKEN} of {SLIDES} inputs failed, in whole or in part"
        assert done.err.splitlines()[-BROKEN - 1 :] == [*lines, last]
        assert "Traceback" not in done.err

    def test_the_json_lists_them(self, night):
        found = json.loads(night[1].out)
        assert found["exit_code"] == 7
        assert len(found["runs"]) == SLIDES - BROKEN
        assert [one["code"] for one in found["failed"]] == [3] * BROKEN
        assert found["skipped"] == []

    def test_the_record_tells_all(self, night):
        record = json.loads((night[0].parent / "run.json").read_text())
        expected = {"exit_code": 7, "error": None, "inputs": SLIDES, "finished": SLIDES - BROKEN,
                    "failed": BROKEN, "skipped": 0, "open": 0, "partial": 0}  # fmt: skip
        assert {key: record[key] for key in expected} == expected
        outcomes = [one["outcome"] for one in record["outcomes"]]
        assert sorted(outcomes) == ["failed"] * BROKEN + ["finished"] * (SLIDES - BROKEN)
        assert record["command"][:2] == ["tilenet", "predict"]
        assert record["ended"] >= record["started"]

    def test_a_mask_is_that_of_a_single_run(self, slides, night, model, tmp_path):
        for name in list(slides[1])[:4]:
            alone = tmp_path / name.name
            config = PredictConfig(model=str(model), tile=512, overlap=64, precision="fp32")
            predict([(slides[0] / name).with_suffix(".tif")], alone, config)
            assert alone.read_bytes() == (night[0] / name).read_bytes()

    @pytest.mark.parametrize("more", [[], ["--skip-finished"]])
    def test_the_next_night_does_nothing(self, cli, slides, night, model, more):
        out = night[0]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        done = cli(*nightly(slides, out, model, *more))
        assert done.code == 7
        assert len(errors(done)) == BROKEN + 1
        found = json.loads(done.out)
        assert not any(run["tiles_forwarded"] for run in found["runs"])
        assert len(found["skipped" if more else "runs"]) == SLIDES - BROKEN
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        assert f"{BROKEN} of {SLIDES} inputs failed" in done.err


def line(source, out, model, *more):
    return ["predict", source, "--out", out, "--model", model, "--tile", 32, "--overlap", 0, *more]


def damaged(path):
    """Write a raster of which a tile cannot be decoded."""
    write_tif(path, picture(256, 256), block=128)
    with rasterio.open(path) as src:
        place = int(src.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[place : place + 500] = bytes([0xA5]) * 500
    path.write_bytes(data)


@pytest.fixture
def three(tmp_path):
    for k in range(3):
        write_image(tmp_path / "in" / f"{k}.png", picture(30, 40, seed=k))
    return tmp_path / "in"


class TestSkipping:
    def test_whatever_made_the_mask(self, cli, three, model, models, tmp_path):
        """Nor does it matter what became of the raster: nobody looks at it."""
        out = tmp_path / "m"
        assert cli(*line(three / "0.png", out / "0.zarr", model)).code == 0
        assert cli(*line(three / "1.png", out / "1.tif", models / "conv.onnx")).code == 0
        (three / "0.png").write_bytes(b"gone bad")
        before = (out / "1.tif").read_bytes()
        done = cli(*line(three, out, model, "--skip-finished", "--json"))
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert [Path(run["input"]).name for run in found["runs"]] == ["2.png"]
        assert [{k: Path(v).name for k, v in one.items()} for one in found["skipped"]] == [
            {"input": "0.png", "output": "0.zarr"}, {"input": "1.png", "output": "1.tif"},
        ]  # fmt: skip
        assert (out / "1.tif").read_bytes() == before
        assert "2 of 3 inputs skipped" in done.err
        again = cli(*line(three, out, "no-such-model", "--skip-finished"))
        assert again.code == 0  # nothing is left, so not even the model is looked for
        assert [Path(one).name for one in again.out.split()] == ["0.zarr", "1.tif", "2.png"]

    def test_of_another_raster_or_format_or_damaged(self, cli, three, model, tmp_path):
        out = tmp_path / "m"
        for k in range(3):
            write_image(tmp_path / "other" / f"{k}.png", picture(30, 40, seed=10 + k))
        assert cli(*line(tmp_path / "other", out, model)).code == 0
        done = cli(*line(three, out, model, "--skip-finished", "--json"))
        found = json.loads(done.out)
        assert (found["skipped"], [one["code"] for one in found["failed"]]) == ([], [5, 5, 5])
        done = cli(*line(tmp_path / "other", out, model, "--skip-finished", "--format", "zarr",
                         "--json"))  # fmt: skip
        assert len(json.loads(done.out)["runs"]) == 3
        shutil.rmtree(out / "0.zarr" / "tilenet")
        (out / "1.png").write_bytes((out / "1.png").read_bytes()[:-1])
        done = cli(*line(tmp_path / "other", out, model, "--skip-finished", "--format", "png",
                         "--json"))  # fmt: skip
        found = json.loads(done.out)
        assert [Path(one["input"]).stem for one in found["skipped"]] == ["0", "2"]
        assert [(Path(one["input"]).stem, one["code"]) for one in found["failed"]] == [("1", 5)]

    def test_a_mask_with_holes_is_no_finished_one(self, cli, model, tmp_path):
        damaged(tmp_path / "in" / "a.tif")
        for _ in range(2):
            done = cli(*line(tmp_path / "in", tmp_path / "m", model, "--skip-finished", "--json"))
            assert done.code == 7
            found = json.loads(done.out)
            assert (len(found["runs"]), found["skipped"]) == (1, [])

    @pytest.mark.parametrize("more", [[], ["--format", "cog"], ["--format", "zarr"]])
    @pytest.mark.parametrize("letters", [239, 246])
    def test_a_name_that_is_too_long_for_its_mask(self, cli, three, model, tmp_path, letters, more):
        """It fails alone; with 239 letters only a mask that has files beside it does."""
        write_image(three / f"{'x' * letters}.png", picture(30, 40))
        fits = letters == 239 and "zarr" in more
        for skip in [], ["--skip-finished"], ["--skip-finished"]:
            done = cli(*line(three, tmp_path / "m", model, *more, *skip, "--json"))
            assert done.code == (0 if fits else 7), done.err
            found = json.loads(done.out)
            assert len(found["runs"]) + len(found.get("skipped", ())) == 3 + fits
            assert ["too long" in one["error"] for one in found["failed"]] == [True] * (not fits)

    @pytest.mark.parametrize("letters", [239, 246, 251])
    def test_one_whose_name_is_too_long(self, cli, three, model, tmp_path, letters):
        out = tmp_path / f"{'x' * letters}.tif"
        done = cli(*line(three / "0.png", out, model))
        assert done.code == 5
        assert "too long" in done.err
        assert "--out" in done.err

    def test_one_raster(self, cli, three, model, tmp_path):
        arguments = line(three / "0.png", tmp_path / "m.png", model, "--skip-finished", "--json")
        assert json.loads(cli(*arguments).out)["tiles_forwarded"] == 2
        found = json.loads(cli(*arguments).out)
        assert (found["skipped"], found["output"]) == (True, str(tmp_path / "m.png"))

    def test_not_while_replacing(self, cli, three, model, tmp_path):
        done = cli(*line(three, tmp_path / "m", model, "--skip-finished", "--overwrite"))
        assert done.code == 2
        assert "--skip-finished" in done.err


def events(text):
    return [json.loads(one) for one in text.splitlines() if one.startswith("{")]


class TestProgress:
    def test_json_lines(self, command, three, model, tmp_path):
        (three / "x.png").write_bytes(b"")
        write_tif(three / "large.tif", picture(300, 300), georeferenced=True)
        done = command(*line(three, tmp_path / "m", model, "--progress", "json", "--chunk", 64,
                             "--block", 128))  # fmt: skip
        assert done.code == 7
        told, plain = events(done.err), [one for one in done.err.splitlines() if one[:1] != "{"]
        assert plain == errors(done)
        assert len(plain) == 2
        assert all(abs(one["time"] - time.time()) < 100 for one in told)
        kinds = [one["event"] for one in told]
        assert set(kinds) == {
            "begin", "message", "start", "progress", "finish", "fail", "summary"
        }  # fmt: skip
        assert told[0] | {"time": 0} == {"event": "begin", "time": 0, "inputs": 5}
        [large] = [one for one in told if one["event"] == "start" and one["blocks"] > 1]
        assert (Path(large["input"]).name, large["pixels"], large["blocks"]) == (
            "large.tif", 90_000, 9
        )  # fmt: skip
        assert kinds.count("start") == kinds.count("finish") == 4
        [fail] = [one for one in told if one["event"] == "fail"]
        assert (Path(fail["input"]).name, fail["code"]) == ("x.png", 3)
        steps = [one for one in told if one["event"] == "progress"]
        assert set(steps[0]) == {
            "event", "time", "input", "blocks_done", "blocks", "inputs_done", "inputs",
            "pixels_done", "pixels", "mpixels_per_second", "seconds_left",
        }  # fmt: skip
        summary = told[-1]
        assert summary["event"] == "summary"
        assert {k: summary[k] for k in ("exit_code", "inputs", "finished", "failed", "pixels")} == {
            "exit_code": 7, "inputs": 5, "finished": 4, "failed": 1, "pixels": 93_600,
        }  # fmt: skip

    def test_a_run_that_cannot_begin(self, cli, three, tmp_path):
        done = cli(*line(three, tmp_path / "m", "no-such-model", "--progress", "json",
                         "--summary", tmp_path / "run.json"))  # fmt: skip
        assert done.code == 4
        last = events(done.err)[-1]
        assert (last["event"], last["exit_code"], last["open"]) == ("summary", 4, 3)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["error"] == last["error"]
        assert record["error"]["code"] == 4

    def test_none_and_messages(self, cli, three, model, tmp_path, monkeypatch):
        monkeypatch.setattr("tilenet.progress._LOG_SECONDS", 0)
        log = cli(*line(three, tmp_path / "a", model, "--json"))
        assert [one for one in log.err.splitlines() if "Mpx/s" in one]
        none = cli(*line(three, tmp_path / "b", model, "--json", "--progress", "none"))
        assert not [one for one in none.err.splitlines() if "Mpx/s" in one]
        assert "tilenet: model" in none.err

    def test_a_bar(self, cli, three, model, tmp_path):
        done = cli(*line(three, tmp_path / "m", model, "--progress", "bar"))
        assert done.code == 0
        assert "3.60k" in done.err

    def test_no_such_progress(self, cli, three, model, tmp_path):
        done = cli(*line(three, tmp_path / "m", model, "--progress", "pie"))
        assert done.code == 2
        assert "--progress" in done.err
        assert not (tmp_path / "m").exists()

    def test_the_rate_leaves_out_what_was_there(self):
        show = progress_of("log")
        event = {"event": "progress", "pixels_done": 5_000_000, "pixels": 6_000_000}
        assert show._rate.of(event) == (0, None)
        rate, left = show._rate.of({**event, "pixels_done": 5_500_000})
        assert rate * left == pytest.approx(500_000)


class TestRecord:
    def test_of_somebody_elses(self, cli, three, model, tmp_path):
        for content in (b"{}", b"my notes", b"[]"):
            (tmp_path / "run.json").write_bytes(content)
            done = cli(*line(three, tmp_path / "m", model, "--summary", tmp_path / "run.json"))
            assert done.code == 5
            assert (tmp_path / "run.json").read_bytes() == content
            assert not (tmp_path / "m").exists()

    def test_is_there_from_the_start_and_whole_at_any_time(self, tmp_path):
        path = tmp_path / "deep" / "run.json"
        record = Record(["tilenet", "predict", "https://user:secret@x/a?sig=1"], path)
        first = json.loads(path.read_text())
        assert (first["exit_code"], first["ended"]) == (None, None)
        assert "secret" not in path.read_text()
        assert "sig" not in path.read_text()
        record({"event": "begin", "inputs": ["a", "b", "c"]})
        record({"event": "start", "input": "a", "output": "x", "pixels": 1, "blocks": 1})
        record({"event": "finish", "input": "a", "output": "x", "pixels": 7, "seconds": 1.0,
                "resumed": False})  # fmt: skip
        record({"event": "fail", "input": "a", "code": 7, "error": "holes"})
        record({"event": "skip", "input": "b", "output": "y"})
        figures = record.end(7)
        found = json.loads(path.read_text())
        assert [one["outcome"] for one in found["outcomes"]] == ["partial", "skipped", "open"]
        assert {k: figures[k] for k in ("inputs", "partial", "skipped", "open", "pixels")} == {
            "inputs": 3, "partial": 1, "skipped": 1, "open": 1, "pixels": 7,
        }  # fmt: skip
        assert os.listdir(path.parent) == ["run.json"]  # noqa: PTH208 - names will do
        assert Record([], path)  # ours is replaced

    def test_of_the_only_input(self, cli, model, tmp_path):
        """It tells what it does of one among several."""
        hurt, broken = tmp_path / "hurt.tif", tmp_path / "broken.png"
        damaged(hurt)
        broken.write_bytes(b"no picture")
        for source, code, outcome in ((hurt, 7, "partial"), (broken, 3, "failed")):
            out = tmp_path / "m" / f"{source.stem}.tif"
            done = cli(*line(source, out, model, "--summary", tmp_path / "run.json",
                             "--progress", "json"))  # fmt: skip
            record = json.loads((tmp_path / "run.json").read_text())
            assert (done.code, record["exit_code"], record[outcome]) == (code, code, 1)
            [one] = record["outcomes"]
            assert (one["outcome"], one["code"]) == (outcome, code)
            assert "fail" in [event["event"] for event in events(done.err)]

    def test_of_a_read_that_does_not_end(self, three, model, environment, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(
            "import time\nfrom tilenet.sources.raster import Raster\n"
            "Raster._read = lambda *_, **__: time.sleep(60)\n"
        )
        path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        done = subprocess.run(
            [sys.executable, "-m", "tilenet", *map(str, line(three, tmp_path / "m", model)),
             "--read-timeout", "2", "--summary", str(tmp_path / "run.json")],
            env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 6, done.stderr
        record = json.loads((tmp_path / "run.json").read_text())
        assert (record["exit_code"], record["open"]) == (6, 3)
        assert "a read has not ended" in record["error"]["what"]


@pytest.mark.parametrize("count", [1, 2])
def test_where_masks_are_is_told_to_who_stands_elsewhere(cli, model, tmp_path, monkeypatch, count):
    """Of one raster as of several: in events and in the record. In `runs` it is as it was named."""
    monkeypatch.chdir(tmp_path)
    names = ["a.png", "b.png"][:count]
    for name in names:
        write_image(tmp_path / name, picture(40, 50))
    out = "m.png" if count == 1 else "m"
    masks = ["m.png"] if count == 1 else ["m/a.png", "m/b.png"]
    masks = [str(tmp_path / mask) for mask in masks]
    for more in [], ["--skip-finished"]:
        done = cli("predict", *names, "--out", out, "--model", model, "--format", "png", *more,
                   "--progress", "json", "--summary", "run.json")  # fmt: skip
        assert done.code == 0, done.err
        events = [json.loads(line) for line in done.err.splitlines()]
        told = [one["output"] for one in events if one["event"] in ("finish", "skip")]
        assert sorted(told) == masks
        outcomes = json.loads((tmp_path / "run.json").read_text())["outcomes"]
        assert [one["output"] for one in outcomes] == masks
