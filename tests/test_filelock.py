"""The kernel's locks, and disks that have none."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rasters import picture, write_image

from tilenet import filelock
from tilenet.engine.folderlock import folder_locked
from tilenet.engine.runfolder import locked, part_locked, set_up_alone
from tilenet.errors import OutputError
from tilenet.part import Part
from tilenet.training import folder as training

# rasterio says so of every plain image that is opened; that is what these are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning"
)

LACKING = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def refusing(monkeypatch):
    """Let the kernel refuse locks; no disk of this machine's can be made to."""

    def refuse(number):
        def flock(_fd, _how):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.fixture
def opened(tmp_path):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as other:
        yield SimpleNamespace(path=tmp_path, one=one.fileno(), other=other.fileno())


def test_a_lock_is_had_by_one_or_shared(opened):
    assert filelock.take(opened.one, fcntl.LOCK_EX, opened.path)
    assert not filelock.take(opened.other, fcntl.LOCK_SH, opened.path)
    filelock.wait_for(opened.one, fcntl.LOCK_SH, opened.path)
    assert filelock.take(opened.other, fcntl.LOCK_SH, opened.path)
    assert not filelock.take(opened.other, fcntl.LOCK_EX, opened.path)


def test_turns(tmp_path):
    inside, seen = [], []

    def write():
        for _ in range(200):
            with filelock.turn(tmp_path):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == 800 * [1]


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_what_says_that_somebody_has_it(opened, refusing, number):
    refusing(number)
    assert not filelock.take(opened.one, fcntl.LOCK_EX, opened.path)


def test_what_else_goes_wrong_is_said_as_it_is(opened, refusing):
    refusing(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        filelock.take(opened.one, fcntl.LOCK_EX, opened.path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(opened.path))


def handles():
    return len(list(Path("/proc/self/fd").iterdir()))


OWNERS = {
    "run": locked,
    "last part": lambda folder: locked(folder, last_part=True),
    "part": lambda folder: part_locked(folder, Part(1, 2)),
    "setting up": set_up_alone,
    "folder of masks": folder_locked,
    "parts of a folder": lambda folder: folder_locked(folder, shared=True),
    "turn": filelock.turn,
    "training": training.locked,
}


@pytest.mark.parametrize("number", LACKING)
@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_a_disk_without_locks(tmp_path, refusing, owner, number):
    before = handles()
    refusing(number)
    with pytest.raises(OutputError) as caught, owner(tmp_path):
        pass
    assert caught.value.what == f"the disk has no file locks ({os.strerror(number)})"
    assert caught.value.where == str(tmp_path)
    assert "Lustre: -o flock" in caught.value.do
    assert handles() == before


@pytest.mark.parametrize("out", ["x.zarr", "x.png", "x.tif", "masks"])
def test_a_run_on_a_disk_without_locks(cli, models, tmp_path, refusing, out):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", picture(40, 50))
    source = tmp_path / "in" if out == "masks" else tmp_path / "in" / "a.png"
    refusing(errno.ENOSYS)
    done = cli("predict", source, "--out", tmp_path / out, "--model", models / "conv.onnx")
    assert done.code == 5
    [line] = [line for line in done.err.splitlines() if "error" in line]
    assert line.startswith("tilenet: error: the disk has no file locks (Function not implemented)")
    assert "another run" not in done.err
