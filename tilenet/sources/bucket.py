"""A Zarr store in an object store or on a web server, by obstore (extra `cloud`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from tilenet.errors import InputError, ResourceError, UsageError
from tilenet.sources.nodes import Range
from tilenet.sources.remote import RemoteName

__all__ = ["Bucket", "open_objects"]

_PATIENCE = timedelta(seconds=60)
_RETRIES = 5


def _anonymous() -> bool:
    told = (os.environ.get(name, "") for name in ("AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in told)


def open_objects(place: RemoteName, *, checked: bool = False) -> Any:
    """Return obstore's view of a place; the environment says who we are and where that is.

    Parameters
    ----------
    place : RemoteName
        Where.
    checked : bool
        Send a SHA-256 with all that is written (S3).

    Raises
    ------
    UsageError
        The extra is not installed, or what the environment says does not fit.
    """
    try:
        from obstore import store
    except ImportError as error:
        raise UsageError(
            "object stores need the extra cloud", place, "pip install 'tilenet[cloud]'"
        ) from error
    retry: Any = {"max_retries": _RETRIES, "retry_timeout": _PATIENCE}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    plain = place.scheme == "http" or endpoint.startswith("http://")
    options: Any = {"client_options": {"allow_http": plain}, "retry_config": retry}
    try:
        if place.scheme != "s3":
            return store.from_url(place.url, **options)
        settings: Any = {"skip_signature": True} if _anonymous() else {}
        if endpoint:
            settings["endpoint"] = endpoint
        if checked:
            settings["checksum_algorithm"] = "SHA256"
        return store.S3Store(place.bucket, prefix=place.key or None, config=settings, **options)
    except Exception as error:  # obstore's own classes; the text names the setting
        raise UsageError(f"cannot be addressed: {error}", place, "check the name") from error


class Bucket:
    """A store as bytes by key, some network away.

    Parameters
    ----------
    place : RemoteName
        The store.
    """

    def __init__(self, place: RemoteName) -> None:
        self.name = place.url
        self._store = open_objects(place)

    def get(self, key: str, most: int, part: Range | None = None) -> bytes | None:
        """Return what lies there or a part of it, None if nothing.

        Raises
        ------
        OSError
            It has more than `most` bytes.
        InputError
            Access is denied.
        ResourceError
            The store does not answer.
        """
        import obstore

        options: Any = None
        if part is not None:
            first, stop = part
            wanted: Any = (first, stop) if stop is not None else {"offset": first}
            options = {"range": {"suffix": -first} if first < 0 else wanted}
        try:
            found = obstore.get(self._store, key, options=options)
            first, stop = found.range
            data = bytes(found.bytes()) if stop - first <= most else None
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._trouble(error) from error
        if data is None:
            raise OSError(f"{key} has {stop - first} bytes, more than the {most} that can be")
        return data

    def children(self, path: str) -> list[str]:
        """Return the names directly below a path, in order."""
        import obstore

        try:
            found: Any = obstore.list_with_delimiter(self._store, path or None)
        except Exception as error:
            raise self._trouble(error) from error
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])

    def marks(self, path: str, most: int) -> Iterator[str]:
        """Yield what changes when an object below a path does, for the first in order of names."""
        import obstore

        left = most
        try:
            for some in obstore.list(self._store, path or None):
                for one in some[:left]:
                    yield f"{one['path']}\0{one['size']}\0{one['e_tag']}\0{one['last_modified']}"
                left -= len(some)
                if left <= 0:
                    return
        except Exception as error:
            raise self._trouble(error) from error

    def _trouble(self, error: Exception) -> Exception:
        """Return our error for one of obstore's."""
        from obstore import exceptions

        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return InputError(
                "access is denied", self.name,
                "credentials come from AWS_ACCESS_KEY_ID …; AWS_SKIP_SIGNATURE=true for none",
            )  # fmt: skip
        if isinstance(error, exceptions.BaseError):
            first = str(error).strip().splitlines()[0]
            return ResourceError(f"does not answer: {first}", self.name, "a rerun resumes")
        return error
