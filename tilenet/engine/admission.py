"""What a worker shows before it works for a run: that it sees what the run sees.

The run leaves a token in its folder, with the versions that decide the bytes, and, for workers on
other machines, a copy of the network. A worker looks for them when it first meets the run, however
late it joined.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tilenet import __version__, durable
from tilenet.engine.runfolder import LOCK, locked, remove_run_folder
from tilenet.engine.worker import own_threads
from tilenet.errors import InputError, ModelError, OutputError, UnfitError
from tilenet.models.session import Setup, choose
from tilenet.models.sizes import Sizes, Wanted, choose_sizes
from tilenet.models.store import ModelFiles, external_files, identified
from tilenet.sources import Area, Raster, RasterInfo, RemoteName, named, open_raster
from tilenet.strangers import exists
from tilenet.watchdog import watched

__all__ = [
    "MODELS", "Admission", "Versions", "admitting", "choose_here", "meeting_place", "revoke",
    "versions_here",
]  # fmt: skip

Versions = dict[str, str]
"""Package: version."""

MODELS = "models"
"""Folder in a run folder for copies of networks."""

_PACKAGES = ("numpy", "rasterio")  # beside tilenet, and the backend of those that run it
_PATIENCE = 3.0  # seconds for which a shared disk may not show what was just written
_SCENES = 256  # of a mosaic that a worker looks for


@cache
def _version(package: str) -> str:
    if package == "tilenet":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def versions_here() -> Versions:
    """Return the versions of what decides the bytes, in this process, but for the backend's."""
    return {package: _version(package) for package in ("tilenet", *_PACKAGES)}


def choose_here(files: ModelFiles, wanted: Wanted) -> tuple[Sizes, Versions]:
    """Choose what a network runs on, on a worker; return it and its library's version."""
    try:
        sizes = choose_sizes(files, wanted, threads=own_threads())
    except ModelError as error:
        raise ModelError(f"a worker says: {error.what}", error.where, error.do) from error
    return sizes, {sizes.setup.library: _version(sizes.setup.library)}


@contextmanager
def admitting(
    folder: Path, files: ModelFiles, versions: Versions, *, elsewhere: bool
) -> Iterator[str]:
    """Leave in a folder what workers look for; yields the token.

    Parameters
    ----------
    folder : Path
        The run folder.
    files : ModelFiles
        The network.
    versions : dict
        What workers must have, too; {} if all run the same installation.
    elsewhere : bool
        Whether they may not see the network where it lies.
    """
    token = secrets.token_hex(8)
    if elsewhere:
        _copy_model(files, folder)
    document = {"elsewhere": elsewhere, "versions": versions}
    durable.write(folder / _name(token), json.dumps(document).encode())
    try:
        yield token
    finally:
        with suppress(OSError):
            (folder / _name(token)).unlink()


def _name(token: str) -> str:
    return f"{token}.run"


def revoke(folder: Path) -> None:
    """Take back the tokens of runs that were killed: their tasks must not write here any more."""
    for path in folder.glob(_name("*")):
        path.unlink(missing_ok=True)


def _model_path(files: ModelFiles, folder: Path) -> Path:
    return folder / MODELS / f"{files.sha256}{files.weights.suffix}"


def _is_copied(files: ModelFiles, path: Path) -> bool:
    try:
        return identified(replace(files, weights=path)).sha256 == files.sha256
    except (FileNotFoundError, ModelError):
        return False


def _copy_model(files: ModelFiles, folder: Path) -> None:
    path = _model_path(files, folder)
    # One that is there may be from before a power cut, or have rotted: workers would refuse it.
    if not _is_copied(files, path):
        path.parent.mkdir(exist_ok=True)
        for other in external_files(files.weights) if files.kind == "onnx" else ():
            durable.copy(other, path.with_name(other.name))
        durable.copy(files.weights, path)


