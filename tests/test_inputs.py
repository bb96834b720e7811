"""Which rasters names stand for: folders, patterns that no shell expanded, manifests."""

import errno
import io
import json
import os
from pathlib import Path

import pytest
from rasters import picture, write_image

from tilenet.errors import InputError
from tilenet.sources import RemoteName, find_inputs, open_raster, read_manifest

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

FILES = ["a/1.svs", "a/b/2.svs", "a/b/2.txt", "a/.old/3.svs", "c/1.svs", "c/d.zarr/zarr.json",
         "c/d.zarr/x.svs", "masks/4.svs", "[1].svs", "1.svs"]  # fmt: skip


@pytest.fixture
def slides(tmp_path):
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def found(inputs):
    return {(str(one.path), str(one.stem)) for one in inputs}


def matched(slides, pattern):
    inputs = find_inputs([slides / pattern], slides / "masks")
    assert [one.path for one in inputs] == sorted(one.path for one in inputs)
    return {(str(one.path.relative_to(slides)), str(one.stem)) for one in inputs}


class TestPatterns:
    def test_folders_below_keep_their_names(self, slides):
        assert matched(slides, "*/**/*.svs") == {
            ("a/1.svs", "a/1"), ("a/b/2.svs", "a/b/2"), ("c/1.svs", "c/1"),
        }  # fmt: skip
        assert matched(slides, "a/**/*.*") == {
            ("a/1.svs", "1"), ("a/b/2.svs", "b/2"), ("a/b/2.txt", "b/2"),
        }  # fmt: skip

    def test_masks_of_ours_are_no_inputs(self, slides):
        (slides / "a" / "1.svs.tilenet.json").write_text("a mask's document")
        assert matched(slides, "a/**/*.svs") == {("a/b/2.svs", "b/2")}
        with pytest.raises(InputError, match="no raster matches"):
            find_inputs([slides / "masks" / "*.svs"], slides / "masks")

    def test_a_file_of_that_very_name_wins(self, slides):
        assert matched(slides, "[1].svs") == {("[1].svs", "[1]")}
        (slides / "[1].svs").unlink()
        assert matched(slides, "[1].svs") == {("1.svs", "1")}

    def test_stores_and_folders(self, slides):
        assert matched(slides, "c/d*") == {("c/d.zarr", "d")}
        assert matched(slides, "[ac]") == {
            ("a/b/2.svs", "a/b/2"), ("a/1.svs", "a/1"), ("c/1.svs", "c/1"), ("c/d.zarr", "c/d"),
        }  # fmt: skip

    def test_in_the_folder_where_we_stand(self, slides, monkeypatch):
        monkeypatch.chdir(slides)
        assert found(find_inputs([Path("c/*.svs")], Path("masks"))) == {("c/1.svs", "1")}

    @pytest.mark.parametrize("pattern", ["*.tif", "a**/b/*", "nowhere/*/x"])
    def test_nothing_matches(self, slides, pattern):
        with pytest.raises(InputError, match=r"pattern"):
            find_inputs([slides / pattern], slides / "masks")
        several = find_inputs([slides / pattern, slides / "1.svs"], slides / "masks")
        assert [one.path for one in several] == [slides / pattern, slides / "1.svs"]


