"""A Zarr store in an object store or on a web server, by obstore (extra `cloud`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from tilenet.errors import InputError, ResourceError, UsageError
from tilenet.sources.nodes import Range
from tilenet.sources.remote import RemoteName

__all__ = ["Bucket", "endpoint", "is_anonymous", "object_mark", "open_objects"]

_PATIENCE = timedelta(seconds=60)
_RETRIES = 5


def is_anonymous() -> bool:
    """Return whether the environment says that nobody need be named."""
    told = (os.environ.get(name, "") for name in ("AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in told)


def endpoint() -> str:
    """Return the address of an S3 server that is not Amazon's, as the environment says it."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


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
    address = endpoint()
    plain = place.scheme == "http" or address.startswith("http://")
    options: Any = {"client_options": {"allow_http": plain}, "retry_config": retry}
    try:
        if place.scheme != "s3":
            return store.from_url(place.url, **options)
        settings: Any = {"skip_signature": True} if is_anonymous() else {}
        if address:
            settings["endpoint"] = address
        if checked:
            settings["checksum_algorithm"] = "SHA256"
        return store.S3Store(place.bucket, prefix=place.key or None, config=settings, **options)
    except Exception as error:  # obstore's own classes; the text names the setting
        raise UsageError(f"cannot be addressed: {error}", place, "check the name") from error


def object_mark(name: RemoteName) -> str:
    """Return what changes with an object: its name, size, tag and time.

    Raises
    ------
    InputError
        There is none, or access is denied.
    ResourceError
        The store does not answer.
    """
    import obstore

    folder, _, key = name.url.rpartition("/")
    place = Bucket(RemoteName(folder))
    try:
        meta = obstore.head(place.objects, key)
    except FileNotFoundError as error:
        raise InputError("no such object", name, "check the name") from error
    except Exception as error:
        raise place.trouble(error) from error
    return f"{key}\0{meta['size']}\0{meta['e_tag']}\0{meta['last_modified']}"


class Bucket:
    """A store as bytes by key, some network away.

    Parameters
    ----------
    place : RemoteName
        The store.
    """

    def __init__(self, place: RemoteName) -> None:
        self.name = place.url
        self.objects = open_objects(place)

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
            found = obstore.get(self.objects, key, options=options)
            first, stop = found.range
            data = bytes(found.bytes()) if stop - first <= most else None
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self.trouble(error) from error
        if data is None:
            raise OSError(f"{key} has {stop - first} bytes, more than the {most} that can be")
        return data

    def children(self, path: str) -> list[str]:
        """Return the names directly below a path, in order."""
        import obstore

        try:
            found: Any = obstore.list_with_delimiter(self.objects, path or None)
        except Exception as error:
            raise self.trouble(error) from error
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])

    def marks(self, path: str, most: int) -> Iterator[str]:
        """Yield what changes when an object below a path does, for the first in order of names."""
        import obstore

        left = most
        try:
            for some in obstore.list(self.objects, path or None):
                for one in some[:left]:
                    yield f"{one['path']}\0{one['size']}\0{one['e_tag']}\0{one['last_modified']}"
                left -= len(some)
                if left <= 0:
                    return
        except Exception as error:
            raise self.trouble(error) from error

    def trouble(self, error: Exception) -> Exception:
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
