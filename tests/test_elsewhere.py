"""Rasters on a web server of this machine's, and files that point to other files."""

from __future__ import annotations

import http.server
import threading

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasters import picture, write_tif

from tilenet.errors import InputError, ResourceError, UsageError, without_secrets
from tilenet.geometry import Window
from tilenet.sources import View, open_raster, vsi

ALLOWED = View(allow_remote=True)


def whole(path, view):
    raster = open_raster(path, view)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.zeros(len(raster.info.bands)))


def test_a_cog_on_a_web_server_is_as_on_disk(served):
    folder, address, asked = served
    path = write_tif(folder / "a.tif", picture(300, 400), georeferenced=True, levels=(2,))
    for view in (View(), View(level=1)):
        far = View(level=view.level, allow_remote=True)
        assert np.array_equal(whole(f"{address}/a.tif", far)[0], whole(path, view)[0])
    info = open_raster(f"{address}/a.tif", ALLOWED).info
    assert info.georeference == open_raster(path).info.georeference
    assert set(asked) <= {"/a.tif", "/a.tif.vat.dbf"}  # no folders, and next to no sidecars


def test_without_the_flag_nothing_is_asked(served):
    folder, address, asked = served
    write_tif(folder / "a.tif", picture(30, 40), georeferenced=True)
    for name in (f"{address}/a.tif", f"/vsicurl/{address}/a.tif"):
        with pytest.raises(UsageError, match="--allow-remote"):
            open_raster(name)
    assert list(asked) == []


def test_another_content_is_another_fingerprint(served):
    folder, address, _ = served
    seen = set()
    for seed in (1, 2):
        write_tif(folder / "a.tif", picture(30, 40, seed=seed), georeferenced=True)
        seen.add(open_raster(f"{address}/a.tif?v={seed}", ALLOWED).info.fingerprint)
    assert len(seen) == 2


def test_what_is_not_there(served):
    _, address, _ = served
    with pytest.raises(InputError, match="the server answers 404"):
        open_raster(f"{address}/b.tif", ALLOWED)


def test_a_server_that_goes_away_loses_no_pixels(served):
    folder, address, _ = served
    path = write_tif(folder / "a.tif", picture(600, 800), georeferenced=True)
    raster = open_raster(f"{address}/a.tif", ALLOWED)
    raster._idle.append(raster._open(raster.info))
    path.unlink()
    damaged = []
    with rasterio.Env(), pytest.raises(ResourceError, match="rerun resumes"):
        raster.read(Window(0, 0, 600, 800), np.zeros(3), damaged)
    assert damaged == []


class _Overloaded(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("what", ["overloaded", "gone"])
def test_a_server_that_does_not_answer_is_not_a_bad_file(what, monkeypatch):
    """Opening a file too: of a thousand scenes most are opened while the run is under way."""
    monkeypatch.setitem(vsi._SETTINGS, "GDAL_HTTP_RETRY_DELAY", "0.01")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Overloaded) as server:
        serving = threading.Thread(target=server.serve_forever)
        address = f"http://127.0.0.1:{server.server_port if what == 'overloaded' else 9}"
        serving.start()
        try:
            with pytest.raises(ResourceError, match=r"the server .*a rerun resumes"):
                open_raster(f"{address}/a.tif", ALLOWED)
        finally:
            server.shutdown()
            serving.join()


def test_a_vrt_needs_the_flag(tmp_path):
    path = write_tif(tmp_path / "a.tif", picture(30, 40), georeferenced=True)
    rasterio.shutil.copy(str(path), str(tmp_path / "a.vrt"), driver="VRT")
    with pytest.raises(InputError, match=r"points to other files.*--allow-remote"):
        open_raster(tmp_path / "a.vrt")
    found, valid = whole(tmp_path / "a.vrt", ALLOWED)
    assert np.array_equal(found, picture(30, 40))
    assert valid is None
    before = open_raster(tmp_path / "a.vrt", ALLOWED).info
    assert str(path) in before.files
    write_tif(path, picture(30, 40, seed=3), georeferenced=True)
    assert open_raster(tmp_path / "a.vrt", ALLOWED).info.fingerprint != before.fingerprint


def test_secrets_stay_out_of_what_is_said():
    text = "https://me:pw@host.org/a/b.tif?X-Signature=abc&d=1; and s3://b/c?k=1"
    assert without_secrets(text) == "https://host.org/a/b.tif; and s3://b/c"
    assert without_secrets("what? a/b?c") == "what? a/b?c"
    assert "sig" not in str(InputError("x", "http://h/a.tif?sig=1"))
    with pytest.raises(UsageError, match="GDAL_HTTP_USERPWD") as caught:
        open_raster("http://me:pw@127.0.0.1/a.tif", ALLOWED)
    assert "pw@" not in str(caught.value)
