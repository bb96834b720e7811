"""Objects that are written: a place in an object store, and the little that is asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tilenet.errors import OutputError, ResourceError
from tilenet.sources import RemoteName, open_objects

__all__ = ["Objects", "Stored"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One object as the store tells it.

    Parameters
    ----------
    data : bytes
        Its content.
    version : dict
        What a conditional write names: the ETag.
    changed : datetime
        When it was written, by the store's clock.
    """

    data: bytes
    version: dict[str, Any]
    changed: datetime


class Objects:
    """Objects below a place; keys are relative to it. Any number of threads may use one.

    What is sent carries its SHA-256, by which the store refuses what the network has damaged.

    Parameters
    ----------
    place : RemoteName
        Bucket and prefix.
    where : str
        What errors are about.
    """

    def __init__(self, place: RemoteName, where: str) -> None:
        self._store = open_objects(place, checked=True)
        self.where = where

    def get(self, key: str, most: int) -> Stored | None:
        """Return what lies there, None if nothing does; OutputError if it is over `most` bytes."""
        import obstore

        with self._converted():
            try:
                found = obstore.get(self._store, key)
            except FileNotFoundError:
                return None
            meta = found.meta
            if meta["size"] > most:
                raise OutputError(f"{key} is too large to be ours", self.where, "move it away")
            return Stored(bytes(found.bytes()), _version(meta), meta["last_modified"])

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever lies there."""
        self._put(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> dict[str, Any] | None:
        """Write an object where there is none; return its version, None if there is one."""
        return self._put(key, data, "create")

    def replace(self, key: str, data: bytes, version: dict[str, Any]) -> dict[str, Any] | None:
        """Write an object over that very version; return the new one, None if it is another."""
        return self._put(key, data, version)

    def _put(self, key: str, data: bytes, mode: Any) -> dict[str, Any] | None:
        import obstore
        from obstore import exceptions

        with self._converted():
            try:
                return _version(obstore.put(self._store, key, data, mode=mode, use_multipart=False))
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return None
            except FileNotFoundError as error:
                if isinstance(mode, dict):  # the version is gone
                    return None
                raise OutputError("no such bucket", self.where, "make it first") from error

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield key and bytes of every object below a folder."""
        import obstore

        with self._converted():
            for some in obstore.list(self._store, folder):
                yield from ((one["path"], one["size"]) for one in some)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are no error."""
        import obstore

        every = list(keys)
        with self._converted():
            if every:
                obstore.delete(self._store, every)

    @contextmanager
    def _converted(self) -> Iterator[None]:
        """Turn obstore's errors into ours.

        Raises
        ------
        OutputError
            Access is denied.
        ResourceError
            The store does not answer.
        """
        from obstore import exceptions

        try:
            yield
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise OutputError(
                "access is denied", self.where, "credentials come from AWS_ACCESS_KEY_ID …"
            ) from error
        except exceptions.BaseError as error:
            first = str(error).strip().splitlines()[0]
            what = f"the object store does not answer: {first}"
            raise ResourceError(what, self.where, "a rerun resumes") from error


def _version(found: Any) -> dict[str, Any]:
    """Return what names a version of an object, as conditional writes take it."""
    return {key: found[key] for key in ("e_tag", "version") if found[key] is not None}
