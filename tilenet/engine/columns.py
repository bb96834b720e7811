"""Which blocks a worker is given next: every worker has columns of blocks of its own.

Neighbours then mostly sit together, so few strips are read by another host than wrote them, and all
go down the raster side by side, so few blocks wait for a neighbour with their strips on the disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["Columns"]

_AHEAD = 2  # rows of blocks that a worker may be ahead of the last one before it helps there


@dataclass(eq=False, slots=True)
class _Group:
    """Columns that are handed out row by row.

    Parameters
    ----------
    first, stop : int
        Columns of the rows to come.
    owner : str
        Their worker or host; "" if it is gone.
    row, col : int
        The next block.
    edge : int
        One behind the last column of the row that is under way.
    """

    first: int
    stop: int
    owner: str
    row: int
    col: int
    edge: int

    @property
    def width(self) -> int:
        return self.stop - self.first

    def next_row(self) -> None:
        self.row, self.col, self.edge = self.row + 1, self.first, self.stop


class Columns:
    """The blocks of one raster, handed out.

    Parameters
    ----------
    rows, cols : int
        How many blocks there are along each axis.
    find : callable
        Takes a first and a one-past-last block; returns the first of these that is to be done,
        or -1.
    """

    def __init__(self, rows: int, cols: int, find: Callable[[int, int], int]) -> None:
        self._rows, self._cols, self._find = rows, cols, find
        self._groups = [_Group(0, cols, "", 0, 0, cols)]
        self._fresh = True
        self._places: Mapping[str, str] = {}
        self._by_host = False

    @property
    def left(self) -> bool:
        """Whether blocks may be left."""
        return bool(self._groups)

    def take(self, worker: str, places: Mapping[str, str], count: int) -> tuple[int, ...]:
        """Hand out blocks of one row; none if none is left.

        Parameters
        ----------
        worker : str
            Who takes them.
        places : dict
            All workers and their hosts.
        count : int
            How many at the most.
        """
        if places is not self._places:
            self._follow(places)
        while self._groups:
            group = self._choose(self._owner(worker))
            blocks = self._pick(group, count)
            if blocks:
                return blocks
            self._groups.remove(group)
        return ()

    def _owner(self, worker: str) -> str:
        return self._places.get(worker, worker) if self._by_host else worker

    def _follow(self, places: Mapping[str, str]) -> None:
        """Give everybody columns; those of the gone are for who comes, or whoever is ahead."""
        self._places = places
        if self._fresh:
            self._by_host = 2 * len(places) > self._cols  # too few columns for every worker
        # One host's workers side by side.
        owners = Counter(self._owner(one) for one in sorted(places, key=lambda w: (places[w], w)))
        if self._fresh:
            self._share_out(owners)
        for group in self._groups:
            group.owner = group.owner if group.owner in owners else ""
        having = {group.owner for group in self._groups}
        for owner in owners:
            if owner not in having:
                self._give(owner)
        self._fresh = False

    def _share_out(self, owners: Counter[str]) -> None:
        """Cut all columns among owners, by the number of their workers."""
        total = owners.total()
        cuts = [round(self._cols * done / total) for done in accumulate(owners.values())]
        self._groups = [
            _Group(first, stop, owner, 0, first, stop)
            for owner, (first, stop) in zip(owners, pairwise([0, *cuts]), strict=True)
            if stop > first
        ]

    def _give(self, owner: str) -> None:
        """Give a newcomer the columns of one who is gone, else half of the widest."""
        free = [group for group in self._groups if not group.owner]
        group = max(free or self._groups, key=lambda group: group.width, default=None)
        if group is None:
            return
        if free:
            group.owner = owner
        elif group.width > 1:  # else it helps who is behind
            mid = group.first + group.width // 2
            self._groups.append(_Group(mid, group.stop, owner, group.row + 1, mid, group.stop))
            group.stop = mid  # but for the row that is under way

    def _choose(self, owner: str) -> _Group:
        """Return an owner's columns, or those that are too far behind."""
        last = min(self._groups, key=lambda group: group.row)
        own = [group for group in self._groups if group.owner == owner]
        mine = min(own, key=lambda group: group.row, default=last)
        return last if mine.row - last.row > _AHEAD else mine

    def _pick(self, group: _Group, count: int) -> tuple[int, ...]:
        """Return the next blocks of some columns that are to be done."""
        while group.row < self._rows:
            start, blocks = group.row * self._cols, list[int]()
            while len(blocks) < count and group.col < group.edge:
                found = self._find(start + group.col, start + group.edge)
                group.col = group.edge if found < 0 else found - start + 1
                blocks += [] if found < 0 else [found]
            if group.col >= group.edge:
                group.next_row()
            if blocks:
                return tuple(blocks)
        return ()
