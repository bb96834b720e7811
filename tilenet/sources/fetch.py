"""Small documents, whole, from this machine or another one."""

from __future__ import annotations

import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tilenet.errors import InputError, ResourceError
from tilenet.sources.bucket import Bucket
from tilenet.sources.remote import RemoteName, is_remote

__all__ = ["MOST", "ask", "fetch"]

MOST = 16 << 20
"""Bytes of a document that anybody would write."""
_PATIENCE = 60.0
_SERVERS_FAULT = 500  # and what is above: it may be well again


def ask(url: str, headers: dict[str, str] | None = None) -> AbstractContextManager[HTTPResponse]:
    """Return a web server's answer, to be closed.

    Raises
    ------
    InputError
        There is no such file, or it is not for us.
    ResourceError
        The server does not answer.
    """
    place = RemoteName(url)
    request = urllib.request.Request(url, headers=headers or {})  # noqa: S310 - http(s) only
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=_PATIENCE)  # noqa: S310 - so
    except urllib.error.HTTPError as error:
        if error.code >= _SERVERS_FAULT:
            raise ResourceError(
                f"the server answers {error.code} {error.reason}", place.url, "a rerun resumes"
            ) from error
        raise InputError(f"the server answers {error.code} {error.reason}", place.url, "check it") \
            from error  # fmt: skip
    except (OSError, HTTPException) as error:
        raise ResourceError("the server does not answer", place.url, "a rerun resumes") from error
    return answer


def fetch(name: str) -> bytes:
    """Return the content of a small file.

    Parameters
    ----------
    name : str
        A path, or a name that `is_remote`.

    Raises
    ------
    InputError
        It is not there, or too large to be a document.
    ResourceError
        A server does not answer.
    """
    try:
        data = _content(name)
    except FileNotFoundError as error:
        raise InputError("no such file", name, "check the path") from error
    if data is None:
        raise InputError("no such object", name, "check the name")
    if len(data) > MOST:
        raise InputError(f"more than {MOST >> 20} MiB of a document", name)
    return data


def _content(name: str) -> bytes | None:
    """Return a file's bytes, one more than `MOST` at the most; None if it is not there."""
    place = RemoteName(name)
    if not is_remote(name):
        with Path(name).open("rb") as file:
            return file.read(MOST + 1)
    if place.scheme in ("http", "https"):
        try:
            with ask(name) as answer:
                return answer.read(MOST + 1)
        except (OSError, HTTPException) as error:  # in the middle of it
            raise ResourceError("the server does not answer", name, "a rerun resumes") from error
    folder, _, key = name.rpartition("/")
    try:
        return Bucket(RemoteName(folder)).get(key, MOST)
    except OSError as error:
        raise InputError(str(error), name) from error
