"""Who writes an output in an object store: one object, written and renewed on conditions.

There are no kernel locks there. A run owns an output as long as the owner object is the one that it
wrote last; it renews it, and one that was not renewed for long may be taken over. How long that is
tells the store's own clock, so those of the machines need not agree.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from tilenet.engine.objects import Objects, Stored
from tilenet.errors import OutputError, TilenetError
from tilenet.strangers import parse_json

__all__ = ["INTERVAL", "Lease"]

INTERVAL = 20.0
"""Seconds between two renewals."""

_DEAD = 6  # intervals without a renewal, after which an owner counts as dead
_LATE = 2  # intervals, after which an owner renews before it writes more
_MOST = 1 << 16
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a machine sleeps


class Lease:
    """The right to write an output, while it is entered.

    Parameters
    ----------
    objects : Objects
        Where the owner object lies.
    key : str
        Its key.
    token : str
        Who asks. Whoever has the same token is known to be dead: it stands for a scratch folder of
        which the kernel says that nobody else has it.
    plan_hash : str
        What for.
    where : str
        The output.
    interval : float
        Seconds between two renewals.
    """

    def __init__(
        self, objects: Objects, key: str, token: str, plan_hash: str, where: str,
        interval: float = INTERVAL,
    ) -> None:  # fmt: skip
        self._objects, self._key, self._where = objects, key, where
        self._said = {
            "token": token, "nonce": secrets.token_hex(16), "host": socket.gethostname(),
            "interval": interval, "plan_hash": plan_hash,
        }  # fmt: skip
        self._interval, self._beats = interval, 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="tilenet-lease", daemon=True)
        self._version: dict[str, Any] = {}
        self._renewed = 0.0
        self._lost = False

    def __enter__(self) -> Lease:
        """Take the output.

        Raises
        ------
        OutputError
            Another run has it, or the store cannot write on conditions.
        ResourceError
            The store does not answer.
        """
        began = time.clock_gettime(_CLOCK)
        version = self._objects.create(self._key, self._document())
        if version is None:
            version = self._take_over()
        elif self._objects.create(self._key, self._document()) is not None:
            self._objects.delete([self._key])
            raise OutputError(
                "the object store does not heed If-None-Match, so two runs could write at once",
                self._where, "write to a local disk, and copy",
            )  # fmt: skip
        self._version, self._renewed = version, began
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(TilenetError):  # then it is taken over later
            if not self._lost and self._mine() is not None:
                self._objects.delete([self._key])

    def check(self) -> None:
        """Return if the output is still ours to write.

        Raises
        ------
        OutputError
            Another run has taken over.
        ResourceError
            The last renewal is long ago, and the store does not answer.
        """
        if time.clock_gettime(_CLOCK) - self._renewed > _LATE * self._interval:
            self._renew()
        if self._lost:
            raise OutputError(
                "another run has taken over this output", self._where, "leave it to that one"
            )

    def _document(self) -> bytes:
        self._beats += 1  # so that no two have one ETag
        return json.dumps({**self._said, "time": time.time(), "beats": self._beats}).encode()

    def _take_over(self) -> dict[str, Any]:
        """Return the version of our object, written over that of a dead owner."""
        found = self._objects.get(self._key, _MOST)
        if found is None:
            version = self._objects.create(self._key, self._document())
        elif self._nonce(found) == self._said["nonce"]:
            return found.version  # the answer to our first try was lost, and it was tried again
        else:
            self._check_dead(found)
            version = self._objects.replace(self._key, self._document(), found.version)
        if version is None:
            raise OutputError("another run was quicker", self._where, "leave it to that one")
        return version

    def _check_dead(self, found: Stored) -> None:
        try:
            said = dict(parse_json(found.data))
            host, interval = str(said["host"]), min(float(said["interval"]), 3600.0)
        except (ValueError, KeyError, TypeError):
            said, host, interval = {}, "an unknown host", INTERVAL
        if said.get("token") == self._said["token"]:
            return
        age, patience = self._age(found), _DEAD * interval
        if age <= patience:
            raise OutputError(
                f"another run is writing this output, on {host}; it was heard {age:.0f} s ago",
                self._where,
                f"wait for it; one that was not heard for {patience:.0f} s is taken over",
            )

    def _age(self, found: Stored) -> float:
        """Return the seconds since an object was written, by the store's clock."""
        key = f"{self._key}.{self._said['nonce']}"
        self._objects.put(key, b"")
        now = self._objects.get(key, _MOST)
        self._objects.delete([key])
        return 0.0 if now is None else (now.changed - found.changed).total_seconds()

    def _nonce(self, found: Stored) -> Any:
        try:
            return parse_json(found.data)["nonce"]
        except (ValueError, KeyError, TypeError):
            return None

    def _mine(self) -> dict[str, Any] | None:
        found = self._objects.get(self._key, _MOST)
        ours = found is not None and self._nonce(found) == self._said["nonce"]
        return found.version if found is not None and ours else None

    def _renew(self) -> None:
        with self._lock:
            began = time.clock_gettime(_CLOCK)
            version = self._objects.replace(self._key, self._document(), self._version)
            if version is None:
                version = self._mine()  # the answer to an earlier try may have been lost
            self._lost = version is None
            if version is not None:
                self._version, self._renewed = version, began

    def _renew_often(self) -> None:
        while not self._lost and not self._stop.wait(self._interval):
            with suppress(TilenetError):  # `check` tells, before more is written
                self._renew()
