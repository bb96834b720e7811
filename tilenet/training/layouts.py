"""How images and labels lie on disk: one function per layout, and the one that recognises them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tilenet.errors import InputError
from tilenet.sources.folder import SUFFIXES
from tilenet.training import vectors
from tilenet.training.config import Format, TrainConfig
from tilenet.training.images import ImageRef, open_image, page_count
from tilenet.training.labels import MaskFile, ObjectMasks
from tilenet.training.samples import Found, Problem, Sample

__all__ = ["find_samples", "mask_stem"]

_MASK_WORD = re.compile(
    r"(masks?|(?<!un)labels?|annot\w*|truth|response|segm\w*)|(^|[_\-])(gt|seg)([_\-]|$)", re.I
)
_MASK_SUFFIX = re.compile(r"[_\-. ](masks?|labels?|gt|seg|segmentation|annotation)$", re.I)
_AREA_WORD = re.compile(r"(location|area|aoi|labell?ed|extent)", re.I)
_STACK_FILES = 2
_PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
_LEFT_OUT = ("test", "tests", "testing", "holdout")


def _rasters(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )  # fmt: skip


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def mask_stem(path: Path) -> str:
    """Return a mask's name without ending and without a suffix like "_mask"."""
    return _MASK_SUFFIX.sub("", path.stem)


def _by_stem(paths: list[Path], masks: bool, found: Found) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        stem = mask_stem(path) if masks else path.stem
        if stem in named:
            found.problems.append(
                Problem(f"{named[stem].name} and {path.name} have one stem", str(path))
            )
        named.setdefault(stem, path)
    return named


def _pair(
    images: list[Path], masks: list[Path], config: TrainConfig, found: Found, prefix: str = ""
) -> None:
    """Pair images and masks by stem; the masks' may carry a suffix."""
    by_stem = _by_stem(images, False, found)
    exact = {path.stem: path for path in masks}
    # A suffix is one only where the plain stems do not pair already.
    named = exact if set(exact) & set(by_stem) else _by_stem(masks, True, found)
    for stem, image in by_stem.items():
        if stem not in named:
            found.problems.append(Problem("an image without a mask", str(image)))
            continue
        ref = ImageRef(str(image), 0, config.bands, config.scaling)
        found.samples.append(Sample(prefix + stem, ref, MaskFile(str(named[stem]))))
    for stem, mask in named.items():
        if stem not in by_stem:
            found.problems.append(Problem("a mask without an image", str(mask)))


