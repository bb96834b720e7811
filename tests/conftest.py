"""Fixtures: a cache of our own, tiny networks, and the command in this process or in another."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass

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
    """Keep converted graphs out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
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
