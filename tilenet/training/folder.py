"""The folder of a run: whose it is, whether it is finished, which configuration it began with."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tilenet import durable, filelock
from tilenet.errors import OutputError
from tilenet.training.checkpoint import sweep
from tilenet.training.config import TrainConfig, dump_toml, load_train_config

__all__ = ["CACHE", "begin", "check_free", "locked", "resumed_config"]

CACHE = ".tilenet-cache"
"""Folder in a run's folder for what is made again at will."""

_RECIPE, _LOCK = "train.toml", ".tilenet-lock"
_RESULTS = (
    "config.json", "tilenet.json", "model.safetensors", "checkpoints", "validation", "tensorboard",
    "mlruns", "mlflow.db", "metrics.csv", "metrics.json", "report.html",
)  # fmt: skip


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be, against a second process.

    Where no run has begun in it, nothing of ours is left in it.

    Raises
    ------
    OutputError
        It is no folder, another process works on it, or the disk has no locks.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        fd = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError("not a folder", out, "choose another --out") from error
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        if not filelock.take(fd, fcntl.LOCK_EX, out):
            raise OutputError("another run works on it", out, "wait, or choose another --out")
        stack.callback(_tidy, out)
        sweep(out)
        yield


def _tidy(out: Path) -> None:
    """Remove what can be made again; where no run has begun, all that is ours."""
    shutil.rmtree(out / CACHE, ignore_errors=True)
    if not (out / _RECIPE).is_file():
        (out / _LOCK).unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()


def resumed_config(out: Path, config: TrainConfig, given: frozenset[str]) -> TrainConfig | None:
    """Return the configuration of the run that is resumed; None if none has begun.

    Parameters
    ----------
    out : Path
        The folder.
    config : TrainConfig
        What is asked for, resolved.
    given : frozenset of str
        Keys that the user gave; they must agree with the stored ones.

    Raises
    ------
    OutputError
        They do not.
    """
    path = out / _RECIPE
    if not path.is_file():
        return None
    known = load_train_config(path, {})
    asked = given if config.steps else given - {"steps"}  # none follow the data: stored as found
    differing = [key for key in sorted(asked) if getattr(known, key) != getattr(config, key)]
    if differing:
        keys = ", ".join("--" + key.replace("_", "-") for key in differing)
        raise OutputError(f"the run there has another {keys}", out, "leave these out to resume")
    return known


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless a new run may begin in `out`."""
    known = (out / _RECIPE).is_file()
    others = [p.name for p in out.iterdir() if p.name not in (CACHE, _LOCK)]
    if not known and others:
        raise OutputError(
            f"the folder holds {others[0]}, not of a run", out, "choose another --out"
        )
    if known and not overwrite:
        raise OutputError(
            "a run is there already", out, "--resume goes on, --overwrite replaces it"
        )


def begin(out: Path, config: TrainConfig) -> None:
    """Clear `out` of an earlier run and write the recipe of this one over the earlier one's."""
    for name in _RESULTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "checkpoints").mkdir()
    durable.write(out / _RECIPE, dump_toml(config).encode())
