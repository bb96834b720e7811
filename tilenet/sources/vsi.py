"""Rasters that lie elsewhere, as GDAL names and reads them. Used only where the user allows it."""

from __future__ import annotations

import hashlib
from http.client import HTTPException
from typing import Any

from tilenet.errors import InputError, ResourceError, UsageError
from tilenet.sources.bucket import endpoint, is_anonymous, object_mark
from tilenet.sources.fetch import ask
from tilenet.sources.remote import RemoteName, is_remote

__all__ = ["checked_name", "network_settings", "remote_fingerprint", "vsi_name"]

_SETTINGS: dict[str, Any] = {
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "VSI_CACHE": True,
}

_SYSTEMS = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}
_CURL = ("/vsicurl/", "")
_HEAD = 65536


def network_settings() -> dict[str, Any]:
    """Return GDAL's settings for reading over a network.

    Who we are it takes from the environment itself; where a server is, it calls by names of its
    own.
    """
    told: dict[str, Any] = {"AWS_NO_SIGN_REQUEST": "YES"} if is_anonymous() else {}
    scheme, _, host = endpoint().rstrip("/").partition("://")
    if host:
        told |= {
            "AWS_S3_ENDPOINT": host, "AWS_HTTPS": "NO" if scheme == "http" else "YES",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }  # fmt: skip
    return _SETTINGS | told


def vsi_name(name: str) -> str:
    """Return GDAL's name of a file that lies elsewhere; a path of this machine's as it is."""
    if not is_remote(name) or name.startswith("/vsi"):
        return name
    place = RemoteName(name)
    if place.scheme in _SYSTEMS:
        return _SYSTEMS[place.scheme] + name.partition("://")[2]
    return f"/vsicurl/{name}"


def checked_name(name: RemoteName) -> str:
    """Return the name as a URL.

    Raises
    ------
    UsageError
        It holds a password, which would stand in plans and logs.
    InputError
        It is of one of GDAL's other systems, of which nobody could tell whether a file changed.
    """
    for system, scheme in [*((path, f"{key}://") for key, path in _SYSTEMS.items()), _CURL]:
        if name.url.startswith(system):
            name = RemoteName(scheme + name.url.removeprefix(system))
    if not name.scheme:
        raise InputError(
            "GDAL's name of no server", name.url, "give s3://, gs://, az:// or https://"
        )
    if "@" in name.bucket:
        raise UsageError(
            "a name with a password in it", name.url.rpartition("@")[2],
            "give GDAL_HTTP_USERPWD in the environment",
        )  # fmt: skip
    return name.url


def remote_fingerprint(name: str) -> str:
    """Return a hash of a file's size, its marks (ETag, Last-Modified) and its first 64 KiB.

    Raises
    ------
    InputError
        There is no such file, or it is not for us.
    ResourceError
        The server does not answer.
    """
    place = RemoteName(name)
    if place.scheme not in ("http", "https"):
        # GDAL's other systems sign what they ask; it does not hand out their marks.
        return hashlib.sha256(object_mark(place).encode()).hexdigest()
    with ask(name, {"Range": f"bytes=0-{_HEAD - 1}"}) as answer:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        marks = [size or answer.headers.get("Content-Length", "")]
        marks += [answer.headers.get(key, "") for key in ("ETag", "Last-Modified")]
        try:
            data = answer.read(_HEAD)
        except (OSError, HTTPException) as error:
            raise ResourceError("the server does not answer", name, "a rerun resumes") from error
    text = "\0".join([place.name, *marks]).encode()
    return hashlib.sha256(text + b"\0" + data).hexdigest()
