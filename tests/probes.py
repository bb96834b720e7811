"""Readers of masks, each asked the same: the class at three places, the CRS, the pixel's size.

A probe uses its reader the way a user would, and nothing of tilenet's. It answers by pixel, and by
coordinate if its reader has coordinates; what the reader does not know stays None.
"""

import csv
import json
import math
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
import zarr
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine


@dataclass(frozen=True)
class Question:
    """Where to look: pixels (row, col), and places (x, y) in them in CRS units or µm.

    They are corners of patches of 3 × 3 pixels, whose middles are `middles`.
    """

    pixels: tuple[tuple[int, int], ...]
    places: tuple[tuple[float, float], ...]
    middles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Seen:
    """What a reader found; `mpp` is (y, x) in µm; `ids` is False for colours in place of ids."""

    by_pixel: tuple[int, ...]
    by_place: tuple[int, ...] | None = None
    crs: CRS | None = None
    mpp: tuple[float, float] | None = None
    ids: bool = True


class Absent(Exception):
    """The reader is not on this machine; the message says which."""


Probe = Callable[[Path, Question], Seen]


def _answers(read, ask, transform=None, **rest):
    """Look up pixels by `read(row, col)`, and places through an affine of pixel corners."""

    def look(row, col):
        try:
            return int(read(row, col)) if min(row, col) >= 0 else -1
        except IndexError:
            return -1

    by_place = None
    if transform is not None:
        corners = (~transform @ place for place in ask.places)
        by_place = tuple(look(math.floor(row), math.floor(col)) for col, row in corners)
    return Seen(tuple(look(*pixel) for pixel in ask.pixels), by_place, **rest)


def _node(path, name):
    return f'ZARR:"{path}":/{name}' if path.suffix == ".zarr" else str(path)


def _mpp_of_tags(tags):
    """Return µm per pixel by a TIFF's resolution tags as GDAL gives them (unit 3: centimetre)."""
    if not tags.get("TIFFTAG_RESOLUTIONUNIT", "").startswith("3"):
        return None
    return tuple(1e4 / float(tags[f"TIFFTAG_{axis}RESOLUTION"]) for axis in "YX")


def read_rasterio(path, ask):
    with rasterio.open(_node(path, "mask")) as src:
        data, mpp = src.read(1), _mpp_of_tags(src.tags())
        transform = None if src.transform.is_identity else src.transform
        if transform is not None and src.crs is None:
            mpp = (transform.e, transform.a)  # the units of a slide's `x` and `y`
        elif mpp is not None:
            transform = Affine.scale(mpp[1], mpp[0])
        return _answers(lambda r, c: data[r, c], ask, transform, crs=src.crs, mpp=mpp)


def read_xarray(path, ask):
    with xr.open_zarr(path, decode_coords="all", mask_and_scale=False) as data:
        mask, by_place, mpp = data["mask"], None, None
        if "x" in mask.coords:
            steps = [float(mask[axis][1] - mask[axis][0]) for axis in "yx"]
            half = 0.5001 * max(map(abs, steps))
            by_place = tuple(
                int(mask.sel(x=x, y=y, method="nearest", tolerance=half)) for x, y in ask.places
            )
            mpp = tuple(steps) if mask["x"].attrs.get("units") == "micrometer" else None
        wkt = data.coords["spatial_ref"].attrs.get("crs_wkt") if "spatial_ref" in data else None
        crs = None if wkt is None else CRS.from_wkt(wkt)
        return Seen(tuple(int(mask[r, c]) for r, c in ask.pixels), by_place, crs, mpp)


def read_rioxarray(path, ask):
    import rioxarray

    opened = (
        xr.open_zarr(path, decode_coords="all", mask_and_scale=False)
        if path.suffix == ".zarr"
        else rioxarray.open_rasterio(path)
    )
    with opened:
        mask = opened["mask"] if path.suffix == ".zarr" else opened[0]
        transform, values = mask.rio.transform(), mask.to_numpy()
        mpp = None
        if mask.rio.crs is None and path.suffix == ".zarr" and not transform.is_identity:
            mpp = (transform.e, transform.a)
        elif mask.rio.crs is None:
            mpp = _mpp_of_tags({key: str(value) for key, value in opened.attrs.items()})
            transform = None if mpp is None else Affine.scale(mpp[1], mpp[0])
        if transform is not None and transform.is_identity:
            transform = None
        return _answers(lambda r, c: values[r, c], ask, transform, crs=mask.rio.crs, mpp=mpp)


