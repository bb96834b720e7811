"""Masks written to an object store: a server on this machine that speaks S3."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import stores
import zarr
from buckets import connect, connect_empty
from rasters import picture, write_tif

from tilenet.api import estimate, predict
from tilenet.config import PredictConfig
from tilenet.engine.elsewhere import RemoteOutput
from tilenet.engine.lease import Lease
from tilenet.engine.mirror import Mirror
from tilenet.engine.objects import Objects
from tilenet.engine.request import Job
from tilenet.errors import OutputError, ResourceError, UsageError
from tilenet.events import Tracker
from tilenet.models.store import find_model
from tilenet.predicting.afar import predict_remote
from tilenet.predicting.asking import Clock, plan_of, request_for
from tilenet.predicting.single import make_one
from tilenet.sources import RemoteName, find_inputs

OUT = "s3://bucket/some/m.zarr"
RUN = "some/.m.zarr.tilenet"
PIXELS = picture(330, 450, seed=9)


def serve():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return server, f"http://{host}:{port}"


@pytest.fixture(scope="module")
def server():
    """Return the address of an S3 server on the loopback interface."""
    server, address = serve()
    yield address
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """Return an empty bucket as obstore sees it; the environment leads to it."""
    return connect_empty(server, monkeypatch)


def content(bucket):
    """Return every object by its key."""
    import obstore

    keys = [one["path"] for one in obstore.list(bucket).collect()]
    return {key: bytes(obstore.get(bucket, key).bytes()) for key in keys}


def files(folder, prefix="some/m.zarr/"):
    """Return every file of a folder as the object that it is to be."""
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tif(tmp_path_factory.mktemp("source") / "a.tif", PIXELS)


@pytest.fixture
def flags(models, tmp_path):
    return [
        "-m", models / "conv.onnx", "--tile", 64, "--block", 128, "--chunk", 64, "--allow-remote",
        "--scratch", tmp_path / "scratch",
    ]  # fmt: skip


def configured(models, tmp_path, **options):
    model = str(models / "conv.onnx")
    usual = {"tile": 64, "block": 128, "chunk": 64, "allow_remote": True}
    return PredictConfig(**{"model": model, **usual, "scratch": tmp_path / "scratch", **options})


@pytest.fixture(scope="module")
def expected(source, models, tmp_path_factory):
    """Return the objects that a mask must be: the files of one that is made on the disk."""
    out = tmp_path_factory.mktemp("expected") / "m.zarr"
    predict([source], out, configured(models, out.parent, scratch=None))
    return files(out)


@pytest.mark.parametrize(
    "options",
    [{}, {"block": None, "chunk": 768}, {"zarr_format": "3", "probabilities": True}],
    ids=["blocks", "one block", "zarr 3 with probabilities"],
)
def test_the_objects_are_the_files_of_a_local_run(options, bucket, source, models, tmp_path):
    config = configured(models, tmp_path, **options)
    local = config.model_copy(update={"scratch": None, "allow_remote": False})
    here = predict([source], tmp_path / "m.zarr", local).runs[0].as_dict()
    there = predict([source], OUT, config).runs[0].as_dict()
    assert content(bucket) == files(tmp_path / "m.zarr")
    assert there["output"] == OUT
    same = ("classes", "plan_hash", "blocks", "tiles", "blocks_resumed", "pixels", "complete")
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_command_writes_from_a_bucket_to_a_bucket(bucket, cli, flags, models, tmp_path):
    import obstore

    part = PIXELS[:, :150, :170]
    for key, data in files(stores.ome(tmp_path / "a.zarr", part), "a.zarr/").items():
        obstore.put(bucket, key, data)
    path = write_tif(tmp_path / "a.tif", part)
    predict([path], tmp_path / "m.zarr", configured(models, tmp_path, scratch=None))
    done = cli("predict", "s3://bucket/a.zarr", "-o", "s3://bucket/some/b.zarr", *flags, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["output"] == "s3://bucket/some/b.zarr"
    there = zarr.storage.ObjectStore(bucket, read_only=True)
    mask = zarr.open_array(there, path="some/b.zarr/mask", mode="r")
    assert np.array_equal(mask[...], zarr.open_array(tmp_path / "m.zarr/mask")[...])


def test_a_finished_one_is_left_alone_and_another_is_refused(
    bucket, cli, expected, flags, models, source, tmp_path
):
    assert cli("predict", source, "-o", OUT, *flags).code == 0
    before = content(bucket)
    assert before == expected
    again = json.loads(cli("predict", source, "-o", OUT, *flags, "--json").out)
    assert (again["blocks_resumed"], again["tiles_forwarded"]) == (again["blocks"], 0)
    other = cli("predict", source, "-o", OUT, *flags, "--blend", "crop")
    assert other.code == 5
    assert "made by another run (differs in blend)" in other.err
    assert content(bucket) == before
    [said] = estimate([source], OUT, configured(models, tmp_path))
    assert (said["output"], said["finished"]) == (OUT, True)
    assert cli("predict", source, "-o", OUT, *flags, "--blend", "crop", "--overwrite").code == 0
    assert set(content(bucket)) == set(before)
    assert content(bucket)["some/m.zarr/tilenet/plan/0"] != before["some/m.zarr/tilenet/plan/0"]


def test_a_mask_there_is_verified(bucket, cli, models, source, tmp_path):
    import obstore

    assert cli("verify", OUT).code == 2
    assert cli("verify", OUT, "--allow-remote", "--repair").code == 2
    assert cli("verify", OUT, "--allow-remote").code == 3
    predict([source], OUT, configured(models, tmp_path))
    done = json.loads(cli("verify", OUT, "--allow-remote", "--json").out)
    assert (done["ok"], done["files"], done["mask"]) == (True, len(content(bucket)), OUT)
    obstore.put(bucket, "some/m.zarr/mask/1/0", b"rot")
    obstore.put(bucket, "some/m.zarr/other", b"foreign")
    obstore.delete(bucket, "some/m.zarr/mask/.zarray")
    done = cli("verify", OUT, "--allow-remote", "--json")
    assert done.code == 8
    found = {(one["file"], one["what"], one["block"]) for one in json.loads(done.out)["bad"]}
    assert found == {
        ("mask/1/0", "damaged", 0), ("other", "foreign", None), ("mask/.zarray", "missing", None)
    }  # fmt: skip
    obstore.put(bucket, "some/m.zarr/tilenet/seal/0", b"rot")
    assert cli("verify", OUT, "--allow-remote").code == 8


def test_what_is_not_ours_is_not_touched(bucket, cli, flags, source):
    import obstore

    for key, what in {"notes.txt": "something", "zarr.json": "is not tilenet's"}.items():
        obstore.put(bucket, f"some/m.zarr/{key}", b"{}")
        before = content(bucket)
        done = cli("predict", source, "-o", OUT, *flags, "--overwrite")
        assert done.code == 5
        assert what in done.err
        assert content(bucket) == before


@pytest.mark.parametrize(
    ("out", "more", "what"),
    [
        (OUT, [], "to write there, give --allow-remote"),
        ("s3://bucket/m.tif", ["--allow-remote"], "s3://bucket/path/NAME.zarr"),
        ("s3://m.zarr", ["--allow-remote"], "s3://bucket/path/NAME.zarr"),
        ("s3://bucket/../m.zarr", ["--allow-remote"], "s3://bucket/path/NAME.zarr"),
        ("https://host/m.zarr", ["--allow-remote"], "s3://bucket/path/NAME.zarr"),
        (OUT, ["--allow-remote", "--stac"], "the Zarr mask of one raster"),
        (OUT, ["--allow-remote", "--format", "cog"], "the Zarr mask of one raster"),
        ("m.zarr", ["--scratch", "x"], "only for a mask that goes to s3://"),
    ],
)
def test_what_cannot_be_written_elsewhere(out, more, what, cli, source):
    done = cli("predict", source, "-o", out, *more)
    assert done.code == 2
    assert what in done.err


def test_the_input_is_not_overwritten(cli):
    done = cli("predict", OUT, "-o", OUT, "--allow-remote", "--overwrite")
    assert (done.code, "it is the input" in done.err) == (2, True)


def test_several_masks_go_to_disks(cli, source, tmp_path):
    done = cli("predict", source, source, "-o", OUT, "--allow-remote")
    assert (done.code, "of one raster" in done.err) == (2, True)


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("scratch", ["kept", "lost"])
def test_a_killed_run_goes_on(
    scratch, bucket, environment, expected, flags, models, source, tmp_path
):
    import obstore

    def blocks():
        return {one["path"] for one in obstore.list(bucket, f"{RUN}/blocks").collect()}

    line = [sys.executable, "-m", "tilenet", "predict", source, "-o", OUT, *flags]
    with subprocess.Popen(
        list(map(str, line)),
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: len(blocks()) >= 2, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = content(bucket)
    assert f"{RUN}/owner" in left
    assert not {f"some/m.zarr/{name}" for name in (".zmetadata", ".zgroup", ".zattrs")} & set(left)
    assert set(left) - {key for key in left if key.startswith(RUN)} < set(expected)
    config = configured(models, tmp_path)
    if scratch == "lost":
        shutil.rmtree(tmp_path / "scratch")
        with pytest.raises(OutputError, match=r"another run is writing this output, on .* heard"):
            predict([source], OUT, config)
        obstore.delete(bucket, f"{RUN}/owner")
        damaged = min(key for key in left if key.startswith("some/m.zarr/mask/"))
        obstore.put(bucket, damaged, b"rot")
    [run] = predict([source], OUT, config).runs
    assert run.blocks_resumed >= 1
    assert content(bucket) == expected


def test_who_listens_hears_the_end_when_it_is_there(bucket, models, source, tmp_path, monkeypatch):
    """And where the mask lies, not where it is made."""
    heard, finish = [], Mirror.finish

    def sent(self, *arguments):
        assert "finish" not in [event["event"] for event in heard]
        finish(self, *arguments)

    monkeypatch.setattr(Mirror, "finish", sent)
    predict([source], OUT, configured(models, tmp_path), listener=heard.append)
    told = {event["event"]: event["output"] for event in heard if "output" in event}
    assert told == {"start": OUT, "finish": OUT}


def test_what_a_crash_leaves_at_the_end(bucket, expected, models, source, tmp_path):
    import obstore

    # All blocks are made and sent, and the mask is whole in the scratch folder; then nothing.
    config = configured(models, tmp_path)
    place = RemoteOutput(RemoteName(OUT), config.scratch)
    here = config.model_copy(update={"scratch": None})
    request = request_for(here, None)
    plan = plan_of(Job(source, place.local), request)
    with place.owned(plan, overwrite=False) as mirror:
        make_one(
            find_inputs([source], place.local)[0],
            place.local,
            place.place,
            request,
            Tracker(print, print),
            Clock(),
            copy=mirror,
        )
    assert place.local.is_dir()
    left = content(bucket)
    [run] = predict([source], OUT, config).runs
    assert (run.tiles_forwarded, run.blocks_resumed) == (0, run.blocks)
    assert content(bucket) == expected
    # The root is there, but the run's objects and the scratch folder are not removed yet.
    for key, data in left.items():
        obstore.put(bucket, key, data)
    predict([source], OUT, config)
    assert content(bucket) == expected
    # A clearing, ordered by --overwrite, that was cut short goes on; without it, it is done.
    for key in expected:
        if key.startswith("some/m.zarr/.z"):
            obstore.delete(bucket, key)
    obstore.put(bucket, f"{RUN}/clearing", b"")
    obstore.put(bucket, "some/m.zarr/old", b"of another run")
    predict([source], OUT, config)
    assert content(bucket) == expected


def test_an_unfinished_run_of_another_plan(bucket, expected, models, source, tmp_path):
    config = configured(models, tmp_path)
    stop_after(3, source, config)
    shutil.rmtree(tmp_path / "scratch")
    other = config.model_copy(update={"threshold": 0.25})
    with pytest.raises(OutputError, match=r"unfinished run of this output .differs in thr"):
        predict([source], OUT, other)
    predict([source], OUT, other.model_copy(update={"overwrite": True}))
    assert set(content(bucket)) == set(expected)
    assert content(bucket) != expected
    # What another cut has left is taken up as it was cut.
    predict_partly = config.model_copy(update={"overwrite": True})
    stop_after(3, source, predict_partly)
    shutil.rmtree(tmp_path / "scratch")
    [run] = predict([source], OUT, config.model_copy(update={"block": 256})).runs
    assert run.blocks_resumed >= 1
    assert content(bucket) == expected


class Stop(Exception):
    pass


def stop_after(times, source, config):
    """Run until so many steps of progress were made, and end it as an error does."""
    left = iter(range(times))

    def progress(done, _total):
        if done and next(left, None) is None:
            raise Stop

    with pytest.raises(Stop):
        predict([source], OUT, config, progress)


def test_a_store_that_stops_answering(bucket, expected, models, source, tmp_path, monkeypatch):
    from tilenet.sources import bucket as sources_bucket

    monkeypatch.setattr(sources_bucket, "_RETRIES", 1)
    server, address = serve()
    connect(address, monkeypatch)
    stopped = False

    def progress(done, _total):
        nonlocal stopped
        if done and not stopped:
            server.stop()
            stopped = True

    with pytest.raises(ResourceError, match="does not answer") as error:
        predict([source], OUT, configured(models, tmp_path), progress)
    assert (error.value.code, error.value.where) == (6, OUT)
    server, address = serve()  # all of moto's servers here serve the same objects
    bucket = connect(address, monkeypatch)
    [run] = predict([source], OUT, configured(models, tmp_path)).runs
    assert run.blocks_resumed >= 1
    kept = content(bucket)
    server.stop()
    assert kept == expected


def objects():
    return Objects(RemoteName("s3://bucket/some"), OUT)


def lease(token, interval=0.2):
    return Lease(objects(), "run/owner", token, "plan", OUT, interval)


def test_one_owner_at_a_time(bucket):
    with lease("a") as first:
        time.sleep(0.5)
        first.check()
        with pytest.raises(OutputError, match=r"is writing this output, on \S+; it was heard"):
            lease("b").__enter__()
        first.check()
    assert content(bucket) == {}
    with lease("b") as second:
        second.check()
    assert content(bucket) == {}


def test_a_dead_owner_is_taken_over_and_finds_out(bucket):
    first = lease("a")
    first.__enter__()
    first._stop.set()  # as if its machine slept
    first._thread.join()
    end = time.monotonic() + 10
    while True:
        try:
            second = lease("b").__enter__()
            break
        except OutputError:
            assert time.monotonic() < end
            time.sleep(0.2)
    with pytest.raises(OutputError, match="another run has taken over"):
        first.check()
    first.__exit__(None, None, None)
    second.check()
    second.__exit__(None, None, None)
    assert content(bucket) == {}


def test_the_same_scratch_takes_over_at_once(bucket):
    first = lease("a", 60.0).__enter__()
    with lease("a", 60.0) as second:
        second.check()
        first._renewed -= 1000
        with pytest.raises(OutputError, match="taken over"):
            first.check()
    first.__exit__(None, None, None)


def test_a_store_without_conditions_is_refused(monkeypatch):
    class Careless(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(b"")

        def do_POST(self):  # how objects are deleted
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(b"<DeleteResult><Deleted><Key>k</Key></Deleted></DeleteResult>")

        def answer(self, body):
            self.send_response(200)
            self.send_header("ETag", '"same"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        with pytest.raises(OutputError, match="does not heed If-None-Match"):
            lease("a").__enter__()
        server.shutdown()


def test_a_run_stops_where_it_is_taken_over(bucket, models, source, tmp_path):
    import obstore

    def progress(done, _total):
        if done:
            obstore.put(bucket, f"{RUN}/owner", b'{"nonce": "x"}')

    place = RemoteOutput(RemoteName(OUT), tmp_path / "scratch", interval=0.05)
    found = find_inputs([source], tmp_path / "x")
    with pytest.raises(OutputError, match="taken over"):
        predict_remote(found, place, configured(models, tmp_path), Tracker(progress, print))
    left = content(bucket)
    assert f"{RUN}/owner" in left
    assert "some/m.zarr/.zgroup" not in left


def test_the_extra_is_named(monkeypatch, tmp_path, models, source):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match="need the extra cloud"):
        predict([source], OUT, configured(models, tmp_path))


def test_the_tile_of_a_finished_mask_is_known(bucket, models, source, tmp_path):
    config = configured(models, tmp_path)
    predict([source], OUT, config)
    place = RemoteOutput(RemoteName(OUT), config.scratch)
    own = find_model(str(models / "conv.onnx"), None, {})
    other = find_model(str(models / "pointwise.onnx"), None, {})
    assert place.tile(own, usual=64) == 64
    assert place.tile(own, usual=128) is None  # it was asked for
    assert place.tile(other, usual=64) is None
