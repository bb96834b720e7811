"""Where the tiles and the blocks of one raster lie. Pure arithmetic, kept as parameters.

Per axis the tile origins are 0, stride, 2·stride … and, last, the one that ends at the padded
border. A block's core is a pixel range; it owns the tiles whose origin lies in it. A tile reaches
beyond its core by up to tile − 1 pixels; what it adds there is a *strip* that belongs to a later
block.

Nothing here is stored per tile or block, so ten million blocks cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tilenet.geometry import Window

__all__ = ["Axis", "Lattice"]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Axis:
    """Tiles and blocks along one axis.

    Parameters
    ----------
    size : int
        Raster pixels, at least 1.
    tile : int
        Tile side the network would like, a multiple of `divisor`.
    stride : int
        Distance of neighbouring origins, a multiple of `divisor`, 1 to `tile`.
    divisor : int
        Tile sides and origins are multiples of it, so that the network's own grid stays in phase.
    core : int
        Block side, at least 1.
    fixed : bool
        The network takes tiles of exactly `tile` pixels; shorter axes are padded up to it.
    """

    size: int
    tile: int
    stride: int
    divisor: int
    core: int
    fixed: bool = False

    def __post_init__(self) -> None:
        assert self.size >= 1
        assert self.core >= 1
        assert 1 <= self.stride <= self.tile
        assert self.tile % self.divisor == self.stride % self.divisor == 0

    @cached_property
    def padded(self) -> int:
        """Size after reflection up to a multiple of the divisor."""
        padded = _round_up(self.size, self.divisor)
        return max(padded, self.tile) if self.fixed else padded

    @cached_property
    def side(self) -> int:
        """Tile side in use: the tile, or the padded axis where that is shorter."""
        return min(self.tile, self.padded)

    @cached_property
    def count(self) -> int:
        """Number of tiles."""
        return -(-(self.padded - self.side) // self.stride) + 1

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.core)

    def origin(self, tile: int) -> int:
        """Return the first pixel of tile number `tile`."""
        return min(tile * self.stride, self.padded - self.side)

    def first_tile(self, position: int) -> int:
        """Return the first tile whose origin is at or behind `position`, or `count`."""
        tile = -(-position // self.stride)
        if tile < self.count - 1:
            return tile
        return self.count - 1 if self.padded - self.side >= position else self.count

    def core_range(self, block: int) -> tuple[int, int]:
        """Return the first and the one-past-last pixel of a block's core."""
        return block * self.core, min((block + 1) * self.core, self.size)

    def tiles(self, block: int) -> range:
        """Return the numbers of the tiles that a block owns, possibly none."""
        start, stop = self.core_range(block)
        return range(self.first_tile(start), self.first_tile(stop))

    def reach(self, block: int) -> tuple[int, int]:
        """Return the pixel range, within the raster, that a block's own tiles cover."""
        tiles = self.tiles(block)
        if not tiles:
            return self.core_range(block)[0], self.core_range(block)[0]
        return self.origin(tiles[0]), min(self.origin(tiles[-1]) + self.side, self.size)

    def givers(self, block: int) -> range:
        """Return the earlier blocks whose tiles may reach into this block's core."""
        start, _ = self.core_range(block)
        first = max(0, (start - self.side + 1) // self.core)
        while first < block and self.reach(first)[1] <= start:
            first += 1
        return range(first, block)

    def takers(self, block: int) -> range:
        """Return the later blocks into whose cores this block's tiles reach."""
        stop = self.reach(block)[1]
        last = block
        while last + 1 < self.blocks and self.core_range(last + 1)[0] < stop:
            last += 1
        return range(block + 1, last + 1)

    def shared(self, block: int) -> int:
        """Return how many leading pixels of the core earlier blocks' tiles reach."""
        start, stop = self.core_range(block)
        reach = max((self.reach(giver)[1] for giver in self.givers(block)), default=start)
        return max(0, min(reach, stop) - start)

    def neighbours(self, tile: int) -> tuple[int, ...]:
        """Return the origins, relative to this tile's, of all tiles that overlap it, itself too."""
        here = self.origin(tile)
        first = tile
        while first > 0 and self.origin(first - 1) + self.side > here:
            first -= 1
        last = tile
        while last + 1 < self.count and self.origin(last + 1) < here + self.side:
            last += 1
        return tuple(self.origin(k) - here for k in range(first, last + 1))


@dataclass(frozen=True)
class Lattice:
    """All tile positions of one raster and the blocks that own them.

    Blocks are numbered row by row from 0.

    Parameters
    ----------
    rows, cols : Axis
        The vertical and the horizontal axis.
    """

    rows: Axis
    cols: Axis

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows.count * self.cols.count

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.rows.blocks * self.cols.blocks

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Height and width of every tile."""
        return self.rows.side, self.cols.side

    @property
    def redundancy(self) -> float:
        """Tile pixels forwarded per raster pixel."""
        height, width = self.tile_shape
        return self.tiles * height * width / (self.rows.size * self.cols.size)

    def position(self, block: int) -> tuple[int, int]:
        """Return a block's row and column among the blocks."""
        return divmod(block, self.cols.blocks)

    def number(self, row: int, col: int) -> int:
        """Return the number of the block at a row and column of blocks."""
        return row * self.cols.blocks + col

    def core(self, block: int) -> Window:
        """Return the pixels that a block writes."""
        row, col = self.position(block)
        (top, bottom), (left, right) = self.rows.core_range(row), self.cols.core_range(col)
        return Window.from_bounds(top, left, bottom, right)

    def bands(self, blocks: range) -> Iterator[Window]:
        """Yield the pixels of consecutive blocks: for each row of blocks, those in it."""
        across = self.cols.blocks
        for row in range(blocks.start // across, -(-blocks.stop // across) if blocks else 0):
            first = max(blocks.start - row * across, 0)
            last = min(blocks.stop - row * across, across) - 1
            (top, bottom), (left, _) = self.rows.core_range(row), self.cols.core_range(first)
            yield Window.from_bounds(top, left, bottom, self.cols.core_range(last)[1])

    def tiles_in(self, blocks: range) -> int:
        """Return how many tiles consecutive blocks own."""
        rows, cols = self.rows.first_tile, self.cols.first_tile
        return sum(
            (rows(band.row_stop) - rows(band.row)) * (cols(band.col_stop) - cols(band.col))
            for band in self.bands(blocks)
        )

    def own_tiles(self, block: int) -> tuple[range, range]:
        """Return the numbers of a block's tiles along rows and columns."""
        row, col = self.position(block)
        return self.rows.tiles(row), self.cols.tiles(col)

    def tile_window(self, row: int, col: int) -> Window:
        """Return the raster pixels of the tile at a row and column of tiles."""
        height, width = self.tile_shape
        return Window(self.rows.origin(row), self.cols.origin(col), height, width).intersection(
            Window(0, 0, self.rows.size, self.cols.size)
        )

    def reach(self, block: int) -> Window:
        """Return the raster pixels that a block's own tiles cover; empty if it owns none."""
        row, col = self.position(block)
        (top, bottom), (left, right) = self.rows.reach(row), self.cols.reach(col)
        return Window.from_bounds(top, left, bottom, right)

    def shared(self, block: int) -> tuple[int, int]:
        """Return how many leading rows and columns of the core other blocks' tiles reach."""
        row, col = self.position(block)
        return self.rows.shared(row), self.cols.shared(col)

    def givers(self, block: int) -> Iterator[int]:
        """Yield the other blocks whose tiles reach into this block's core."""
        row, col = self.position(block)
        yield from self._others(block, self.rows.givers(row), self.cols.givers(col))

    def takers(self, block: int) -> Iterator[int]:
        """Yield the other blocks into whose cores this block's tiles reach."""
        row, col = self.position(block)
        if self.reach(block).pixels:
            yield from self._others(block, self.rows.takers(row), self.cols.takers(col))

    def _others(self, block: int, rows: range, cols: range) -> Iterator[int]:
        row, col = self.position(block)
        for r in (row, *rows):
            for c in (col, *cols):
                other = self.number(r, c)
                if other != block and self._strip(other, block).pixels:
                    yield other

    def _strip(self, one: int, other: int) -> Window:
        giver, taker = min(one, other), max(one, other)
        return self.strip(giver, taker)

    def strip(self, giver: int, taker: int) -> Window:
        """Return the part of `taker`'s core that `giver`'s tiles cover."""
        return self.reach(giver).intersection(self.core(taker))
