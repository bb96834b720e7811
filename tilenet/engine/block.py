"""One block: forward its tiles into sums, join its neighbours' strips, decide its pixels.

No Dask and no files: pixels come in, arrays go out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.blend import Blend, Decision, axis_weights, decide, quantise
from tilenet.classes import NODATA
from tilenet.engine.meter import Spans
from tilenet.engine.reading import read_window
from tilenet.geometry import Window
from tilenet.lattice import Lattice
from tilenet.models.session import Session, SumsLike, Tile
from tilenet.stops import check_stopping

__all__ = ["BlockJob", "Forwarded", "drive", "join"]

_BAND_BYTES = 1 << 19  # of sums that are joined at a time: several arrays of it fit a cache


SumRows = Any
"""Sums, (K, h, w) int32, by rows: an array, or a file that is written and read like one
(`tilenet.engine.spill.RowsWriter`, `RowsReader`)."""


def _in_memory(_name: str | int, shape: tuple[int, int, int]) -> SumRows:
    return np.zeros(shape, np.int32)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a block's own tiles give.

    Parameters
    ----------
    mask : ndarray, shape (h, w), uint8
        The core: classes where no other block's tile reaches, 255 where not kept.
    probabilities : ndarray, shape (K, h, w), uint8, or None
        Likewise; 0 where not kept.
    top : SumRows, (K, rows, w)
        Own sums of the core's leading rows, which other blocks' tiles reach.
    left : SumRows, (K, h − rows, cols)
        Own sums of the leading columns below them.
    strips : dict of int to SumRows, (K, …)
        Own sums in other blocks' cores, by block.
    tiles_forwarded, tiles_skipped, nonfinite : int
        Tiles, and scores that were NaN or infinite.
    failed : tuple of (Window, str)
        Where the core has no answer because something failed, and what.
    """

    mask: NDArray[np.uint8]
    probabilities: NDArray[np.uint8] | None
    top: SumRows
    left: SumRows
    strips: Mapping[int, SumRows]
    tiles_forwarded: int
    tiles_skipped: int
    nonfinite: int
    failed: tuple[tuple[Window, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """A tile of a block: its numbers and its first pixel in the raster."""

    number: tuple[int, int]
    row: int
    col: int


class BlockJob:
    """The forward half of one block, fed tile by tile.

    Sums are kept for one tile height only: rows that no further tile of the block reaches leave as
    classes, frame or strips.

    Parameters
    ----------
    lattice : Lattice
        Tiles and blocks.
    block : int
        Which block.
    valid : ndarray or None
        Kept pixels of `read_window`, (h, w) bool; None = all.
    channels : int
        K.
    blend : Blend
        Window.
    decision : Decision
        Activation and threshold.
    probabilities : bool
        Whether they are wanted.
    skip : bool
        Skip tiles without kept pixels.
    only : Window or None
        Forward just the tiles that reach into this window (to remake a lost strip).
    margin : tuple of int
        As for `read_window`.
    allocate : callable
        Makes room for what leaves undecided: called with "top", "left" or a taker's number, and
        the shape (K, h, w).
    """

    def __init__(  # noqa: PLR0913 - the values of one plan, by name
        self,
        lattice: Lattice,
        block: int,
        valid: NDArray[np.bool_] | None,
        *,
        channels: int,
        blend: Blend,
        decision: Decision,
        probabilities: bool = False,
        skip: bool = True,
        only: Window | None = None,
        margin: tuple[int, int] = (0, 0),
        allocate: Callable[[str | int, tuple[int, int, int]], SumRows] = _in_memory,
    ) -> None:
        self._lattice, self._blend, self._decision = lattice, blend, decision
        self._channels = channels
        self._window = read_window(lattice, block, margin)
        self._before = margin[0]
        self._core = core = lattice.core(block)
        self._reach = lattice.reach(block)
        self._valid = valid
        self._takers = {t: lattice.strip(block, t) for t in lattice.takers(block)}
        frame_rows, frame_cols = lattice.shared(block)
        self._interior = Window.from_bounds(
            core.row + frame_rows, core.col + frame_cols, core.row_stop, core.col_stop
        )
        self._mask = np.zeros((core.height, core.width), np.uint8)
        self._probabilities = (
            np.zeros((channels, core.height, core.width), np.uint8) if probabilities else None
        )
        self._top = allocate("top", (channels, frame_rows, core.width))
        self._left = allocate("left", (channels, core.height - frame_rows, frame_cols))
        self._strips = {
            t: allocate(t, (channels, w.height, w.width)) for t, w in self._takers.items()
        }
        rows, cols = lattice.own_tiles(block)
        every = [
            _Part((i, j), lattice.rows.origin(i), lattice.cols.origin(j))
            for i in rows for j in cols
        ]  # fmt: skip
        if only is not None:
            every = [p for p in every if self._tile_window(p).intersection(only).pixels]
        self.parts = [p for p in every if not skip or self._kept(p)]
        self._skipped = len(every) - len(self.parts)
        self._sums: SumsLike | None = None
        self._nonfinite = 0
        self._row = self._reach.row

    def _tile_window(self, part: _Part) -> Window:
        """Return a tile's pixels within the raster."""
        return self._lattice.tile_window(*part.number)

    def _kept(self, part: _Part) -> bool:
        if self._valid is None:
            return True
        window = self._tile_window(part)
        return bool(self._valid[window.slices(self._window.row, self._window.col)].any())

    def tiles(self, pixels: Any) -> list[Tile]:
        """Return the tiles to forward, in order, in the pixels that `Session.load` gave.

        Row and column are those of the first pixel that the network sees.
        """
        row, col = self._window.row + self._before, self._window.col + self._before
        return [(pixels, p.row - row, p.col - col) for p in self.parts]

    def add(self, index: int, scores: Any, session: Session) -> None:
        """Add the scores of tile number `index` of `tiles`; they come in order."""
        part = self.parts[index]
        height, _ = self._lattice.tile_shape
        if self._sums is None:
            self._row = part.row
            self._sums = session.sums(height, self._reach.width, self._decision)
        if part.row > self._row:
            self._flush(part.row)
        weights = (
            axis_weights(self._lattice.rows, part.number[0], self._blend),
            axis_weights(self._lattice.cols, part.number[1], self._blend),
        )
        self._sums.add(scores, 0, part.col - self._reach.col, weights)
        if index == len(self.parts) - 1:
            self._flush(max(self._reach.row_stop, self._row))
            self._nonfinite = self._sums.nonfinite
            session.reuse(self._sums)
            self._sums = None

    def _flush(self, row: int) -> None:
        """Hand out the finished rows above `row` and move the sums down to it."""
        assert self._sums is not None
        height, _ = self._lattice.tile_shape
        stop = min(row, self._row + height, self._reach.row_stop)
        done = Window.from_bounds(self._row, self._reach.col, stop, self._reach.col_stop)
        for target, window in self._outlets():
            part = window.intersection(done)
            if part.pixels:
                inside = (slice(None), *part.slices(window.row, window.col))
                target[inside] = self._sums.take(*part.slices(self._row, self._reach.col))
        part = self._interior.intersection(done)
        if part.pixels:
            here = part.slices(self._row, self._reach.col)
            inside_core = part.slices(self._core.row, self._core.col)
            self._mask[inside_core] = self._sums.decide(*here)
            if self._probabilities is not None:
                self._probabilities[(slice(None), *inside_core)] = self._sums.quantise(*here)
        self._sums.shift(row - self._row)
        self._row = row

    def _outlets(self) -> Iterator[tuple[SumRows, Window]]:
        core, interior = self._core, self._interior
        yield self._top, Window.from_bounds(core.row, core.col, interior.row, core.col_stop)
        yield self._left, Window.from_bounds(interior.row, core.col, core.row_stop, interior.col)
        for taker, window in self._takers.items():
            yield self._strips[taker], window

    def finish(self) -> Forwarded:
        """Return everything, once all tiles were added."""
        assert self._sums is None, "tiles are missing"
        if self._valid is not None:
            core = self._core
            dropped = ~self._valid[core.slices(self._window.row, self._window.col)]
            self._mask[dropped] = NODATA
            if self._probabilities is not None:
                self._probabilities[:, dropped] = 0
        return Forwarded(
            self._mask,
            self._probabilities,
            self._top,
            self._left,
            self._strips,
            len(self.parts),
            self._skipped,
            self._nonfinite,
        )


def drive(
    session: Session,
    jobs: Sequence[tuple[BlockJob, Any]],
    shape: tuple[int, int],
    spans: Spans | None = None,
) -> None:
    """Forward the tiles of one or several blocks whose tiles have one shape, sharing batches.

    Parameters
    ----------
    session : Session
        The network; its lock is held by the caller.
    jobs : sequence of (BlockJob, pixels)
        Pixels as `Session.load` gave them.
    shape : tuple of int
        Tile height and width.
    spans : Spans, optional
        Takes what the network took, and the adding up.
    """
    tiles = [tile for job, pixels in jobs for tile in job.tiles(pixels)]
    if not tiles:  # the network may never be needed
        return
    spans = spans or Spans()
    places = ((job, k) for job, _ in jobs for k in range(len(job.parts)))
    with closing(session.scores(tiles, shape, spans)) as found:
        for (job, k), scores in zip(places, found, strict=True):
            check_stopping()  # nobody waits for this block any more
            with spans.blending():
                job.add(k, scores, session)


def join(
    lattice: Lattice,
    block: int,
    own: Forwarded,
    strips: Mapping[int, SumRows],
    decision: Decision,
) -> None:
    """Add the neighbours' strips to a block's frame and decide it, in place in `own.mask`.

    Parameters
    ----------
    lattice : Lattice
        Tiles and blocks.
    block : int
        Which block.
    own : Forwarded
        Its forward half; `mask` and `probabilities` are changed.
    strips : mapping of int to SumRows
        By giver, every one of `lattice.givers(block)`.
    decision : Decision
        Activation and threshold.
    """
    core = lattice.core(block)
    rows, cols = lattice.shared(block)
    top = Window.from_bounds(core.row, core.col, core.row + rows, core.col_stop)
    left = Window.from_bounds(core.row + rows, core.col, core.row_stop, core.col + cols)
    given = [(lattice.strip(giver, block), strip) for giver, strip in strips.items()]
    for own_sums, frame in ((own.top, top), (own.left, left)):
        if not frame.pixels:
            continue
        step = max(1, _BAND_BYTES // (4 * own_sums.shape[0] * frame.width))
        for row in range(frame.row, frame.row_stop, step):
            band = Window(row, frame.col, step, frame.width).intersection(frame)
            sums = _band(band, [(frame, own_sums), *given])
            where = band.slices(core.row, core.col)
            kept = own.mask[where] != NODATA
            own.mask[where] = np.where(kept, decide(sums, decision), np.uint8(NODATA))
            if own.probabilities is not None:
                own.probabilities[(slice(None), *where)] = quantise(sums, decision) * kept


def _band(band: Window, sources: list[tuple[Window, SumRows]]) -> NDArray[np.int32]:
    """Return the sums of all sources over a band of rows, (K, h, w)."""
    channels = sources[0][1].shape[0]
    sums = np.zeros((channels, band.height, band.width), np.int32)
    for window, rows in sources:
        part = window.intersection(band)
        if part.pixels:
            inside, cols = part.slices(window.row, window.col)
            sums[(slice(None), *part.slices(band.row, band.col))] += rows[:, inside][:, :, cols]
    return sums
