"""Levels of an image as arrays with named axes, cut down to one plane: what OME files hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilenet.errors import InputError
from tilenet.geometry import Window

__all__ = ["StackHandle", "axis_sizes", "chosen_plane"]

BAND_AXES = "cs"
"""Axes that are bands: channels, and the samples of a pixel."""


def axis_sizes(axes: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Return the size of every axis; `axes` has a lower-case letter for each."""
    return dict(zip(axes, shape, strict=True))


def band_count(axes: str, shape: tuple[int, ...]) -> int:
    """Return how many bands a stack has."""
    return math.prod(size for axis, size in axis_sizes(axes, shape).items() if axis in BAND_AXES)


def plane_counts(axes: str, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Return the size of every axis that is neither a band nor y nor x."""
    sizes = axis_sizes(axes, shape)
    return tuple((axis, size) for axis, size in sizes.items() if axis not in BAND_AXES + "yx")


def chosen_plane(
    axes: str,
    shape: tuple[int, ...],
    asked: tuple[tuple[str, int], ...],
    path: str,
    *,
    required: bool = True,
) -> tuple[tuple[str, int], ...]:
    """Return the index of every axis that is neither a band nor y nor x.

    Parameters
    ----------
    axes, shape
        Of the stack.
    asked : tuple of (str, int)
        What the user chose.
    path : str
        For errors.
    required : bool
        Whether it is an error that an axis of several planes was not chosen on; else its first.

    Raises
    ------
    InputError
        An axis has several planes and none was chosen, or there is no such plane or axis.
    """
    others = dict(plane_counts(axes, shape))
    plane = {axis: 0 for axis, size in others.items() if size == 1 or not required}
    for axis, index in asked:
        if axis not in others:
            known = ", ".join(others) or "none"
            raise InputError(f"no axis {axis}", path, f"--plane chooses on: {known}")
        if not 0 <= index < others[axis]:
            raise InputError(
                f"no plane {axis}={index}", path, f"{axis} goes from 0 to {others[axis] - 1}"
            )
        plane[axis] = index
    open_axes = {axis: size for axis, size in others.items() if axis not in plane}
    if open_axes:
        ranges = ", ".join(f"{axis} 0 to {size - 1}" for axis, size in open_axes.items())
        example = ",".join(f"{axis}={size // 2}" for axis, size in open_axes.items())
        raise InputError(
            f"a stack of planes ({ranges}), and none was chosen", path,
            f"choose, as in --plane {example}",
        )  # fmt: skip
    return tuple(sorted(plane.items()))


class StackHandle:
    """One level of a stack.

    Parameters
    ----------
    array : array
        Anything with `shape` that is indexed like a numpy array, and read by it.
    axes : str
        A lower-case letter for each axis.
    bands : tuple of int
        From 1; channels count first, and then the samples of each.
    plane : tuple of (str, int)
        From `chosen_plane`.
    """

    def __init__(
        self, array: Any, axes: str, bands: tuple[int, ...], plane: tuple[tuple[str, int], ...]
    ) -> None:
        self._array, self._axes, self._bands, self._plane = array, axes, bands, dict(plane)

    def read(self, box: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return a window, (C, h, w)."""
        rows, cols = box.slices()
        pixels = np.stack([self._band(band - 1, rows, cols) for band in self._bands])
        return pixels, None

    def _band(self, band: int, rows: slice, cols: slice) -> NDArray[Any]:
        sizes = axis_sizes(self._axes, self._array.shape)
        channel, sample = divmod(band, sizes.get("s", 1))
        where: dict[str, Any] = {"y": rows, "x": cols, "c": channel, "s": sample, **self._plane}
        found = np.asarray(self._array[tuple(where[axis] for axis in self._axes)])
        return found if self._axes.index("y") < self._axes.index("x") else found.T
