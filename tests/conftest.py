"""Fixtures: a cache of our own, tiny networks, and the command in this process or in another."""

import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import networks
import pytest


@dataclass(frozen=True)
class Done:
    """What the command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep converted graphs and compiled kernels out of the user's caches."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield folder


@pytest.fixture(scope="session")
def environment(cache):
    """Return the environment of a subprocess: two threads, our cache, warnings as by default."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="session")
def command(environment):
    """Run `tilenet` as another process."""

    def call(*arguments, **options):
        line = [sys.executable, "-m", "tilenet", *map(str, arguments)]
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
            **options,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def cli(capsys):
    """Run the command line in this process; its logging does not stay."""
    from tilenet.cli import run

    logger = logging.getLogger("tilenet")
    before = logger.propagate, logger.level

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    yield call
    logger.propagate, level = before
    logger.setLevel(level)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return the folder of the tiny ONNX networks."""
    folder = tmp_path_factory.mktemp("models")
    networks.identity(folder / "identity.onnx")
    networks.constant(folder / "constant.onnx", [0.25, 0.5, 0.75])
    networks.pointwise(folder / "pointwise.onnx")
    networks.conv(folder / "conv.onnx")
    networks.positional(folder / "positional.onnx")
    networks.positional(folder / "positional8.onnx", channels=8)
    networks.pointwise(folder / "fixed.onnx", side=64)
    networks.broken(folder / "broken.onnx")
    return folder


@pytest.fixture(scope="session")
def unet(tmp_path_factory):
    """Return the folder of a seeded ResNet-18 U-Net."""
    return networks.unet(tmp_path_factory.mktemp("unet") / "resnet18")


class _Asked:
    """What was asked of the server."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        return iter(self.path.read_text().split() if self.path.exists() else ())


@pytest.fixture
def served(tmp_path):
    """Return a folder, its address, and what was asked of it."""
    (tmp_path / "www").mkdir()
    line = [sys.executable, str(Path(__file__).with_name("ranges.py")), str(tmp_path / "www")]
    server = subprocess.Popen([*line, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    with server:
        port = int(server.stdout.readline())
        yield tmp_path / "www", f"http://127.0.0.1:{port}", _Asked(tmp_path / "log")
        server.kill()


@pytest.fixture(scope="session")
def s3_server():
    """Return the address of an S3 server on the loopback interface.

    It is a process of its own: rasterio keeps the interpreter to itself while it opens a file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(line, **quiet) as process:
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_for(port, process):
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("moto does not start")