def _two_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of masks inside `folder`, if it has just these."""
    children = [child for child in _folders(folder) if _rasters(child)]
    masks = [child for child in children if _MASK_WORD.search(child.name)]
    if len(masks) != 1:
        return None
    others = [child for child in children if child != masks[0]]
    bare = _MASK_WORD.sub("", masks[0].name).strip("_-").casefold()
    named = [o for o in others if o.name.casefold() in (bare, "images", "image", "imgs", "img")]
    chosen = named or others
    return (chosen[0], masks[0]) if len(chosen) == 1 or named else None


def _pairs(folder: Path, config: TrainConfig, prefix: str = "") -> Found | None:
    both = _two_folders(folder)
    if both is not None:
        found = Found(f"images in {both[0].name}/, masks in {both[1].name}/")
        _pair(_rasters(both[0]), _rasters(both[1]), config, found, prefix)
        return found
    rasters = _rasters(folder)
    masks = [p for p in rasters if _MASK_SUFFIX.search(p.stem)]
    if not masks and len(rasters) == 2:  # one raster and its label raster
        masks = [p for p in rasters if _MASK_WORD.search(p.stem)]
        if len(masks) == 1:
            found = Found("one raster and its label raster")
            image = next(p for p in rasters if p not in masks)
            ref = ImageRef(str(image), 0, config.bands, config.scaling)
            found.samples.append(Sample(prefix + image.stem, ref, MaskFile(str(masks[0]))))
            return found
    if not masks:
        return None
    found = Found("images and masks in one folder, masks with a suffix")
    _pair([p for p in rasters if p not in masks], masks, config, found, prefix)
    return found


def _by_part(folder: Path, config: TrainConfig) -> Found | None:
    """Recognise train/ and val/ folders, each with images and masks."""
    parts = {_PARTS[c.name.lower()]: c for c in _folders(folder) if c.name.lower() in _PARTS}
    if "train" not in parts or _two_folders(folder) is not None:
        return None
    whole: Found | None = None
    for part, child in sorted(parts.items()):
        found = _pairs(child, config, f"{part}/" if len(parts) > 1 else "")
        if found is None:
            return None
        label = part if len(parts) > 1 else ""
        samples = [replace(s, part=label) for s in found.samples]
        if whole is None:
            names = " and ".join(f"{c.name}/" for c in parts.values())
            whole = Found(f"{found.layout}, in {names}")
        whole.samples += samples
        whole.problems += found.problems
    return whole


def _dsb(folder: Path, config: TrainConfig) -> Found | None:
    """Recognise the Data Science Bowl's: ID/images/ID.png and ID/masks/*.png."""
    for root in (folder, *_folders(folder)):
        children = _folders(root)
        if any((c / "images").is_dir() and (c / "masks").is_dir() for c in children):
            break
    else:
        return None
    found = Found("one folder per image, one mask per object (Data Science Bowl)")
    for child in children:
        images = _rasters(child / "images") if (child / "images").is_dir() else []
        masks = _rasters(child / "masks") if (child / "masks").is_dir() else None
        if len(images) != 1:
            found.problems.append(Problem(f"{len(images)} images where 1 is wanted", str(child)))
        elif masks is None:
            found.problems.append(Problem("an image without a mask", str(images[0])))
        else:
            label = ObjectMasks(tuple(map(str, masks)), str(child / "masks"))
            ref = ImageRef(str(images[0]), 0, config.bands, config.scaling)
            found.samples.append(Sample(child.name, ref, label))
    return found


def _stack(folder: Path, config: TrainConfig) -> Found | None:
    """Recognise two multi-page TIFFs, one of them the labels."""
    rasters = _rasters(folder)
    if len(rasters) != _STACK_FILES:
        return None
    rasters = [p for p in rasters if page_count(p) > 1]
    masks = [p for p in rasters if _MASK_WORD.search(p.stem)]
    images = [p for p in rasters if p not in masks]
    if len(masks) != 1 or len(images) != 1:
        return None
    pages = page_count(images[0])
    found = Found(f"two multi-page TIFFs, {pages} pages")
    if page_count(masks[0]) != pages:
        found.problems.append(
            Problem(f"{pages} pages of images, {page_count(masks[0])} of labels", str(masks[0]))
        )
    for page in range(1, min(pages, page_count(masks[0])) + 1):
        ref = ImageRef(str(images[0]), page, config.bands, config.scaling)
        name = f"{images[0].stem}-{page:04d}"
        found.samples.append(Sample(name, ref, MaskFile(str(masks[0]), page)))
    return found


def _vector_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in vectors.SUFFIXES and path.is_file() and not hidden:
            yield path


