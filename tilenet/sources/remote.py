"""Names of rasters that lie elsewhere: object stores and web servers. Nothing is fetched here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tilenet.errors import InputError, UsageError
from tilenet.strangers import is_url

__all__ = ["RemoteName", "given", "is_remote", "named", "require_permission"]

_REMOTE = re.compile(r"(s3|gs|az|https?)://.|/vsi[a-z0-9_]+/", re.IGNORECASE)
"""URLs, and GDAL's virtual file systems, which wrap them."""


def is_remote(name: object) -> bool:
    """Return whether a name is one of an object store, a web server or a virtual file system.

    A `Path` never is: it would have lost one of the slashes. Folders called ``/vsi…`` are GDAL's.
    """
    return not isinstance(name, Path) and _REMOTE.match(str(name)) is not None


@dataclass(frozen=True, slots=True)
class RemoteName:
    """A name that is no path of this machine's; has what is asked of a `Path`.

    Parameters
    ----------
    url : str
        As it was given.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """The part before ``://`` in lower case; "" for one of GDAL's own names."""
        return self.url.partition("://")[0].lower() if "://" in self.url[:9] else ""

    @property
    def bucket(self) -> str:
        """Bucket or host."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """What follows the bucket, without slashes around it or a query."""
        return self.url.partition("://")[2].partition("/")[2].partition("?")[0].strip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Its ending."""
        return PurePosixPath(self.name).suffix

    def absolute(self) -> RemoteName:
        """Return the same: it does not depend on where one stands."""
        return self


def named(name: str | Path | RemoteName) -> Path | RemoteName:
    """Return what a name stands for."""
    if isinstance(name, str):
        return RemoteName(name) if is_remote(name) else Path(name)
    return name


def given(name: str | Path | RemoteName, *, written: bool = False) -> Path | RemoteName:
    """Return what a name given by the user stands for.

    Parameters
    ----------
    name : str, Path or RemoteName
        As it was given.
    written : bool
        It is that of an output.

    Raises
    ------
    UsageError
        It is empty, for which `Path` would take the current folder; or an output's, and a URL of no
        kind that is known, for which it would take a folder that is called like the scheme.
    InputError
        It is such a URL of an input.
    """
    if isinstance(name, str) and not name.strip():
        raise UsageError("an empty name", repr(name), "name a file or a folder")
    if isinstance(name, str) and is_url(name) and not is_remote(name):
        what = f"nothing is known of {name.partition('://')[0]}://"
        kind = UsageError if written else InputError
        raise kind(what, name, "give a path, or s3, gs, az, http or https")
    return named(name)


def require_permission(name: object, allowed: bool) -> None:
    """Raise UsageError for a name that lies elsewhere unless the user allows it."""
    if not allowed:
        raise UsageError("lies on another machine", name, "to read it there, give --allow-remote")
