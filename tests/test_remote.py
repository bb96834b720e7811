"""Zarr stores in an object store: a server on this machine that speaks S3."""

import json
import pickle

import networks
import numpy as np
import obstore
import pytest
import stores
import zarr
from buckets import connect_empty
from rasters import picture, write_tif

from tilenet.api import predict
from tilenet.config import PredictConfig
from tilenet.errors import InputError, ResourceError, UsageError
from tilenet.geometry import Window
from tilenet.sources import RemoteName, View, find_inputs, named, open_raster
from tilenet.sources import bucket as sources_bucket

PIXELS = picture(150, 170, seed=4)
ALLOWED = View(allow_remote=True)


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """Return an empty bucket as obstore sees it; the environment leads to it."""
    return connect_empty(s3_server, monkeypatch)


def upload(bucket, folder, prefix=""):
    """Put every file of a folder into the bucket."""
    import obstore

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(bucket, f"{prefix}{path.relative_to(folder)}", path.read_bytes())


def read_all(name, view=ALLOWED):
    raster = open_raster(name, view)
    window = Window(0, 0, raster.info.height, raster.info.width)
    return raster.read(window, np.zeros(len(raster.info.bands)))[0]


@pytest.mark.parametrize("name", ["s3://bucket/a.tif", "/vsis3/bucket/a.tif"])
def test_a_cog_in_a_bucket_gives_the_mask_of_the_one_on_disk(bucket, tmp_path, cli, name):
    model = networks.pointwise(tmp_path / "m.onnx")
    cog = write_tif(tmp_path / "a.tif", PIXELS, georeferenced=True, levels=(2,))
    obstore.put(bucket, "a.tif", cog.read_bytes())
    options = ["--model", model, "--tile", "64", "--block", "64", "--chunk", "64"]
    assert cli("predict", cog, "--out", tmp_path / "disk.zarr", *options).code == 0
    far = ["predict", name, "--out", tmp_path / "far.zarr", *options]
    refused = cli(*far)
    assert refused.code == 2
    assert "--allow-remote" in refused.err
    done = cli(*far, "--allow-remote", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["input"] == "s3://bucket/a.tif"
    masks = [zarr.open_array(tmp_path / f"{n}.zarr" / "mask")[:] for n in ("disk", "far")]
    assert np.array_equal(*masks)
    assert cli(*far, "--allow-remote").code == 0
    obstore.put(bucket, "a.tif", cog.read_bytes() + b" ")
    changed = cli(*far, "--allow-remote")
    assert changed.code == 5
    assert "input" in changed.err


def test_names_of_what_lies_elsewhere():
    name = named("s3://bucket/a//b.ome.zarr")
    assert isinstance(name, RemoteName)
    assert (name.scheme, name.bucket, name.key) == ("s3", "bucket", "a//b.ome.zarr")
    assert (name.name, str(name), name.absolute()) == ("b.ome.zarr", name.url, name)
    assert named("https://host/a.tif?key=b//c").suffix == ".tif"
    assert isinstance(named("/vsicurl/https://host/a.tif"), RemoteName)
    for local in ("a.tif", "s3/a.tif", "s3:a", "C:/a", "/vsi", "x/vsicurl/a"):
        assert not isinstance(named(local), RemoteName)
    [found] = find_inputs([name], None)
    assert str(found.stem) == "b"


@pytest.mark.parametrize("name", ["s3://b/a.zarr", "https://host/a.zarr", "/vsicurl/https://h/a"])
def test_the_network_needs_permission(name, tmp_path, cli, models):
    with pytest.raises(UsageError, match="--allow-remote"):
        open_raster(named(name))
    done = cli("predict", name, "-o", tmp_path / "m.zarr", "-m", models / "identity.onnx")
    assert done.code == 2
    assert f"{name}; to read it there, give --allow-remote" in done.err


def test_a_mask_is_the_same_from_a_bucket(bucket, tmp_path, models, cli):
    model = models / "conv.onnx"
    config = PredictConfig(model=str(model), tile=64, block=128, chunk=64)
    upload(bucket, stores.ome(tmp_path / "a.zarr", PIXELS, levels=2), "some/a.zarr/")
    upload(bucket, stores.ome(tmp_path / "b.zarr", PIXELS, zarr_format=3, shards=(3, 64, 64)), "b/")
    write_tif(tmp_path / "c.tif", PIXELS)
    predict([tmp_path / "c.tif"], tmp_path / "c.zarr", config)
    expected = zarr.open_array(tmp_path / "c.zarr/mask")[...]
    flags = ["-m", model, "--tile", 64, "--block", 128, "--chunk", 64, "--allow-remote"]
    for name in ("some/a.zarr", "b"):
        out = tmp_path / f"{name[-1]}.mask.zarr"
        done = cli("predict", f"s3://bucket/{name}", "-o", out, *flags, "--json")
        assert done.code == 0, done.err
        assert np.array_equal(zarr.open_array(out / "mask")[...], expected)
        assert json.loads(done.out)["input"] == f"s3://bucket/{name}"
        assert cli("predict", f"s3://bucket/{name}", "-o", out, *flags).code == 0
        assert cli("verify", out).code == 0
    many = cli("predict", "s3://bucket/some/a.zarr", "s3://bucket/b", "s3://bucket/none",
               "-o", tmp_path / "all", *flags)  # fmt: skip
    assert many.code == 7
    assert "no such object; s3://bucket/none; check the name" in many.err
    assert len(list((tmp_path / "all").glob("[ab].png"))) == 2
    said = json.loads(cli("info", "s3://bucket/b", "--allow-remote", "--json").out)
    assert (said["driver"], said["bands"], said["native_block"]) == ("zarr", 3, [32, 32])


def test_a_worker_opens_it_again(bucket, tmp_path):
    upload(bucket, stores.ome(tmp_path / "a.zarr", PIXELS), "a.zarr/")
    raster = pickle.loads(pickle.dumps(open_raster("s3://bucket/a.zarr", ALLOWED)))
    assert np.array_equal(raster.read(Window(0, 0, 150, 170), np.zeros(3))[0], PIXELS)


def test_a_variable_is_not_chosen_in_vain(bucket, tmp_path):
    cog = write_tif(tmp_path / "a.tif", PIXELS, georeferenced=True)
    obstore.put(bucket, "a.tif", cog.read_bytes())
    with pytest.raises(InputError, match="no variables to choose from"):
        open_raster(named("s3://bucket/a.tif"), View(variable="image", allow_remote=True))


def test_variables_are_found_by_listing(bucket, tmp_path):
    found = stores.dataset(PIXELS, clouds=(("y", "x"), PIXELS[0]))
    upload(bucket, stores.write(tmp_path / "a.zarr", found), "a.zarr/")
    with pytest.raises(InputError, match=r"2 variables \(clouds, image\)"):
        open_raster("s3://bucket/a.zarr", ALLOWED)
    view = View(variable="image", allow_remote=True)
    assert np.array_equal(read_all("s3://bucket/a.zarr", view), PIXELS)


def test_a_changed_object_is_another_input(bucket, tmp_path):
    path = stores.ome(tmp_path / "a.zarr", PIXELS)
    upload(bucket, path, "a.zarr/")
    before = open_raster("s3://bucket/a.zarr", ALLOWED).info.fingerprint
    assert open_raster("s3://bucket/a.zarr", ALLOWED).info.fingerprint == before
    zarr.open_array(path / "0", mode="r+")[0, 0, 0] ^= 255
    upload(bucket, path, "a.zarr/")
    assert open_raster("s3://bucket/a.zarr", ALLOWED).info.fingerprint != before


def test_what_is_missing_there_is_fill_and_what_is_broken_is_listed(bucket, tmp_path):
    import obstore

    path = stores.ome(tmp_path / "a.zarr", PIXELS, chunks=(3, 50, 50), fill_value=7)
    upload(bucket, path, "a.zarr/")
    obstore.delete(bucket, "a.zarr/0/0.1.1")
    obstore.put(bucket, "a.zarr/0/0.2.0", b"\0" * 100)
    damaged = []
    raster = open_raster("s3://bucket/a.zarr", ALLOWED)
    pixels, _ = raster.read(Window(0, 0, 150, 170), np.zeros(3), damaged)
    assert damaged == [Window(100, 0, 50, 50)]
    assert (pixels[:, 50:100, 50:100] == 7).all()


def test_a_server_that_does_not_answer_is_no_damage(bucket, tmp_path, monkeypatch):
    upload(bucket, stores.ome(tmp_path / "a.zarr", PIXELS), "a.zarr/")
    raster = open_raster("s3://bucket/a.zarr", ALLOWED)
    window, damaged = Window(0, 0, 150, 170), []
    assert np.array_equal(raster.read(window, np.zeros(3))[0], PIXELS)
    monkeypatch.setattr(sources_bucket, "_RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    raster._idle[0]._keys.objects = sources_bucket.open_objects(RemoteName("s3://bucket/a.zarr"))
    with pytest.raises(ResourceError, match="does not answer"):
        raster.read(window, np.zeros(3), damaged)
    assert damaged == []
    with pytest.raises(ResourceError, match="does not answer"):
        open_raster("s3://bucket/a.zarr", ALLOWED)