def _vector(folder: Path, config: TrainConfig) -> Found | None:
    """Recognise rasters and a file of polygons, perhaps another one of the labelled area."""
    files = [] if config.labels else list(_vector_files(folder))
    areas = [p for p in files if _AREA_WORD.search(p.stem)]
    labels = [p for p in files if p not in areas] or areas
    if config.labels is None and len(labels) != 1:
        return None
    area = config.area or (areas[0] if areas and areas[0] not in labels else None)
    path = config.labels or labels[0]
    rasters = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
    ) if folder.is_dir() else [folder]  # fmt: skip
    if not rasters:
        return None
    present = vectors.read_classes(str(path), config.class_column)
    names = config.classes[1:] if config.class_column and config.classes else present
    within = f", labelled inside {area.name}" if area else ""
    found = Found(f"rasters and polygons of {path.name}{within}", class_names=names)
    for name in sorted(set(present) - set(names)):
        found.problems.append(Problem(f"polygons of {name}: outside the classes", str(path)))
    for raster in rasters:
        ref = ImageRef(str(raster), 0, config.bands, config.scaling)
        try:
            image = open_image(ref)
        except InputError as error:
            found.problems.append(Problem(error.what, str(raster)))
            continue
        grid = vectors.Grid.of(image.placed, image.height, image.width)
        image.close()
        if grid is None:
            found.problems.append(Problem("no CRS and transform to lay polygons over", str(raster)))
            continue
        label = vectors.Polygons(
            str(path), None if area is None else str(area), grid, names, config.class_column
        )
        stem = raster.relative_to(folder).with_suffix("") if folder.is_dir() else raster.stem
        found.samples.append(Sample(str(stem), ref, label))
    return found


def _manifest(path: Path, config: TrainConfig) -> Found | None:
    """Recognise a CSV with the columns image, mask and perhaps split."""
    if path.is_dir():
        tables = sorted(path.glob("*.csv"))
        if len(tables) != 1:
            return None
        path = tables[0]
    if path.suffix.lower() != ".csv":
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise InputError(f"no table: {error}", path, "give a CSV in UTF-8") from error
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    mask = next((columns[n] for n in ("mask", "label", "masks", "labels") if n in columns), None)
    if "image" not in columns or mask is None:
        return None
    found = Found(f"the table {path.name}")
    for number, row in enumerate(rows, 2):
        image, label = row[columns["image"]] or "", row[mask] or ""
        where = f"{path} line {number}"
        part = (row[columns["split"]] or "").strip().lower() if "split" in columns else ""
        if part in _LEFT_OUT:
            continue
        if part and part not in _PARTS:
            found.problems.append(Problem(f"split {part!r} is none of train, val, test", where))
            continue
        if not Path(image).name or not Path(label).name:
            missing = "mask" if Path(image).name else "image"
            found.problems.append(Problem(f"no {missing} in the table", where))
            continue
        ref = ImageRef(str(path.parent / image), 0, config.bands, config.scaling)
        sample = Sample(
            str(Path(image).with_suffix("")), ref, MaskFile(str(path.parent / label)),
            part=_PARTS.get(part, ""),
        )  # fmt: skip
        found.samples.append(sample)
    return found


_LAYOUTS = {
    Format.CSV: _manifest,
    Format.DSB: _dsb,
    Format.STACK: _stack,
    Format.VECTOR: _vector,
}


def _recognise(folder: Path, config: TrainConfig) -> Found | None:
    if config.labels is not None or folder.is_file():
        found = _manifest(folder, config) if config.labels is None else None
        return found or _vector(folder, config)
    for layout in (_by_part, _dsb, _stack, _pairs, _manifest, _vector):
        found = layout(folder, config)
        if found is not None:
            return found
    children = _folders(folder)
    return _recognise(children[0], config) if len(children) == 1 else None


def find_samples(config: TrainConfig) -> Found:
    """Find the images and labels of a data set; nothing is read but names.

    Raises
    ------
    InputError
        Nothing there, or no layout that is known.
    """
    data = config.data
    if not data.exists():
        raise InputError("no such file or folder", data, "check the path")
    if config.format is Format.AUTO:
        found = _recognise(data, config)
    elif config.format is Format.PAIRS:
        found = _by_part(data, config) or _pairs(data, config)
    else:
        found = _LAYOUTS[config.format](data, config)
    if found is None or not (found.samples or found.problems):
        raise InputError(
            "no images with labels are recognised",
            data,
            "images/ and masks/ with equal stems, a table image,mask, or see --format",
        )
    found.samples.sort(key=lambda sample: sample.name)
    return found