def read_zarr(path, ask):
    group = zarr.open_group(path, mode="r")
    mask, transform, crs, mpp = group["mask"][...], None, None, None
    if "x" in group:
        (left, next_), (top, below) = group["x"][:2], group["y"][:2]
        dx, dy = next_ - left, below - top
        transform = Affine(dx, 0, left - dx / 2, 0, dy, top - dy / 2)
        mpp = (dy, dx) if group["x"].attrs["units"] == "micrometer" else None
    if "spatial_ref" in group:
        crs = CRS.from_wkt(group["spatial_ref"].attrs["crs_wkt"])
    return _answers(lambda r, c: mask[r, c], ask, transform, crs=crs, mpp=mpp)


def read_zarr_cm(path, ask):
    import zarr_cm

    group = zarr.open_group(path, mode="r")
    attributes, mask = group.attrs.asdict(), group["mask"][...]
    zarr_cm.validate_all(attributes)
    if set(zarr_cm.detect_revisions(attributes)) != {"multiscales", "proj", "spatial"}:
        return _answers(lambda r, c: mask[r, c], ask)
    _, found = zarr_cm.extract_all(attributes)
    spatial, proj = found["spatial"], found["proj"]
    transform = Affine(*spatial["spatial:transform"])
    crs = CRS.from_user_input(proj["proj:code"])
    return _answers(lambda r, c: mask[r, c], ask, transform, crs=crs)


def _ome(scale, translation, units, read, ask):
    """Answer from OME's transformations.

    They place centres: the first pixel's at the translation, half a pixel from where we begin.
    """
    if set(units) != {"micrometer"}:
        return _answers(read, ask)
    (dy, dx), (top, left) = scale, translation
    transform = Affine(dx, 0, left, 0, dy, top)
    return _answers(read, ask, transform, mpp=(dy, dx))


def read_ome_zarr(path, ask):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    node = next(iter(Reader(parse_url(str(path)))()))
    mask = np.asarray(node.data[0])
    steps = {k: v for one in node.metadata["coordinateTransformations"][0] for k, v in one.items()}
    units = [axis.get("unit") for axis in node.metadata["axes"]]
    return _ome(steps["scale"], steps["translation"], units, lambda r, c: mask[r, c], ask)


def read_ome_labels(path, ask):
    from ome_zarr import OMEZarrLabels

    level = OMEZarrLabels.from_ome_zarr(zarr.open_group(path, mode="r")).images[0]
    mask = np.asarray(level.data)
    units = [(level.axes_units or {}).get(axis) for axis in "yx"]
    scale = [level.scale[axis] for axis in "yx"]
    return _ome(scale, (0, 0), units, lambda r, c: mask[r, c], ask)


def read_ome_models(path, ask):
    from ome_zarr_models import open_ome_zarr

    group = zarr.open_group(path, mode="r", use_consolidated=False)
    with warnings.catch_warnings():
        # pydantic-zarr's own use of zarr; the model is what counts.
        warnings.simplefilter("ignore")
        model = open_ome_zarr(group)
    assert type(model).__name__ == "ImageLabel"
    attributes = getattr(model, "ome_attributes", model.attributes)
    [image] = attributes.multiscales
    fine = image.datasets[0]
    scale, translation = fine.coordinateTransformations
    mask = group[fine.path][...]
    return _ome(
        scale.scale, translation.translation, [axis.unit for axis in image.axes],
        lambda r, c: mask[r, c], ask,
    )  # fmt: skip


def read_openslide(path, ask):
    import openslide

    with openslide.OpenSlide(path) as slide, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as src:
            grey = src.colorinterp[0] is not ColorInterp.palette
            colours = (
                {(number,) * 3: number for number in range(256)} if grey
                else {colour[:3]: number for number, colour in src.colormap(1).items()}
            )  # fmt: skip
        sides = [slide.properties.get(f"openslide.mpp-{axis}") for axis in "yx"]
        mpp = None if None in sides else tuple(map(float, sides))

        def read(row, col):
            colour = slide.read_region((col, row), 0, (1, 1)).getpixel((0, 0))
            return colours.get(colour[:3], -1)

        transform = None if mpp is None else Affine.scale(mpp[1], mpp[0])
        return _answers(read, ask, transform, mpp=mpp, ids=grey)


