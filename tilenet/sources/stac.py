"""STAC items: the files of a scene, and which of them and of their bands are meant. No pixels.

Items of the STAC specification 1.0 (extensions ``eo`` and ``raster``) and 1.1 (``bands``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from tilenet.errors import InputError
from tilenet.sources.bands import same_names
from tilenet.sources.fetch import MOST, fetch
from tilenet.sources.remote import RemoteName, is_remote
from tilenet.sources.view import View
from tilenet.strangers import parse_json

__all__ = ["Part", "Told", "is_item", "listing", "parts_of", "read_item"]

Item = Mapping[str, Any]

_RASTERS = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff")
_ENDINGS = (".tif", ".tiff", ".jp2")


@dataclass(frozen=True, slots=True)
class Told:
    """What an item says of a band.

    Parameters
    ----------
    nodata : float or None
        The value that is no measurement.
    scale, offset : float
        A stored number means number · scale + offset.
    """

    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """Bands of one of an item's files, in the order in which they are seen.

    Parameters
    ----------
    asset : str
        What the item calls the file.
    href : str
        Path or URL.
    bands : tuple of int, or None
        Bands from 1; None for those that are chosen as in any other file.
    names : tuple of str
        What the item calls these bands; () with the above.
    told : tuple of Told
        What it says of all bands of the file; () if nothing.
    """

    asset: str
    href: str
    bands: tuple[int, ...] | None
    names: tuple[str, ...]
    told: tuple[Told, ...]


@dataclass(frozen=True, slots=True)
class _Band:
    """One band of one asset, as an item lists it."""

    asset: str
    number: int
    name: str
    common: str
    data: bool
    tiff: bool
    alone: bool


def is_item(name: str) -> bool:
    """Return whether a name is that of a STAC item: by its content if it is a file here."""
    if is_remote(name):
        place = RemoteName(name)
        ending = place.suffix.lower()
        served = "/items/" in f"/{place.key}" and ending not in _ENDINGS  # by a STAC API
        return ending in (".json", ".geojson") or served
    path = Path(name)
    with path.open("rb") as file:
        if file.read(1) != b"{" or path.stat().st_size > MOST:
            return False
    try:
        found = parse_json(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("type") == "Feature" and "stac_version" in found


def read_item(name: str) -> Item:
    """Return an item's content; raises InputError if it is none."""
    try:
        item = parse_json(fetch(name))
    except ValueError as error:
        raise InputError(f"no JSON: {error}", name, "give a STAC item") from error
    good = isinstance(item, dict) and item.get("type") == "Feature" and "stac_version" in item
    if not good or not isinstance(item.get("assets"), dict):
        raise InputError("not a STAC item", name, "give an item, not a catalog or collection")
    return item  # type: ignore[no-any-return]  # checked above


def _place(item_name: str, href: str) -> str:
    """Return where an asset lies, which may be told relative to the item."""
    if is_remote(href):
        return href
    if is_remote(item_name):
        # `urljoin` knows how for the web only.
        scheme, _, rest = item_name.partition("://")
        return f"{scheme}{urljoin(f'https://{rest}', href).removeprefix('https')}"
    return str((Path(item_name).parent / href.removeprefix("file://")).absolute())


def _is_raster(asset: Any) -> bool:
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        return False
    kind, roles = str(asset.get("type", "")), asset.get("roles") or ()
    if {"thumbnail", "overview", "metadata"} & {str(role) for role in roles}:
        return False
    ending = RemoteName(asset["href"]).suffix.lower()
    return kind.startswith(_RASTERS) if kind else ending in _ENDINGS


