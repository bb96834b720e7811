"""A mask as a label of an OME-Zarr image: what the image says of itself, and the list of labels.

The image is somebody else's: of its files, only the list of its labels is written, and the second
copy that consolidated metadata keeps of it; all else in them stays.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilenet import durable
from tilenet.errors import InputError, OutputError
from tilenet.filelock import turn
from tilenet.sinks.spec import LabelOf, ZarrFormat
from tilenet.strangers import parse_json

__all__ = ["Image", "enlist", "is_listed", "label_path", "read_image"]

_LABELS = "labels"
_V2_FILES = (".zgroup", ".zarray", ".zattrs")

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Image:
    """An OME-Zarr image that can take a label.

    Parameters
    ----------
    height, width : int
        Pixels at its first level.
    zarr_format : {2, 3}
        2 for OME-Zarr 0.4, 3 for 0.5.
    label : LabelOf
        What a label of it must agree with.
    """

    height: int
    width: int
    zarr_format: ZarrFormat
    label: LabelOf


def label_path(root: Path, model: str) -> Path:
    """Return where the mask of a model lies in the image at `root`; what is no name becomes "-"."""
    return root.resolve() / _LABELS / f"tilenet-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)}"


def read_image(root: Path) -> Image:
    """Return what the OME-Zarr image at `root` says of itself.

    Raises
    ------
    InputError
        If there is no image of OME-Zarr 0.4 or 0.5, or its metadata cannot be right.
    """
    zarr_format: ZarrFormat = 3 if (root / "zarr.json").is_file() else 2
    try:
        attributes = _attributes(root, zarr_format)
        multiscale = attributes["multiscales"][0]
        version = attributes["version"] if zarr_format == 3 else multiscale.get("version", "0.4")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            "no OME-Zarr image", root, "name the group that has `multiscales`, perhaps IMAGE/0"
        ) from error
    if version != ("0.5" if zarr_format == 3 else "0.4"):
        raise InputError(f"OME-Zarr {version} is not known", root, "convert it to 0.4 or 0.5")
    try:
        _listed(root / _LABELS, zarr_format)
        return _image(root, zarr_format, multiscale)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the OME-Zarr metadata cannot be right ({type(error).__name__}: {error})",
            root,
            "correct it",
        ) from error


def _image(root: Path, zarr_format: ZarrFormat, multiscale: Document) -> Image:
    names = [axis["name"] for axis in multiscale["axes"]]
    y, x = names.index("y"), names.index("x")
    datasets = multiscale["datasets"]
    array = _read(root / datasets[0]["path"] / ("zarr.json" if zarr_format == 3 else ".zarray"))
    height, width = (int(array["shape"][axis]) for axis in (y, x))
    scale, offset = [1.0, 1.0], [0.0, 0.0]
    # A dataset's own come first, then those of the whole pyramid.
    for one in (datasets[0], multiscale):
        for step in one.get("coordinateTransformations", []):
            for k, axis in enumerate((y, x)):
                if step["type"] == "scale":
                    scale[k] *= float(step["scale"][axis])
                    offset[k] *= float(step["scale"][axis])
                elif step["type"] == "translation":
                    offset[k] += float(step["translation"][axis])
    units = tuple(multiscale["axes"][axis].get("unit") for axis in (y, x))
    label = LabelOf(len(datasets), (scale[0], scale[1]), (offset[0], offset[1]), units)
    return Image(height, width, zarr_format, label)


def is_listed(out: Path) -> bool:
    """Return whether the label at `out` is in its image's list."""
    try:
        return out.name in _listed(out.parent, _format(out))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return False


def enlist(out: Path, scratch: Path) -> None:
    """Add the finished label at `out` to its image's list; what else is in there stays.

    Each file is replaced whole, and is on disk when the call returns. Running it again changes
    nothing.

    Parameters
    ----------
    out : Path
        The label: `IMAGE/labels/NAME`.
    scratch : Path
        Folder of the same file system for what is not complete.

    Raises
    ------
    OutputError
        If the list does not read, or the disk has no locks.
    """
    zarr_format, labels = _format(out), out.parent
    with turn(labels):
        try:
            names = _listed(labels, zarr_format)
            names += [] if out.name in names else [out.name]
            _write_list(labels, names, zarr_format, scratch)
            group = labels
            while True:
                _consolidate(group, out, zarr_format, scratch)
                if _metadata(group.parent, zarr_format) is None:
                    break
                group = group.parent
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise OutputError("the list of labels does not read", labels, "correct it") from error


