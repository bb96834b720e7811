"""How a raster is looked at, and which of its levels that takes. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tilenet.errors import InputError
from tilenet.geometry import Georeference
from tilenet.sources.grid import Grid

__all__ = ["Resampling", "Settled", "View", "reduced", "settle"]

Size = tuple[int, int]

_SAME, _SAME_AS_TRAINED = 0.01, 0.1
# A level this near to what is asked for, or to what the network was trained at, is read as it is.
_MOST_ENLARGED = 16.0
_MOST_DEGREES = 0.5  # per pixel: a network trained at more was trained at metres
_LEAST_LEFT = 0.5  # of a pixel, of each side of a raster that is reduced


@dataclass(frozen=True, slots=True)
class View:
    """How a raster shall be looked at; what is None follows the file, and then the network.

    Parameters
    ----------
    bands : tuple of int or str, optional
        Bands from 1, or by name, in the order the model wants them; default all but alpha.
    level : int, optional
        Pyramid index, 0 = full resolution.
    mpp : float, optional
        Micrometres per pixel to read at. A file that tells none is taken to have this.
    resolution : float, optional
        CRS units per pixel to read at.
    source_mpp : float, optional
        Micrometres per pixel of the file's full resolution, whatever it says itself.
    plane : tuple of (str, int)
        Which index of each further axis (z, t, …) of a stack, from 0.
    variable : str, optional
        Which array of a Zarr store, by its path inside.
    like : Grid, optional
        The grid to bring it to, in place of a level or resolution.
    allow_remote : bool
        Whether it may lie on another machine, or point to other files (VRT).
    mosaic : tuple of str
        Rasters that are seen as one, the first on top; () for one raster alone.
    scaling : {"apply", "stored"}, optional
        Whether the network sees what the numbers mean by the file's scale and offset, or the
        numbers. Without it a file that has such is refused.
    trained_bands : tuple of str
        What the network calls its bands: followed where `bands` is None and the file has them.
    trained_mpp, trained_resolution : float, optional
        What the network was trained at (a resolution in metres, for a projected CRS): followed
        where nothing else is asked for and the file tells its own.
    """

    bands: tuple[int | str, ...] | None = None
    level: int | None = None
    mpp: float | None = None
    resolution: float | None = None
    source_mpp: float | None = None
    plane: tuple[tuple[str, int], ...] = ()
    variable: str | None = None
    allow_remote: bool = False
    like: Grid | None = None
    mosaic: tuple[str, ...] = ()
    scaling: Literal["apply", "stored"] | None = None
    trained_bands: tuple[str, ...] = ()
    trained_mpp: float | None = None
    trained_resolution: float | None = None


@dataclass(frozen=True, slots=True)
class Resampling:
    """A pixel grid that is none of the file's levels; both have the same outer corner.

    Parameters
    ----------
    step : tuple of float
        Pixels of the level per pixel of the grid (y, x).
    size : tuple of int
        Height and width of the level.
    """

    step: tuple[float, float]
    size: Size


@dataclass(frozen=True, slots=True)
class Settled:
    """What a view comes to for one file.

    Parameters
    ----------
    level : int
        Which level is read.
    size : tuple of int
        Height and width of the grid.
    resampling : Resampling or None
        None if the grid is the level's own.
    georeference : Georeference
        Of the grid.
    notes : tuple of str
        What the user should know.
    """

    level: int
    size: Size
    resampling: Resampling | None
    georeference: Georeference
    notes: tuple[str, ...]


def settle(
    view: View, levels: tuple[Size, ...], place: Georeference, metres: float | None, path: str
) -> Settled:
    """Choose the level, and what it must be resampled by.

    Of the levels that are no coarser than what is wanted, the coarsest is read.

    Parameters
    ----------
    view : View
        What is wanted.
    levels : tuple of (int, int)
        Height and width of every level.
    place : Georeference
        Of the full resolution, as the file tells it.
    metres : float or None
        Metres per unit of a projected CRS; None if it is not projected.
    path : str
        For errors.

    Raises
    ------
    InputError
        There is no such level, the file does not tell what is asked for, or at that nothing would
        be left of it.
    """
    if view.source_mpp is not None:
        place = place.at_mpp(view.source_mpp)
    elif view.mpp is not None and place.mpp is None:
        place = place.at_mpp(view.mpp)
        told = f"tells no micrometres per pixel: its full resolution is taken to be {view.mpp:g}"
        return _whole(0, levels, place, (f"{path}: {told}",))
    if view.level is not None:
        if not 0 <= view.level < len(levels):
            raise InputError(
                f"no level {view.level}", path, f"the file has levels 0 to {len(levels) - 1}"
            )
        return _whole(view.level, levels, place, ())
    if view.mpp is not None or view.resolution is not None:
        factor = _asked(view, place, path)
        _check_left(factor, levels[0], view, path)
        return reduced(factor, levels, place, _SAME, path)
    if view.trained_mpp is None and view.trained_resolution is None:
        return _whole(0, levels, place, ())
    trained_factor = _trained(view, place, metres)
    if trained_factor is None or not min(trained_factor) >= 1 / _MOST_ENLARGED:
        trained = (
            f"{view.trained_mpp:g} micrometres per pixel; say what the file has with --source-mpp"
            if view.trained_mpp is not None
            else f"{view.trained_resolution:g} m (or degrees) per pixel; choose with --resolution"
        )
        note = "it is read at full resolution, which may not be the model's: that was trained at"
        return _whole(0, levels, place, (f"{path}: {note} {trained}",))
    _check_left(trained_factor, levels[0], view, path)
    return reduced(trained_factor, levels, place, _SAME_AS_TRAINED, path)


def _check_left(factor: tuple[float, float], size: Size, view: View, path: str) -> None:
    """Raise InputError where a side would be rounded up to a pixel: one resolution is wrong."""
    if min(size[0] / factor[0], size[1] / factor[1]) >= _LEAST_LEFT:
        return
    if view.mpp is not None:
        wanted = f"--mpp {view.mpp:g}"
        do = "choose a finer --mpp, or say what the file has with --source-mpp"
    elif view.resolution is not None:
        wanted, do = f"--resolution {view.resolution:g}", "choose a finer --resolution"
    elif view.trained_mpp is not None:
        wanted = f"the model's {view.trained_mpp:g} micrometres per pixel"
        do = "say what the file has with --source-mpp"
    else:
        wanted = f"the model's {view.trained_resolution:g} m (or degrees) per pixel"
        do = "choose with --resolution"
    raise InputError(
        f"{size[0]}×{size[1]} pixels would be reduced {max(factor):.3g} times, to less than half a "
        f"pixel, for {wanted}", path, do,
    )  # fmt: skip


def _whole(
    level: int, levels: tuple[Size, ...], place: Georeference, notes: tuple[str, ...]
) -> Settled:
    """Return a level as it is."""
    height, width = levels[level]
    scaled = place.scaled(levels[0][0] / height, levels[0][1] / width)
    return Settled(level, levels[level], None, scaled, notes)


def _asked(view: View, place: Georeference, path: str) -> tuple[float, float]:
    """Return how much coarser than full resolution the grid that is asked for is (y, x)."""
    if view.mpp is not None:
        assert place.mpp is not None, "a file without is given one"
        return view.mpp / place.mpp[0], view.mpp / place.mpp[1]
    own = place.ground_resolution
    if own is None:
        raise InputError("tells no ground resolution", path, "leave --resolution out")
    assert view.resolution is not None
    return view.resolution / own[0], view.resolution / own[1]


def _trained(view: View, place: Georeference, metres: float | None) -> tuple[float, float] | None:
    """Return how much coarser the network's own resolution is; None if the file tells none."""
    own = place.ground_resolution
    if view.trained_mpp is not None:
        return (
            None if place.mpp is None
            else (view.trained_mpp / place.mpp[0], view.trained_mpp / place.mpp[1])
        )  # fmt: skip
    if own is None:
        return None
    assert view.trained_resolution is not None
    if metres is None and place.crs_wkt and view.trained_resolution > _MOST_DEGREES:
        return None  # metres say nothing of degrees
    wanted = view.trained_resolution / (metres or 1.0)
    return wanted / own[0], wanted / own[1]