class TestManifests:
    def test_names_and_where_masks_lie(self, slides):
        manifest = slides / "list.txt"
        manifest.write_bytes(
            b"\xef\xbb\xbf# slides\r\na/1.svs\r\n\n  c/1.svs  \na/1.svs\n../x.svs\n"
            + f"{slides}/a/b/2.svs\n".encode()
            + b"s3://bucket/far/9.svs?sig=1#2\na/missing.svs\nc/*.svs\na/b\nnone*\n\xff.svs\n"
        )
        inputs = read_manifest(str(manifest), slides / "masks")
        assert [str(one.stem) for one in inputs] == [
            "a/1", "c/1", "x", "2", "9", "a/missing", "c/1", "a/b/2", "none*", "\udcff",
        ]  # fmt: skip
        assert inputs[0].path == slides / "a" / "1.svs"
        assert isinstance(inputs[4].path, RemoteName)
        assert os.fsencode(inputs[-1].path).endswith(b"/\xff.svs")

    def test_standard_input(self, slides, monkeypatch):
        monkeypatch.chdir(slides)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a/1.svs\n#\n1.svs")))
        assert found(read_manifest("-", Path("masks"))) == {("a/1.svs", "a/1"), ("1.svs", "1")}

    @pytest.mark.parametrize("text", [b"", b"\n# nothing\n\n", b"II*\0\0\0"])
    def test_that_name_nothing(self, cli, models, tmp_path, text):
        (tmp_path / "list").write_bytes(text)
        done = cli("predict", "--manifest", tmp_path / "list", "--out", tmp_path / "m",
                   "--model", models / "conv.onnx")  # fmt: skip
        assert done.code == 3
        assert "the manifest" in done.err
        assert len(done.err.splitlines()) == 1

    def test_thousands_of_lines(self, tmp_path):
        (tmp_path / "list").write_text("".join(f"s/{k}.svs\n" for k in range(10_000)))
        inputs = read_manifest(str(tmp_path / "list"), tmp_path)
        assert [str(one.stem) for one in inputs] == [f"s/{k}" for k in range(10_000)]


def line(models, out):
    return ["predict", "--out", out, "--model", models / "conv.onnx", "--tile", 32, "--overlap", 0]


def test_missing_ones_fail_alone(cli, models, tmp_path):
    write_image(tmp_path / "s" / "a.png", picture(30, 40))
    write_image(tmp_path / "s" / "b.png", picture(30, 40))
    (tmp_path / "list").write_text("s/a.png\ns/gone.png\nnone/*.png\n")
    done = cli(*line(models, tmp_path / "m"), "--manifest", tmp_path / "list", "--json",
               tmp_path / "s" / "[b].png", tmp_path / "s" / "a.png")  # fmt: skip
    assert done.code == 7, done.err
    result = json.loads(done.out)
    assert [Path(run["output"]).name for run in result["runs"]] == ["b.png", "a.png"]
    assert [(Path(one["input"]).name, one["code"]) for one in result["failed"]] == [
        ("gone.png", 3), ("*.png", 3)
    ]  # fmt: skip
    assert done.err.splitlines()[-1] == "tilenet: error: 2 of 4 inputs failed, in whole or in part"


def test_one_pattern_makes_a_folder(cli, models, tmp_path):
    write_image(tmp_path / "s" / "a.png", picture(30, 40))
    done = cli(*line(models, tmp_path / "m"), tmp_path / "s" / "*.png")
    assert (done.code, done.out) == (0, f"{tmp_path / 'm' / 'a.png'}\n"), done.err
    done = cli(*line(models, tmp_path / "m"), tmp_path / "s" / "*.tif")
    assert done.code == 3
    assert "no raster matches the pattern" in done.err
    planned = cli(*line(models, tmp_path / "m"), tmp_path / "s" / "*.png", "--dry-run", "--json")
    assert [one["finished"] for one in json.loads(planned.out)["estimate"]] == [True]


def test_no_input_at_all(cli, models, tmp_path):
    done = cli(*line(models, tmp_path / "m"))
    assert done.code == 2
    assert "name rasters or folders, or give --manifest" in done.err


def test_a_folder_that_does_not_read_is_not_passed_over(tmp_path, monkeypatch):
    """Nobody else would miss what lies in it. (Root may read any: the system's answer is made.)"""
    for name in ("open/a.png", "closed/b.png", "lost+found/c.png"):
        write_image(tmp_path / "in" / name, picture(8, 8))
    look = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = [one.path for one in find_inputs([tmp_path / "in"], tmp_path / "out")]
    assert found == sorted([tmp_path / "in/closed", tmp_path / "in/open/a.png"])
    with pytest.raises(InputError, match=r"cannot be read: Permission denied; .*closed"):
        open_raster(tmp_path / "in/closed")
