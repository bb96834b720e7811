"""The batch contract: a tile's scores depend on its own pixels only."""

from __future__ import annotations

import numpy as np

from tilenet.blend import Decision
from tilenet.models.card import ModelCard
from tilenet.models.session import Session, Tile

__all__ = ["keeps_batch_contract"]


def keeps_batch_contract(
    session: Session, card: ModelCard, shape: tuple[int, int], dtype: str = "uint8"
) -> bool:
    """Whether a tile's scores add the same integers whatever its place and companions are.

    The tile is scored alone, first and last in a sequence of others, and at another place of a
    larger image.

    Parameters
    ----------
    session : Session
        A loaded network.
    card : ModelCard
        Its card.
    shape : tuple of int
        Tile height and width.
    dtype : str
        Numpy name of the pixels.
    """
    rng = np.random.default_rng(0)
    lo, hi = card.value_range
    height, width = shape
    seen = (height + sum(card.margin), width + sum(card.margin))
    size = (card.band_count, seen[0] + 32, seen[1] + 32)
    noise = rng.random(size) * (hi - lo) + lo
    block = noise.astype(dtype)
    tile = np.ascontiguousarray(block[:, 32 : 32 + seen[0], 16 : 16 + seen[1]])
    others = [session.load((rng.random(tile.shape) * (hi - lo) + lo).astype(dtype)) for _ in "123"]
    alone, whole = session.load(tile), session.load(block)

    ones = (np.ones(height), np.ones(width))
    decision = Decision(card.activation, card.threshold, exact=True)

    def at(tiles: list[Tile], index: int) -> bytes:
        sums = session.sums(height, width, decision)
        for k, scores in enumerate(session.scores(tiles, shape)):
            if k == index:
                sums.add(scores, 0, 0, ones)
        return sums.take(slice(None), slice(None)).tobytes()

    with session.lock:
        expected = at([(alone, 0, 0)], 0)
        companions = [(other, 0, 0) for other in others]
        return (
            at([(alone, 0, 0), *companions], 0) == expected
            and at([*companions, (alone, 0, 0)], 3) == expected
            and at([companions[0], (whole, 32, 16)], 1) == expected
        )
