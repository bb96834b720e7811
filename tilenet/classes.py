"""The classes of a mask: id, name, colour."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NODATA", "ClassInfo", "default_classes"]

NODATA = 255
"""Mask value of a pixel that has no answer."""

# Okabe and Ito's colour-blind-safe palette (https://jfly.uni-koeln.de/color/), without black.
_PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One class of a mask.

    Parameters
    ----------
    id : int
        Value in the mask, 0 to 254.
    name : str
        What it is called.
    color : tuple of int
        Red, green, blue, 0 to 255.
    """

    id: int
    name: str
    color: tuple[int, int, int]


def default_classes(count: int) -> tuple[ClassInfo, ...]:
    """Return `count` classes named by their numbers: 0 black, the others from a fixed palette."""
    return tuple(
        ClassInfo(k, f"class_{k}", (0, 0, 0) if k == 0 else _PALETTE[(k - 1) % len(_PALETTE)])
        for k in range(count)
    )
