"""Which bands of a file are read: by number or by name, as asked or as the network names them."""

from __future__ import annotations

import re

from tilenet.errors import InputError

__all__ = ["bands_in_use", "bands_note", "has_names", "same_names", "scaled_bands"]

Scaling = tuple[tuple[float, float], ...]
"""Per band (scale, offset): a pixel means value · scale + offset."""

_GENERIC = re.compile(r"(band|layer|channel)?[ _-]?\d*")
_CODE = re.compile(r"(?<![a-z0-9])b0*(\d{1,2}a?)(?![a-z0-9])")
"""``B04`` of Sentinel-2, ``B4`` and ``SR_B4`` of Landsat, alone or with words around them."""
_SHORT = {"r": "red", "g": "green", "b": "blue"}
_COLOURS = frozenset(
    ["red", "green", "blue", "pan", "coastal", "rededge", "nir", "swir", "mwir", "lwir", "tir"]
)


def _plain(name: str) -> str:
    text = name.strip().casefold()
    return "" if _GENERIC.fullmatch(text) else _SHORT.get(text, text)


def _code(name: str) -> str:
    found = _CODE.search(name.casefold().replace("_", " "))
    return "" if found is None else found[1]


def has_names(names: tuple[str, ...]) -> bool:
    """Return whether any band is called something else than by its number."""
    return any(_plain(name) for name in names)


def _named(
    wanted: tuple[str, ...], names: tuple[str, ...], colours: tuple[str, ...]
) -> tuple[int, ...] | None:
    """Return the bands of these names, None unless each is exactly one of the file's.

    The file's own names come first, then the codes in them, then the colours that it gives.
    """
    found = same_names(wanted, names)
    if found is not None:
        return found
    known = [colour if colour in _COLOURS else "" for colour in colours]
    return _each([_plain(name) for name in wanted], known)


def same_names(wanted: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the place, from 1, of each name, spelled one way or another, or by its code.

    None unless each of them is exactly one of `names`.
    """
    for spelled in (_plain, _code):
        texts = [spelled(name) for name in names]
        found = _each([spelled(name) for name in wanted], texts)
        if found is not None:
            return found
    return None


def _each(wanted: list[str], texts: list[str]) -> tuple[int, ...] | None:
    """Return the place of each text, from 1; None if one is not there, or more than once."""
    if not all(wanted) or any(texts.count(text) != 1 for text in wanted):
        return None
    return tuple(texts.index(text) + 1 for text in wanted)


def _listed(names: tuple[str, ...], colours: tuple[str, ...]) -> str:
    every = names if has_names(names) else tuple(c if c in _COLOURS else "" for c in colours)
    return ", ".join(name for name in every if name) or "none"


def bands_in_use(
    asked: tuple[int | str, ...] | None,
    trained: tuple[str, ...],
    default: tuple[int, ...],
    names: tuple[str, ...],
    path: str,
    colours: tuple[str, ...] = (),
) -> tuple[int, ...]:
    """Return the bands to read, from 1.

    Parameters
    ----------
    asked : tuple of int or str, or None
        Numbers and names that the user gives, in the model's order.
    trained : tuple of str
        The model's names of its bands; () if it has none. Followed where nothing is asked for and
        the file has bands of all these names.
    default : tuple of int
        What is read otherwise.
    names : tuple of str
        What the file calls its bands, all of them; "" where it has no name.
    path : str
        For errors.
    colours : tuple of str
        GDAL's colour interpretation of every band.

    Raises
    ------
    InputError
        There is no such band, or none at all.
    """
    if asked is None:
        bands = (_named(trained, names, colours) if trained else None) or default
    else:
        bands = tuple(_one(band, names, colours, path) for band in asked)
    missing = [b for b in bands if not 1 <= b <= len(names)]
    if missing:
        raise InputError(
            f"no band {missing[0]}", path, f"--bands counts from 1; the file has {len(names)}"
        )
    if not bands:
        raise InputError("no bands", path)
    return bands


def _one(band: int | str, names: tuple[str, ...], colours: tuple[str, ...], path: str) -> int:
    if isinstance(band, int):
        return band
    found = _named((band,), names, colours)
    if found is None:
        raise InputError(
            f"no band, or several, of the name {band}", path,
            f"--bands takes numbers from 1 too; its names: {_listed(names, colours)}",
        )  # fmt: skip
    return found[0]


def bands_note(
    bands: tuple[int, ...], trained: tuple[str, ...], names: tuple[str, ...]
) -> str | None:
    """Return what the user should know of bands that were not asked for, None if nothing."""
    if not trained:
        return None
    if bands != tuple(range(1, len(bands) + 1)):
        chosen = ", ".join(f"{band} ({name})" for band, name in zip(bands, trained, strict=False))
        return f"its bands are read in the model's order, by name: {chosen}"
    own = tuple(names[band - 1] for band in bands)
    if len(own) == len(trained) and has_names(own) and _named(trained, own, ()) != bands:
        ours, theirs = ", ".join(own), ", ".join(trained)
        return f"its bands are called {ours}, the model's {theirs}: taken one for one"
    return None


def scaled_bands(
    bands: tuple[int, ...], scaling: Scaling, asked: str | None, path: str
) -> Scaling | None:
    """Return what the pixels are multiplied with and raised by, None if they stay as stored.

    Parameters
    ----------
    bands : tuple of int
        Bands in use.
    scaling : tuple of (float, float)
        What the file says, for each of them.
    asked : {"apply", "stored"} or None
        What the user says.
    path : str
        For errors.

    Raises
    ------
    InputError
        The file says that its numbers are not what they mean, and the user does not say which the
        network shall see.
    """
    said = {
        band: one for band, one in zip(bands, scaling, strict=True) if one != (1.0, 0.0)
    }  # fmt: skip
    if not said or asked == "stored":
        return None
    band, (scale, offset) = next(iter(said.items()))
    if asked is None:
        raise InputError(
            f"band {band} means {scale:.10g} times its stored numbers, plus {offset:.10g}", path,
            "say what the model was trained on: --scaling apply, or stored (numbers as they are)",
        )  # fmt: skip
    if not all(abs(value) < float("inf") for one in said.values() for value in one):
        raise InputError(
            f"band {band} cannot be scaled by {scale:g} and {offset:g}", path, "--scaling stored"
        )
    return scaling