@dataclass(frozen=True)
class Admission:
    """What a worker has shown that it sees.

    Parameters
    ----------
    folder : Path
        The run folder.
    token : str
        The run's.
    elsewhere : bool
        Whether workers may be on other machines.
    versions : dict
        What the run asks for.
    """

    folder: Path
    token: str
    elsewhere: bool
    versions: Versions

    def network(self, files: ModelFiles, setup: Setup) -> tuple[ModelFiles, Setup]:
        """Return a run's network where this process finds it, and how it runs it.

        That is the copy in the run folder, if there is one; the threads are the worker's own.

        Raises
        ------
        UnfitError
            It is another network by now, or this machine has no such device, arithmetic or version.
        """
        path = _model_path(files, self.folder)
        if path.exists():
            copy = identified(replace(files, weights=path))
            if copy.sha256 != files.sha256:
                raise UnfitError("sees another network than the run", path, "run again")
            files = copy
        threads = own_threads()
        if threads is None:  # one of our own processes
            return files, setup
        try:
            choose(files, device=setup.device, backend=setup.backend, precision=setup.precision)
        except ModelError as error:
            raise UnfitError(
                f"cannot run the network on {setup.device}, {setup.backend} {setup.precision}: "
                f"{error.what}",
                "",
                "end it, or start those that can with --resources GPU=1",
            ) from error
        return files, replace(setup, threads=threads)

    def check_current(self) -> None:
        """Raise OutputError if the run folder holds another run by now.

        Where a command is killed, what its cluster has under way goes on for a while.
        """
        if not (self.folder / _name(self.token)).exists():
            raise OutputError("another run has begun here", self.folder, "leave it to that one")

    def check_versions(self, *packages: str) -> None:
        """Raise UnfitError unless packages are what the run asks for, if it does."""
        for package in packages:
            found, needed = _version(package), self.versions.get(package)
            if needed not in (None, found):
                raise UnfitError(
                    f"has {package} {found}, the run {needed}", "", "install the same on all"
                )

    def check_raster(self, raster: RasterInfo, area: Area | None, read_timeout: float) -> None:
        """Show that this process sees the input, and the same one; of a mosaic, some scenes.

        And the mask, if there is one outside of which nothing is done.

        Raises
        ------
        UnfitError
            It does not.
        """
        if not self.elsewhere:
            return
        do = "let all workers share that disk"
        try:
            if area is not None:
                area.check()
        except InputError as error:
            raise UnfitError(f"does not see the run's: {error.what}", error.where, do) from error
        if raster.scenes:
            step = -(-len(raster.scenes) // _SCENES)
            for name, _ in raster.scenes[::step]:
                if not (isinstance(named(name), RemoteName) or exists(name)):
                    raise UnfitError("does not see the input", name, do)
            return
        try:
            with watched(raster.path, read_timeout):
                found: Raster = open_raster(raster.path, raster.view)
        except InputError as error:
            raise UnfitError(f"does not see the input: {error.what}", error.where, do) from error
        if found.info.fingerprint != raster.fingerprint:
            raise UnfitError("sees another input than the run", raster.path, do)

    @classmethod
    def check_in(cls, folder: Path, token: str) -> Admission:
        """Show that this process sees the run folder and is of the run's version.

        Raises
        ------
        UnfitError
            It does not, or is not.
        """
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                admission = cls(folder, token, **json.loads((folder / _name(token)).read_bytes()))
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise UnfitError(
                        "does not see the run folder", folder, "let all workers share that disk"
                    ) from error
                time.sleep(0.1)
        admission.check_versions("tilenet", *_PACKAGES)
        return admission


@contextmanager
def meeting_place(out: Path) -> Iterator[Path]:
    """Own a folder in an output folder, for workers to meet in; it goes with the run."""
    for left in out.glob(f".tilenet-*/{LOCK}"):  # of runs that were killed
        with suppress(OutputError, OSError), locked(left.parent):
            remove_run_folder(left.parent)
    folder = out / f".tilenet-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    with locked(folder):
        try:
            yield folder
        finally:
            remove_run_folder(folder)
