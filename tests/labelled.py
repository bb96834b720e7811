"""Labelled images made up on the spot: bright discs on a noisy ground, in every layout."""

import csv
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import from_origin

SIDE = 64


def disc(seed, side=SIDE, count=3):
    """Return grey pixels (side, side) uint8 and object numbers (side, side) int32."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    objects = np.zeros((side, side), np.int32)
    for number in range(1, count + 1):
        row, col = rng.integers(8, side - 8, 2)
        objects[(y - row) ** 2 + (x - col) ** 2 < rng.integers(16, 64)] = number
    grey = rng.normal(60, 10, (side, side)) + 120 * (objects > 0)
    return grey.clip(0, 255).astype(np.uint8), objects


def cut(path, share=0.9):
    """Cut a file off after a share of its bytes."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(share * len(data))])


def rgb(grey):
    return np.stack([grey, grey // 2, 255 - grey], axis=-1)


def pairs(folder, count=6, mask=lambda objects: ((objects > 0) * 255).astype(np.uint8), **names):
    """Write images/ and masks/; `names` may give folders, endings and a mask suffix."""
    folder = Path(folder)
    images = folder / names.get("images", "images")
    masks = folder / names.get("masks", "masks")
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        grey, objects = disc(k)
        options = {"quality": 95} if names.get("ending") == ".jpg" else {}
        Image.fromarray(rgb(grey)).save(images / f"i{k}{names.get('ending', '.png')}", **options)
        name = f"i{k}{names.get('suffix', '')}{names.get('mask_ending', '.png')}"
        Image.fromarray(mask(objects)).save(masks / name)
    return folder


def carvana(folder):
    """Write JPG photos in train/ and GIF masks with a suffix in train_masks/."""
    return pairs(
        folder,
        images="train",
        masks="train_masks",
        ending=".jpg",
        suffix="_mask",
        mask_ending=".gif",
    )


def coloured(folder):
    """Write masks of three colours, one of them ring-shaped and rare."""

    def paint(objects):
        out = np.zeros((*objects.shape, 3), np.uint8)
        out[objects == 1] = (255, 120, 80)
        out[objects > 1] = (0, 0, 255)
        return out

    return pairs(folder, mask=paint)


def suffix(folder):
    """Write images and masks side by side."""
    return pairs(folder, images=".", masks=".", suffix="_label")


def by_part(folder):
    """Write train/ and val/, each with images/ and masks/."""
    pairs(Path(folder) / "train", 4)
    pairs(Path(folder) / "val", 2)
    return Path(folder)


def dsb(folder):
    """Write one folder per image and one mask per object, RGBA."""
    for k in range(6):
        grey, objects = disc(k)
        root = Path(folder) / f"id{k}"
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        rgba = np.dstack([rgb(grey), np.full_like(grey, 255)])
        Image.fromarray(rgba).save(root / "images" / f"id{k}.png")
        for number in range(1, int(objects.max()) + 1):
            plane = ((objects == number) * 255).astype(np.uint8)
            Image.fromarray(plane).save(root / "masks" / f"{number}.png")
    return Path(folder)


def stack(folder):
    """Write two multi-page TIFFs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    greys, objects = zip(*(disc(k) for k in range(5)), strict=True)
    for name, planes in (
        ("volume.tif", [Image.fromarray(g) for g in greys]),
        ("labels.tif", [Image.fromarray(((o > 0) * 255).astype(np.uint8)) for o in objects]),
    ):
        planes[0].save(folder / name, save_all=True, append_images=planes[1:])
    return folder


def table(folder):
    """Write a CSV manifest that names the split."""
    folder = pairs(folder, images="a", masks="b", suffix="_x")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "split"])
        for k in range(6):
            writer.writerow([f"a/i{k}.png", f"b/i{k}_x.png", "val" if k == 0 else "train"])
    return folder


def scene(path, pixels, crs="EPSG:32631"):
    """Write a GeoTIFF of (C, H, W) at 10 m."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "height": pixels.shape[1], "width": pixels.shape[2],
        "count": len(pixels), "dtype": pixels.dtype, "crs": crs,
        "transform": from_origin(500000, 5600000, 10, 10),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels)


def raster(folder):
    """Write one large raster and its label raster."""
    grey, objects = disc(1, 256, 40)
    scene(Path(folder) / "scene.tif", np.moveaxis(rgb(grey), -1, 0))
    scene(Path(folder) / "scene_label.tif", (objects > 0).astype(np.uint8)[None])
    return Path(folder)


def vector(folder, ending=".geojson", crs="EPSG:4326", side=256):
    """Write a raster, squares as polygons in another CRS, and a labelled area."""
    import geopandas
    from shapely.geometry import box

    rng = np.random.default_rng(0)
    grey = rng.normal(60, 10, (side, side))
    squares = []
    for _ in range(60):
        row, col = rng.integers(0, side - 12, 2)
        grey[row : row + 12, col : col + 12] = 180
        x, y = 500000 + 10 * col, 5600000 - 10 * row
        squares.append(box(x, y - 120, x + 120, y))
    grey = grey.clip(0, 255).astype(np.uint8)
    folder = Path(folder)
    scene(folder / "scene.tif", np.moveaxis(rgb(grey), -1, 0))
    frame = geopandas.GeoDataFrame(
        {"kind": ["a", "b"] * 30}, geometry=squares, crs="EPSG:32631"
    ).to_crs(crs)
    path = folder / f"houses{ending}"
    frame.to_parquet(path) if ending == ".parquet" else frame.to_file(path)
    place = box(500000, 5600000 - 10 * side, 500000 + 10 * side * 3 // 4, 5600000)
    area = geopandas.GeoDataFrame(geometry=[place], crs="EPSG:32631").to_crs("EPSG:3857")
    area.to_file(folder / "labelled_area.geojson")
    return folder
