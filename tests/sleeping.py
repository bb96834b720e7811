"""A Dask preload for worker processes: networks that take their time without taking the cores.

`dask worker --preload tests/sleeping.py` with `TILENET_SLEEP=SECONDS[:constant]`. Every block's
network sleeps that long before it works (so that a run lasts while something is broken), or, with
`:constant`, sleeps that long for every tile and gives one answer (so that the cores of one machine
do not limit how many workers it has). All else is what a worker really does.
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np

import tilenet.engine.task as task
from tilenet.blend import Sums
from tilenet.models.session import NOBODY, network_shape

VARIABLE = "TILENET_SLEEP"


class Slowed:
    """A session that sleeps before each block."""

    def __init__(self, session, seconds):
        self._session, self._seconds = session, seconds

    def __getattr__(self, name):
        return getattr(self._session, name)

    def scores(self, tiles, shape, took=NOBODY):
        time.sleep(self._seconds)
        yield from self._session.scores(tiles, shape, took)


class Constant:
    """A session that sleeps for each tile; its scores are the same everywhere."""

    def __init__(self, channels, seconds):
        self.channels, self._seconds = channels, seconds
        self.lock = threading.Lock()

    def load(self, pixels):
        return pixels

    def scores(self, tiles, shape, took=NOBODY):
        scores = np.zeros((self.channels, *shape), np.float32)
        scores[0] = 1
        for _ in tiles:
            start = time.time()
            time.sleep(self._seconds)
            took.ran(start, time.time())
            yield scores

    def sums(self, height, width, decision):
        return Sums(self.channels, height, width, decision)

    def reuse(self, sums):
        pass


def dask_setup(worker):
    """Swap how this process opens a network."""
    del worker
    value, _, kind = os.environ[VARIABLE].partition(":")
    real = task.open_session

    def open_session(files, setup, dtype):
        if kind == "constant":
            return Constant(network_shape(files).channels, float(value))
        return Slowed(real(files, setup, dtype), float(value))

    task.open_session = open_session
