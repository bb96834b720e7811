"""Rasters that lie elsewhere, as GDAL names and reads them. Used only where the user allows it."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from typing import Any

from tilenet.errors import InputError, ResourceError, UsageError
from tilenet.sources.remote import RemoteName, is_remote

__all__ = ["SETTINGS", "checked_name", "remote_fingerprint", "vsi_name"]

SETTINGS: dict[str, Any] = {
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "VSI_CACHE": True,
}
"""GDAL's settings for reading over a network; who we are it takes from the environment."""

_SYSTEMS = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}
_HEAD = 65536
_PATIENCE = 60.0


def vsi_name(name: str) -> str:
    """Return GDAL's name of a file that lies elsewhere; a path of this machine's as it is."""
    if not is_remote(name) or name.startswith("/vsi"):
        return name
    place = RemoteName(name)
    if place.scheme in _SYSTEMS:
        return _SYSTEMS[place.scheme] + name.partition("://")[2]
    return f"/vsicurl/{name}"


def checked_name(name: RemoteName) -> str:
    """Return the name; raises UsageError for one that holds a password.

    It would stand in plans and logs.
    """
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
        return hashlib.sha256(_first_bytes(name)).hexdigest()
    request = urllib.request.Request(name, headers={"Range": f"bytes=0-{_HEAD - 1}"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            marks = [size or answer.headers.get("Content-Length", "")]
            marks += [answer.headers.get(key, "") for key in ("ETag", "Last-Modified")]
            data = answer.read(_HEAD)
    except urllib.error.HTTPError as error:
        raise InputError(f"the server answers {error.code} {error.reason}", place.url, "check it") \
            from error  # fmt: skip
    except OSError as error:
        raise ResourceError("the server does not answer", place.url, "a rerun resumes") from error
    text = "\0".join([place.name, *marks]).encode()
    return hashlib.sha256(text + b"\0" + data).hexdigest()


def _first_bytes(name: str) -> bytes:
    """Return what changes with a file in an object store: size and marks, by obstore."""
    try:
        import obstore
        from obstore import store
    except ImportError as error:
        raise UsageError(
            "object stores need the extra cloud", name, "pip install 'tilenet[cloud]'"
        ) from error
    folder, _, key = name.rpartition("/")
    try:
        meta = obstore.head(store.from_url(folder), key)
    except FileNotFoundError as error:
        raise InputError("no such file", name, "check the name") from error
    except Exception as error:  # obstore's own classes
        raise ResourceError(f"the store does not answer: {error}", name, "a rerun resumes") \
            from error  # fmt: skip
    return f"{key}\0{meta['size']}\0{meta['e_tag']}\0{meta['last_modified']}".encode()