def read_rio_cogeo(path, ask):
    from rio_cogeo.cogeo import cog_info, cog_validate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        assert cog_validate(path) == (True, [], [])
        geo, tags = cog_info(path).GEO, cog_info(path).Tags
        with rasterio.open(path) as src:
            data = src.read(1)
    crs = CRS.from_user_input(geo.CRS) if geo.CRS else None
    mpp = _mpp_of_tags(tags["Image Metadata"])
    transform = None if mpp is None else Affine.scale(mpp[1], mpp[0])
    if crs is not None:
        (left, top), (dx, dy) = geo.Origin, geo.Resolution
        transform = Affine(dx, 0, left, 0, dy, top)
    return _answers(lambda r, c: data[r, c], ask, transform, crs=crs, mpp=mpp)


def read_tifffile(path, ask):
    import tifffile

    with tifffile.TiffFile(path) as file:
        page, geo = file.pages[0], file.geotiff_metadata or {}
        mask, transform, crs, mpp = page.asarray(), None, None, None
        if "ModelTransformation" in geo:
            (a, b, _, c), (d, e, _, f) = np.reshape(geo["ModelTransformation"], (4, 4))[:2]
            transform = Affine(a, b, c, d, e, f)
        elif "ModelPixelScale" in geo:
            (dx, dy, _), (_, _, _, x, y, _) = geo["ModelPixelScale"], geo["ModelTiepoint"]
            transform = Affine(dx, 0, x, 0, -dy, y)
        if "ProjectedCSTypeGeoKey" in geo:
            crs = CRS.from_epsg(int(geo["ProjectedCSTypeGeoKey"]))
        elif page.tags["ResolutionUnit"].value == 3:
            sides = [page.tags[f"{axis}Resolution"].value for axis in "YX"]
            mpp = tuple(1e4 * part / whole for whole, part in sides)
            transform = Affine.scale(mpp[1], mpp[0])
    return _answers(lambda r, c: mask[r, c], ask, transform, crs=crs, mpp=mpp)


def read_pillow(path, ask):
    from PIL import Image

    with Image.open(path) as image:
        mask, mpp, transform = np.asarray(image), None, None
        assert image.mode in ("P", "L")
        if "dpi" in image.info:
            mpp = tuple(25400 / float(dots) for dots in image.info["dpi"][::-1])
            transform = Affine.scale(mpp[1], mpp[0])
    return _answers(lambda r, c: mask[r, c], ask, transform, mpp=mpp)


@lru_cache(maxsize=1)
def _environment():
    """Return the environment of the system's programs; what is ours must not leak into it.

    PYTHONPATH, GDAL_DRIVER_PATH, PROJ_LIB and their like of a virtual environment are for another
    GDAL.
    """
    scratch = os.environ.get("TMPDIR", "/tmp")
    return {
        "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": scratch,
        "XDG_RUNTIME_DIR": scratch, "QT_QPA_PLATFORM": "offscreen",
    }  # fmt: skip


@lru_cache(maxsize=2)
def _check_system(*line, version):
    """Raise Absent unless a program of the system's is there in the version of the table."""
    if shutil.which(line[0], path="/usr/bin") is None:
        raise Absent(f"{line[0]} is not installed")
    try:
        said = _run(line)
    except subprocess.CalledProcessError as error:
        raise Absent(f"{line[0]} has not what is needed: {error.stderr[-200:]}") from None
    if not said.startswith(version):
        raise Absent(f"{line[0]} is {said.strip()}; the table is about {version}")