def reduced(
    factor: tuple[float, float],
    levels: tuple[Size, ...],
    place: Georeference,
    same: float,
    path: str,
) -> Settled:
    """Return the grid that is coarser by a factor (y, x), or the level that is as good.

    Parameters
    ----------
    factor : tuple of float
        Pixels of the full resolution per pixel of the grid (y, x).
    levels : tuple of (int, int)
        Height and width of every level.
    place : Georeference
        Of the full resolution.
    same : float
        A level that is finer or coarser by less than this share is read as it is.
    path : str
        For errors.

    Raises
    ------
    InputError
        The grid would be very much finer than the raster.
    """
    if min(factor) < 1 / _MOST_ENLARGED:
        raise InputError(
            f"would be enlarged {1 / min(factor):.3g} times", path,
            f"at most {_MOST_ENLARGED:g} times: choose a coarser --mpp or --resolution",
        )  # fmt: skip
    down = [(levels[0][0] / height, levels[0][1] / width) for height, width in levels]
    level = max(
        index for index, (y, x) in enumerate(down)
        if index == 0 or (y <= factor[0] * (1 + same) and x <= factor[1] * (1 + same))
    )  # fmt: skip
    step = (factor[0] / down[level][0], factor[1] / down[level][1])
    if max(abs(math.log(s)) for s in step) <= same:
        return _whole(level, levels, place, ())
    size = (max(1, round(levels[0][0] / factor[0])), max(1, round(levels[0][1] / factor[1])))
    grid = Resampling(step, levels[level])
    return Settled(level, size, grid, _neat(place.scaled(*factor)), ())


def _neat(place: Georeference) -> Georeference:
    """Return a place without the last digits of its pixel's size, which arithmetic has blurred."""

    def neat(value: float) -> float:
        return float(f"{value:.14g}")

    mpp = None if place.mpp is None else (neat(place.mpp[0]), neat(place.mpp[1]))
    if place.transform is None:
        return replace(place, mpp=mpp)
    a, b, c, d, e, f = place.transform
    return replace(place, mpp=mpp, transform=(neat(a), neat(b), c, neat(d), neat(e), f))