def _format(out: Path) -> ZarrFormat:
    return 3 if (out / "zarr.json").is_file() else 2


def _read(path: Path) -> Document:
    found = parse_json(path.read_bytes())
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} is no object")
    return found


def _metadata(group: Path, zarr_format: ZarrFormat) -> Document | None:
    """Return a group's own document, None if there is no group."""
    try:
        return _read(group / ("zarr.json" if zarr_format == 3 else ".zgroup"))
    except FileNotFoundError:
        return None


def _attributes(group: Path, zarr_format: ZarrFormat) -> Document:
    """Return OME's attributes of a group."""
    if zarr_format == 3:
        found = _read(group / "zarr.json").get("attributes", {})
        return dict(found.get("ome", {}))
    return _read(group / ".zattrs")


def _listed(labels: Path, zarr_format: ZarrFormat) -> list[str]:
    try:
        names = _attributes(labels, zarr_format).get("labels", [])
    except FileNotFoundError:
        return []
    if not isinstance(names, list):
        raise TypeError("the labels are no list")
    return list(names)


def _write(path: Path, document: Mapping[str, Any], scratch: Path) -> None:
    data = json.dumps(document, indent=2).encode()
    if not path.exists() or path.read_bytes() != data:
        durable.write(path, data, scratch=scratch)


def _write_list(labels: Path, names: list[str], zarr_format: ZarrFormat, scratch: Path) -> None:
    if zarr_format == 3:
        group = _metadata(labels, 3) or {"zarr_format": 3, "node_type": "group"}
        attributes = dict(group.get("attributes", {}))
        ome = {"version": "0.5", **attributes.get("ome", {}), "labels": names}
        _write(labels / "zarr.json", group | {"attributes": attributes | {"ome": ome}}, scratch)
        return
    if _metadata(labels, 2) is None:
        _write(labels / ".zgroup", {"zarr_format": 2}, scratch)
    path = labels / ".zattrs"
    _write(path, (_read(path) if path.exists() else {}) | {"labels": names}, scratch)


def _consolidate(group: Path, out: Path, zarr_format: ZarrFormat, scratch: Path) -> None:
    """Add the label to a group's consolidated metadata, which readers believe; if it has any."""
    path = group / ("zarr.json" if zarr_format == 3 else ".zmetadata")
    if not path.exists():
        return
    document = _read(path)
    kept = document.get("consolidated_metadata") if zarr_format == 3 else document
    if not kept:
        return
    name = out.relative_to(group).as_posix()
    entries = {
        key: value for key, value in kept["metadata"].items()
        if key != name and not key.startswith(f"{name}/")
    }  # fmt: skip
    entries |= dict(_entries(group, out, zarr_format))
    if group != out.parent:
        entries |= dict(_own_entries(group, out.parent, zarr_format))
    kept["metadata"] = entries
    _write(path, document, scratch)


def _entries(group: Path, out: Path, zarr_format: ZarrFormat) -> Iterator[tuple[str, Document]]:
    """Yield the metadata of the label's groups and arrays, as consolidated metadata names them."""
    for folder, folders, files in os.walk(out):
        folders.sort()
        if ".zarray" in files or (zarr_format == 3 and "c" in folders):
            folders.clear()  # below an array there are only chunks
        yield from _own_entries(group, Path(folder), zarr_format)


def _own_entries(
    group: Path, node: Path, zarr_format: ZarrFormat
) -> Iterator[tuple[str, Document]]:
    name = node.relative_to(group).as_posix()
    if zarr_format == 3:
        if (node / "zarr.json").exists():
            own = _read(node / "zarr.json")
            own.pop("consolidated_metadata", None)
            yield name, own
        return
    for file in _V2_FILES:
        if (node / file).exists():
            yield f"{name}/{file}", _read(node / file)