def _run(line, text=None):
    done = subprocess.run(
        line, env=_environment(), input=text, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def read_gdal36(path, ask):
    _check_system("gdalinfo", "--version", version="GDAL 3.6.")
    name = _node(path, "mask")
    found = json.loads(_run(["gdalinfo", "-json", name]))
    wkt = found.get("coordinateSystem", {}).get("wkt")
    crs = CRS.from_wkt(wkt) if wkt else None
    mpp = _mpp_of_tags(found["metadata"].get("", {}))
    placed = found.get("geoTransform")

    def look(points, *flags):
        text = "".join(f"{x!r} {y!r}\n" for x, y in points)
        said = _run(["gdallocationinfo", "-valonly", *flags, name], text)
        return tuple(int(line) for line in said.split())

    by_pixel = look([(col, row) for row, col in ask.pixels])
    by_place = None
    if placed is not None:
        by_place = look(ask.places, "-geoloc")
        mpp = (placed[5], placed[1]) if crs is None else None
    elif mpp is not None:
        by_place = look([(int(x / mpp[1]), int(y / mpp[0])) for x, y in ask.places])
    return Seen(by_pixel, by_place, crs, mpp)


_QGIS = """
import json, sys
from qgis.core import QgsApplication, QgsPointXY, QgsRasterLayer
app = QgsApplication([], False)
app.initQgis()
for line in sys.stdin:
    name, pixels, places = json.loads(line)
    layer = QgsRasterLayer(name, "mask", "gdal")
    answer = None
    if layer.isValid():
        provider, crs, top = layer.dataProvider(), layer.crs(), layer.extent().yMaximum()
        def look(x, y):
            value, there = provider.sample(QgsPointXY(x, y), 1)
            return int(value) if there else -1
        answer = [[look(c + .5, top - r - .5) for r, c in pixels],
                  [look(x, y) for x, y in places], crs.toWkt() if crs.isValid() else None]
    print("ANSWER" + json.dumps(answer), flush=True)
"""


@lru_cache(maxsize=1)
def _qgis():
    _check_system(
        "python3", "-W", "ignore", "-c", "from qgis.core import Qgis; print(Qgis.QGIS_VERSION)",
        version="3.22.",
    )  # fmt: skip
    line = ["/usr/bin/python3", "-W", "ignore", "-c", _QGIS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(line, env=_environment(), text=True, **pipes)


def stop_qgis():
    """End the process that answers for QGIS, if there is one."""
    if _qgis.cache_info().currsize:
        _qgis().communicate(timeout=30)
        _qgis.cache_clear()


def read_qgis(path, ask):
    process = _qgis()
    process.stdin.write(json.dumps([_node(path, "mask"), ask.pixels, ask.middles]) + "\n")
    process.stdin.flush()
    said = ""
    while "ANSWER" not in said:
        said = process.stdout.readline()
        assert said, "QGIS ended"
    answer = json.loads(said.partition("ANSWER")[2])
    assert answer is not None, "QGIS does not open it"
    by_pixel, by_place, wkt = answer
    # QGIS warps what is turned, upside down or not square, by the nearest pixel: it has pixels of
    # the mask's only where there are no coordinates, and is asked for the middles of patches.
    placed = min(by_place) >= 0
    return Seen(
        tuple(by_place if placed else by_pixel),
        tuple(by_place) if placed else None,
        CRS.from_wkt(wkt) if wkt else None,
    )


def process_qgis(path, ask, crs, folder):
    """Return what QGIS's own command, without a display, samples of a mask at places."""
    # /usr/bin/qgis_process is Debian's wrapper, which adds an option that the command refuses.
    program = "/usr/bin/qgis_process.bin"
    if not Path(program).exists():
        raise Absent("qgis_process is not installed")
    points = [
        {"type": "Feature", "properties": {"n": n}, "geometry": {"type": "Point",
                                                                 "coordinates": place}}
        for n, place in enumerate(ask.middles)
    ]  # fmt: skip
    named = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{crs.to_epsg()}"}}
    asked, told = folder / "points.geojson", folder / "sampled.csv"
    asked.write_text(json.dumps({"type": "FeatureCollection", "crs": named, "features": points}))
    raster = str(path)
    if path.is_dir():  # the command takes files only, not GDAL's names of what is in a store
        raster = str(folder / "mask.vrt")
        _run(["gdal_translate", "-q", "-of", "VRT", _node(path, "mask"), raster])
    line = [program, "run", "native:rastersampling", "--", f"INPUT={asked}",
            f"RASTERCOPY={raster}", "COLUMN_PREFIX=band", f"OUTPUT={told}"]  # fmt: skip
    _run(line)
    with told.open(newline="") as file:
        return tuple(int(row["band1"]) for row in csv.DictReader(file))


READERS: dict[str, Probe] = {
    "xarray": read_xarray,
    "rioxarray": read_rioxarray,
    "rasterio": read_rasterio,
    "GDAL 3.6": read_gdal36,
    "QGIS 3.22": read_qgis,
    "zarr": read_zarr,
    "zarr-cm": read_zarr_cm,
    "ome-zarr": read_ome_zarr,
    "napari": read_ome_labels,
    "ome-zarr-models": read_ome_models,
    "OpenSlide": read_openslide,
    "tifffile": read_tifffile,
    "rio-cogeo": read_rio_cogeo,
    "Pillow": read_pillow,
}
"""By the names that `tilenet info` prints. napari's plugin opens masks by ome-zarr's label class,
which is asked here: the plugin itself cannot be installed without napari and vispy."""