def _documents(asset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what an asset says of each of its bands, in either version of the specification."""
    lists = [asset.get(key) or [] for key in ("bands", "eo:bands", "raster:bands")]
    lists = [one for one in lists if isinstance(one, list)]
    count = max((len(one) for one in lists), default=0)
    # In version 1.1 what all bands share may stand at the asset itself.
    shared = {
        key: asset[key] for key in ("nodata", "raster:scale", "raster:offset") if key in asset
    }
    found = [dict(shared) for _ in range(count or bool(shared))]
    for one in lists:
        for document, said in zip(found, one, strict=False):
            document.update(said if isinstance(said, dict) else {})
    return found


def _number(value: Any, default: float | None) -> float | None:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _told(document: Mapping[str, Any]) -> Told:
    scale = document.get("raster:scale", document.get("scale"))
    offset = document.get("raster:offset", document.get("offset"))
    return Told(
        _number(document.get("nodata"), None),
        _number(scale, 1.0) or 1.0,
        _number(offset, 0.0) or 0.0,
    )


def _bands(item: Item) -> Iterator[_Band]:
    """Yield every band of every raster of an item."""
    for key, asset in item["assets"].items():
        if not _is_raster(asset):
            continue
        documents = _documents(asset) or [{}]
        for number, document in enumerate(documents, 1):
            yield _Band(
                key,
                number,
                str(document.get("name") or ""),
                str(document.get("eo:common_name") or document.get("common_name") or ""),
                "data" in (asset.get("roles") or ()),
                "tiff" in str(asset.get("type", "tiff")),
                len(documents) == 1,
            )


def listing(item: Item) -> dict[str, list[str]]:
    """Return what an item calls the bands of each of its rasters; "" where it has no name."""
    found: dict[str, list[str]] = {}
    for band in _bands(item):
        found.setdefault(band.asset, []).append(band.name or band.common)
    return found


def _named(wanted: tuple[str, ...], bands: list[_Band]) -> list[_Band] | None:
    """Return the bands of these names, None unless each is exactly one.

    Among the measurements first: many items also hold a picture of some bands, or the same bands
    in another format. An asset's own name counts before its band's, and that before its colour's.
    """
    pools = (
        [b for b in bands if b.data and b.tiff and b.alone],
        [b for b in bands if b.data and b.tiff],
        [b for b in bands if b.data],
        bands,
    )
    for pool in pools:
        for texts in (
            [b.asset if b.alone else "" for b in pool],
            [b.name for b in pool],
            [b.common for b in pool],
        ):
            found = same_names(wanted, tuple(texts))
            if found is not None:
                return [pool[place - 1] for place in found]
    return None


def _listed(bands: list[_Band]) -> str:
    texts = [b.asset if b.alone else f"{b.asset}/{b.name or b.number}" for b in bands]
    return ", ".join(texts[:40]) or "none"


def parts_of(item: Item, name: str, view: View) -> tuple[Part, ...]:
    """Return which files of an item are read, and which of their bands.

    Parameters
    ----------
    item : mapping
        From `read_item`.
    name : str
        Where it was read.
    view : View
        Says the bands: by name, or the network's. Its `variable` chooses one asset.

    Raises
    ------
    InputError
        There is no such band or asset, or several, or nothing says which is meant.
    """
    bands = list(_bands(item))
    assets = tuple(dict.fromkeys(band.asset for band in bands))
    if view.variable is not None:
        if view.variable not in assets:
            raise InputError(
                f"no raster {view.variable}", name, f"--variable: {', '.join(assets) or 'none'}"
            )
        return (_part(item, name, view.variable),)
    asked = view.bands or ()
    if any(isinstance(one, str) for one in asked):
        found = [_named((str(one),), bands) for one in asked]
        lost = [one for one, where in zip(asked, found, strict=True) if where is None]
        if lost:
            raise InputError(
                f"no band, or several, of the name {lost[0]}", name, f"it has {_listed(bands)}"
            )
        return tuple(_joined(item, name, [where[0] for where in found if where], asked))
    if not asked and view.trained_bands:
        where = _named(view.trained_bands, bands)
        if where is not None:
            return tuple(_joined(item, name, where, view.trained_bands))
    if len(assets) == 1:
        return (_part(item, name, assets[0]),)
    raise InputError(
        f"{len(assets)} rasters, and nothing says which is meant", name,
        f"name its bands with --bands, or one raster with --variable: {_listed(bands)}",
    )  # fmt: skip


def _part(item: Item, name: str, key: str) -> Part:
    asset = item["assets"][key]
    return Part(
        key, _place(name, asset["href"]), None, (), tuple(_told(one) for one in _documents(asset))
    )


def _joined(
    item: Item, name: str, bands: list[_Band], names: tuple[int | str, ...]
) -> Iterator[Part]:
    """Yield the files of bands; those that follow each other in one file are read together."""
    pairs = zip(bands, names, strict=True)
    for key, group in groupby(pairs, lambda pair: pair[0].asset):
        some = list(group)
        whole = _part(item, name, key)
        yield Part(
            key,
            whole.href,
            tuple(band.number for band, _ in some),
            tuple(str(text) for _, text in some),
            whole.told,
        )
