"""How many pixels a network sees around what it answers. Does not import torch."""

from __future__ import annotations

__all__ = ["classic_margin"]


def _valid_answer(side: int, levels: int) -> int | None:
    """Return a valid U-Net's output side; None if a level is odd, or nothing is left."""
    for level in range(levels):
        side -= 4  # two 3×3 convolutions
        if level < levels - 1:
            if side <= 0 or side % 2:
                return None
            side //= 2
    for _ in range(levels - 1):
        side = side * 2 - 4
    return side if side > 0 else None


def classic_margin(levels: int, padding: str) -> tuple[int, int]:
    """Return the pixels that a classic U-Net sees before and after a tile it answers.

    The tile is a multiple of 2^(levels − 1); the answer begins with it and may go on behind it.

    Parameters
    ----------
    levels : int
        Resolutions of the network.
    padding : {"same", "valid"}
        Of its convolutions.
    """
    if padding != "valid":
        return (0, 0)
    divisor = 1 << (levels - 1)
    far = 64 * divisor
    lost, answer = 0, None
    while answer is None:
        lost += 1
        answer = _valid_answer(far + lost, levels)
    # The first side that runs and leaves at least the tile.
    while answer is None or answer < far:
        lost += 1
        answer = _valid_answer(far + lost, levels)
    before = (far + lost - answer) // 2
    return (before, lost - before)
