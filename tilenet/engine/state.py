"""Which blocks of a run are forwarded and joined, and which of them are ours to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilenet.engine import spill
from tilenet.engine.journal import Journal
from tilenet.engine.lost import is_lost
from tilenet.engine.plan import Plan
from tilenet.engine.runfolder import PLAN, STRIPS

__all__ = ["Share", "State"]


@dataclass(frozen=True, slots=True)
class Share:
    """What one run of several, side by side in a run folder, makes of a plan.

    Parameters
    ----------
    blocks : range
        Its own blocks.
    done : set of int
        Blocks that other journals list.
    plan : str
        What its plan's file is called there: it may have another device or path than others'.
    """

    blocks: range
    done: frozenset[int] = frozenset()
    plan: str = PLAN


class State:
    """Which blocks are forwarded and joined: one byte each. Only a share of them is ours to make.

    Of the others, some may be forwarded meanwhile by others.
    """

    NEW, FORWARDING, FORWARDED, JOINING, JOINED = range(5)

    def __init__(self, plan: Plan, folder: Path, journal: Journal, share: Share) -> None:
        self._lattice, self._own = plan.lattice, share.blocks
        self._state = bytearray(plan.lattice.blocks)
        for path in (folder / STRIPS).glob("*.own"):
            self._state[int(path.stem)] = self.FORWARDED
        for block in journal.blocks | share.done:
            if block >= 0:
                self._state[block] = self.JOINED

    def _find(self, state: int) -> Iterator[int]:
        """Yield own blocks in a state, row by row."""
        block = self._state.find(state, self._own.start, self._own.stop)
        while block >= 0:
            yield block
            block = self._state.find(state, block + 1, self._own.stop)

    def find_new(self, start: int, stop: int) -> int:
        """Return the first of some blocks that is ours to forward, -1 if none is."""
        own = self._own
        return self._state.find(self.NEW, max(start, own.start), min(stop, own.stop))

    def givers_to_others(self) -> Iterator[int]:
        """Yield the blocks to forward first, for whose strips others wait."""
        stop, lattice = self._own.stop, self._lattice
        if not self._own or stop == lattice.blocks:
            return
        row, _ = lattice.position(stop)
        first = lattice.number(lattice.rows.givers(row).start, 0)
        for block in range(max(first, self._own.start), stop):
            waited_for = any(taker >= stop for taker in lattice.takers(block))
            if waited_for and self._state[block] == self.NEW:
                self._state[block] = self.FORWARDING
                yield block

    def left_over(self, folder: Path) -> list[int]:
        """Return the blocks that wait for others' blocks only: last those whose strips are missing.

        Those may still come; else they are made again.
        """
        strips = folder / STRIPS

        def missing(block: int) -> int:
            return sum(
                not (strips / spill.name_for(self._lattice, giver, block)).exists()
                and not is_lost(folder, giver)
                for giver in self._lattice.givers(block)
            )

        left = sorted(self._find(self.FORWARDED), key=missing)
        for block in left:
            self._state[block] = self.JOINING
        return left

    def forwarded(self, block: int) -> Iterator[int]:
        """Note a forward; yield the blocks that can now be joined."""
        if self._state[block] < self.FORWARDED:
            self._state[block] = self.FORWARDED
        for candidate in (block, *self._lattice.takers(block)):
            yield from self._ready(candidate)

    def joined(self, blocks: Sequence[int]) -> set[str]:
        """Note blocks that are done; return the names of the files that nobody needs any more."""
        for block in blocks:
            self._state[block] = self.JOINED
        done = set(blocks)
        near = {one for block in blocks for one in (block, *self._lattice.givers(block))}
        return {
            name
            for one in near
            for name, takers in spill.needed_by(self._lattice, one).items()
            if not done.isdisjoint(takers)
            and all(self._state[taker] == self.JOINED for taker in takers)
        }

    def lost(self, block: int) -> Iterator[int]:
        """Note a block that was given up; yield the blocks that need not wait for it any more."""
        self._state[block] = self.JOINED
        for candidate in self._lattice.takers(block):
            yield from self._ready(candidate)

    def waiting(self) -> Iterator[int]:
        """Yield the blocks that an earlier run left ready to be joined."""
        for block in self._find(self.FORWARDED):
            yield from self._ready(block)

    def _ready(self, block: int) -> Iterator[int]:
        ours = block in self._own and self._state[block] == self.FORWARDED
        if ours and all(
            self._state[giver] >= self.FORWARDED for giver in self._lattice.givers(block)
        ):
            self._state[block] = self.JOINING
            yield block
