"""Other formats, strange files and names, disguises, outputs that are not ours."""

from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from cases import DAMAGED, MODEL, Case, Make, file, files, nothing, predict
from cases_tiff import plain
from PIL import Image
from rasters import picture


def image(kind: str, **options: object) -> bytes:
    """Return a picture as PNG, JPEG …"""
    out = io.BytesIO()
    Image.fromarray(np.moveaxis(picture(40, 50), 0, 2)).save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Return a PNG chunk."""
    check = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def png(width: int = 50, height: int = 40, kind: int = 2, bits: int = 8, data: bytes | None = None,
        *, interlace: int = 0, extra: bytes = b"") -> bytes:  # fmt: skip
    """Return a PNG by hand."""
    rows = bytes(40 * 151) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def frame(width: int, height: int, bands: int = 3) -> bytes:
    """Return a JPEG whose frame header claims a size."""
    data = bytearray(image("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 10] = struct.pack(">HHB", height, width, bands)
    return bytes(data)


TEXT = chunk(b"tEXt", b"a\0" + b"b" * 20_000)
PNG, JPEG, PROGRESSIVE = image("PNG"), image("JPEG"), image("JPEG", progressive=True)
BMP, WEBP, PPM = image("BMP"), image("WEBP", lossless=True), image("PPM")
GIF = image("GIF")


def _truncations() -> list[Case]:
    ends = {
        "PNG": (PNG, {"half its signature": 4, "signature": 8, "length": 12, "half IHDR": 20,
                      "IHDR": 33, "IDAT's name": 41, "half IDAT": len(PNG) // 2,
                      "IDAT but its check": len(PNG) - 18}),
        "JPEG": (JPEG, {"SOI": 2, "half APP0": 10, "APP0": 20, "half a table": 60,
                        "half its frame": JPEG.index(b"\xff\xc0") + 6,
                        "scan header": JPEG.index(b"\xff\xda") + 12, "half": len(JPEG) // 2}),
        "progressive": (PROGRESSIVE, {"first scan header": PROGRESSIVE.index(b"\xff\xda") + 12,
                                      "half": len(PROGRESSIVE) // 2}),
        "BMP": (BMP, {"magic": 2, "half its header": 20, "half": len(BMP) // 2}),
        "WebP": (WEBP, {"RIFF": 4, "header": 20, "half": len(WEBP) // 2}),
        "PPM": (PPM, {"magic": 2, "half its header": 6, "half": len(PPM) // 2}),
    }  # fmt: skip
    return [
        Case(f"{name} cut after {place}", file("in.tif", data[:size]), DAMAGED, ("in.tif",))
        for name, (data, places) in ends.items()
        for place, size in places.items()
    ]


IMAGES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "PNG of 2^31-1 square": (png(2**31 - 1, 2**31 - 1), (3,)),
    "PNG of 10^6 square": (png(10**6, 10**6), (3,)),
    "PNG of 30,000,000 × 1": (png(30_000_000, 1), (3,)),
    "PNG of 0 × 0": (png(0, 0), (3,)),
    "PNG of 2^32-1": (png(2**32 - 1, 1), (3,)),
    "PNG of kind 7": (png(kind=7), (3,)),
    "PNG of 5 bits": (png(bits=5), (3,)),
    "PNG, interlace 9": (png(interlace=9), (3,)),
    "PNG, interlaced bomb": (png(60000, 60000, interlace=1), (3,)),
    "PNG of a palette without one": (png(kind=3), (3,)),
    "PNG of a palette": (
        png(kind=3, data=bytes(40 * 51), extra=chunk(b"PLTE", bytes(range(30)))), (3,)
    ),
    "PNG of too few rows": (png(data=bytes(151)), DAMAGED),
    "PNG of gray": (png(kind=0, data=bytes(40 * 51)), (4,)),
    "PNG of a wrong check": (PNG.replace(PNG[29:33], b"oops", 1), (3,)),
    "PNG of 100 MB of text": (png(extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
                              (0,)),
    "JPEG of 65,500 square": (frame(65500, 65500), DAMAGED),
    "JPEG of 0 × 0": (frame(0, 0), (3,)),
    "JPEG of 0 bands": (frame(50, 40, 0), (3,)),
    "JPEG of 255 bands": (frame(50, 40, 255), (3,)),
    "BMP of 2^31-1 square": (
        BMP[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + BMP[26:], (3,)
    ),
    "BMP of -2^31": (BMP[:18] + struct.pack("<ii", -(2**31), -(2**31)) + BMP[26:], (3,)),
    "PPM of 60,000 square": (b"P6 60000 60000 255\n" + bytes(100), DAMAGED),
    "PPM of 10^9 square": (b"P6 1000000000 1000000000 255\n", (3,)),
    "PPM of -5": (b"P6 -5 -5 255\n" + bytes(100), (3,)),
    "GIF of 65,535 square": (GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], (3,)),
    "GIF": (GIF, (3,)),
    "grid of 2^31 columns": (
        b"ncols 2147483647\nnrows 2147483647\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2 3\n", (3,)
    ),
    "JPEG 2000 of nothing": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), (3,)),
    "JPEG 2000 of 2^32-1": (
        b"\xff\x4f\xff\x51\x00\x2f\0\0" + b"\xff" * 8 + bytes(8) + b"\xff" * 8 + bytes(8)
        + b"\0\3" + b"\7\1\1" * 3 + bytes(40), (3,)
    ),
    "NITF of nothing": (b"NITF02.10" + b"0" * 400, (3,)),
    "PNG": (PNG, (0,)),
    "JPEG": (JPEG, (0,)),
    "WebP": (WEBP, (0,)),
    "BMP": (BMP, (0,)),
    "PPM": (PPM, (0,)),
}  # fmt: skip


def _zip(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def _tar(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


VRT = (
    '<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1">'
    '<SimpleSource><SourceFilename relativeToVRT="1">{}</SourceFilename></SimpleSource>'
    "</VRTRasterBand></VRTDataset>"
)
DISGUISES: dict[str, bytes | str] = {
    "empty file": b"",
    "text": "no raster\n" * 100,
    "zeros": bytes(100_000),
    "noise": np.random.default_rng(0).bytes(100_000),
    "HTML": "<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "LFS pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6123\n",
    "VRT": VRT.format("ok.tif"),
    "VRT of the network": VRT.format("/vsicurl/http://127.0.0.1:9/a.tif"),
    "WMS": '<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:9/</ServerUrl></Service>'
           "</GDAL_WMS>",
    "WCS": "<WCS_GDAL><ServiceURL>http://127.0.0.1:9/</ServiceURL></WCS_GDAL>",
    "WMTS": "<GDAL_WMTS><GetCapabilitiesUrl>http://127.0.0.1:9/</GetCapabilitiesUrl></GDAL_WMTS>",
    "tile index": "<GDALTileIndexDataset><IndexDataset>http://127.0.0.1:9/a.gpkg</IndexDataset>"
                  "</GDALTileIndexDataset>",
    "STAC": '{"type": "FeatureCollection", "stac_version": "1.0.0", "features": [{"type": '
            '"Feature", "assets": {"a": {"href": "http://127.0.0.1:9/a.tif"}}}]}',
    "GeoJSON": '{"type": "FeatureCollection", "features": []}',
    "GDAL pipeline": '{"type": "gdal_streamed_alg", "command_line": "gdal raster convert a b"}',
    "MRF": "<MRF_META><Raster><Size x='50' y='40' c='3'/></Raster></MRF_META>",
    "zip": _zip("a.tif", plain()),
    "tar": _tar("a.tif", plain()),
    "gzip": gzip.compress(plain()),
    "PDF": "%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
    "ELF": Path("/bin/true").read_bytes(),
    "SQLite": b"SQLite format 3\0" + bytes(4096),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(4096),
    "netCDF": b"CDF\x01" + bytes(400),
    "GRIB": b"GRIB" + bytes(400),
    "SVG": '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "numpy array": b"\x93NUMPY\x01\0" + bytes(200),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
}  # fmt: skip

VIRTUAL = {
    "MEM:::DATAPOINTER=1,PIXELS=9,LINES=9", "GTIFF_DIR:1:in.tif", "GTIFF_RAW:in.tif",
    "vrt://in.tif?bands=1", "zip://in.zip!a.tif", "file:///etc/passwd", "WMTS:http://127.0.0.1:9",
    "STACIT:in.json", "netcdf:in.nc:a", "ZARR:in.zarr", '<VRTDataset rasterXSize="5"/>',
    "DERIVED_SUBDATASET:LOGAMPLITUDE:in.tif", "JPEG_SUBFILE:0,100,in.tif", "-", "~/in.tif", "$HOME",
    "in.tif/../missing.tif",
}  # fmt: skip
"""Names that other tools resolve."""

DISTANT = {
    "/vsicurl/http://127.0.0.1:9/a.tif", "/vsizip/in.zip/a.tif", "/vsizip//vsicurl/http://a/b.zip",
    "/vsimem/a.tif", "/vsistdin/", "/vsitar/in.tgz/a.tif", "/vsigzip/in.tif.gz",
    "/vsis3/bucket/a.tif", "/vsisubfile/0_100,in.tif", "http://127.0.0.1:9/a.tif",
    "s3://bucket/a.tif",
}  # fmt: skip
"""Names for which --allow-remote must be given."""


def _socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("in.tif")
    os.chdir(here)


def _link(name: str, target: str) -> Make:
    return lambda folder: (folder / name).symlink_to(target)


def _both(*makers: Make) -> Make:
    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def _closed(name: str) -> Make:
    """Return a maker of a file that nobody may read."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(plain())
        (folder / name).chmod(0)

    return make


def _named(name: bytes, data: bytes = b"text") -> Make:
    def make(folder: Path) -> None:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(data)

    return make


OK = file("in.tif", plain())
PLACES = [
    Case("no such file", nothing, (3,), ("no such file", "in.tif")),
    Case("a dangling link", _link("in.tif", "gone.tif"), (3,), ("in.tif",)),
    Case("a link to itself", _link("in.tif", "in.tif"), (3,), ("in.tif",)),
    Case("two links in a ring", _both(_link("in.tif", "b"), _link("b", "in.tif")), (3,), ()),
    Case("a FIFO", lambda folder: os.mkfifo(folder / "in.tif"), (3,), ("regular",)),
    Case("a socket", _socket, (3,), ("regular",)),
    Case("/dev/zero", nothing, (3,), ("regular",), predict(source="/dev/zero")),
    Case("/dev/null", nothing, (3,), ("regular",), predict(source="/dev/null")),
    Case("a link to /dev/zero", _link("in.tif", "/dev/zero"), (3,), ("regular",)),
    Case("/proc/self/mem", nothing, (3,), ("mem",), predict(source="/proc/self/mem")),
    Case("an empty folder", lambda f: (f / "in.tif").mkdir(), (3,), ("no rasters",)),
    Case("a folder of text", file("in.tif/a.txt", "a"), (3,), ("no rasters",)),
    Case("a folder in a ring", lambda f: ((f / "in.tif").mkdir(),
         (f / "in.tif" / "a").symlink_to(f / "in.tif")), (3,), ("no rasters",)),
    Case("a file as a folder", OK, (3,), ("in.tif/a",), predict(source="in.tif/a.tif")),
    Case("a name of 300 bytes", nothing, (3,), ("a" * 20,), predict(source="a" * 300 + ".tif")),
    Case("a path of 5,000 bytes", nothing, (3,), (), predict(source="a/" * 2500 + "a.tif")),
    Case("no name", nothing, (3,), (), predict(source="")),
    Case("no permission", _closed("in.tif"), (3,), ("in.tif",), nobody=True),
    Case("newline and colours", _named(b"a\nb\x1b[31m.tif"), (3,), ("\\x1b[31m",),
         predict(source="a\nb\x1b[31m.tif")),
    Case("no UTF-8", _named(b"\xff\xfe.tif"), (3,), ("UTF-8",), predict(source="\udcff\udcfe.tif")),
    Case("right to left", _named("a\u202efit.tif".encode()), (3,), ("\\u202e",),
         predict(source="a\u202efit.tif")),
    Case("one that looks like a flag", nothing, (2,), ("--rf.tif",), predict(source="--rf.tif")),
    Case("a good file of 255 bytes", _named(b"a" * 251 + b".tif", plain()), (0,), (),
         predict(source="a" * 251 + ".tif")),
    Case("a good file of emoji", _named("🗺️ ü.tif".encode(), plain()), (0,), (),
         predict(source="🗺️ ü.tif")),
    Case("a good file behind a link", _both(file("a.tif", plain()), _link("in.tif", "a.tif")),
         (0,), ()),
    Case("a good file with %s and quotes", _named(b"%s'\";$(touch canary).tif", plain()), (0,), (),
         predict(source="%s'\";$(touch canary).tif")),
]  # fmt: skip

SIDECARS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "PAM is no XML": ("in.tif.aux.xml", "<PAMDataset><", (0, 3)),
    "PAM of a far CRS": ("in.tif.aux.xml", "<PAMDataset><SRS>EPSG:999</SRS></PAMDataset>", (3,)),
    "overview of text": ("in.tif.ovr", "no raster", (3,)),
    "overview that is a VRT": ("in.tif.ovr", VRT.format("/etc/passwd"), (3,)),
    "mask of text": ("in.tif.msk", "no raster", (3,)),
    "world file of text": ("in.tfw", "ten\nzero\n", (0,)),
    "world file of NaN": ("in.tfw", "nan\nnan\nnan\nnan\nnan\nnan\n", (0, 3)),
}


def _foreign_zarr(folder: Path) -> None:
    file("in.tif", plain())(folder)
    file("x.zarr/zarr.json", '{"zarr_format": 3, "node_type": "group", "attributes": {}}')(folder)


def _theirs(name: str, content: bytes | str = "a day's work") -> Make:
    return _both(OK, file(name, content))


FOREIGN = ("x.",)
OUTPUTS = [
    Case("output is a file", _theirs("x.zarr"), (5,), FOREIGN),
    Case("output is an empty file", _theirs("x.tif", ""), (5,), FOREIGN, predict(out="x.tif")),
    Case("output is a foreign TIFF", _theirs("x.tif", plain()), (5,), FOREIGN,
         predict(out="x.tif")),
    Case("output is a foreign PNG", _theirs("x.png", PNG), (5,), FOREIGN, predict(out="x.png")),
    Case("output is a folder", _theirs("x.zarr/work.txt"), (5,), FOREIGN),
    Case("output is an empty folder", lambda f: (OK(f), (f / "x.zarr").mkdir()), (5,), FOREIGN),
    Case("output is a foreign Zarr", _foreign_zarr, (5,), FOREIGN),
    Case("output is a folder named .tif", _theirs("x.tif/work.txt"), (5,), FOREIGN,
         predict(out="x.tif")),
    Case("overwrite a file", _theirs("x.zarr"), (5,), FOREIGN, predict("--overwrite")),
    Case("overwrite a folder", _theirs("x.zarr/work.txt"), (5,), FOREIGN, predict("--overwrite")),
    Case("overwrite a foreign Zarr", _foreign_zarr, (5,), FOREIGN, predict("--overwrite")),
    Case("overwrite a foreign TIFF", _theirs("x.tif", plain()), (5,), FOREIGN,
         predict("--overwrite", out="x.tif")),
    Case("overwrite a TIFF with a foreign sidecar", lambda f: (
         _theirs("x.tif", plain())(f), file("x.tif.tilenet.json", '{"plan_hash": 1}')(f)),
         (5,), FOREIGN, predict("--overwrite", out="x.tif")),
    Case("a foreign file beside the output", _theirs("x.tif.aux.xml"), (5,), ("x.tif.aux.xml",),
         predict(out="x.tif")),
    Case("output is a dangling link", _both(OK, _link("x.zarr", "gone")), (5,), FOREIGN),
    Case("output is a link to itself", _both(OK, _link("x.zarr", "x.zarr")), (5,), FOREIGN),
    Case("output is a link to the input", _both(OK, _link("x.tif", "in.tif")), (5,), FOREIGN,
         predict(out="x.tif")),
    Case("output is the input", OK, (5,), ("in.tif",), predict(out="in.tif")),
    Case("output is a hard link of the input", lambda f: (
         OK(f), (f / "x.tif").hardlink_to(f / "in.tif")), (5,), FOREIGN, predict(out="x.tif")),
    Case("output under a file", _theirs("a"), (5, 6), ("a",), predict(out="a/x.zarr")),
    Case("output of 300 bytes", OK, (5,), (), predict(out="x" * 300 + ".zarr")),
    Case("output of 250 bytes", OK, (5,), (), predict(out="x" * 245 + ".zarr")),
    Case("output is /dev/full", OK, (2,), ("/dev/full",), predict(out="/dev/full")),
    Case("output is /dev/null", OK, (2, 5), ("/dev/null",),
         predict("--format", "cog", out="/dev/null")),
    Case("output in /proc", OK, (5, 6), ("/proc",), predict(out="/proc/x.zarr")),
    Case("output in /sys", OK, (5, 6), ("/sys",), predict(out="/sys/x.tif")),
    Case("output is .", OK, (2, 5), (), predict(out=".")),
    Case("output is /", OK, (2, 5), (), predict(out="/")),
    Case("output is nothing", OK, (2, 5), (), predict(out="")),
    Case("output has no ending", OK, (2,), ("x",), predict(out="x")),
    Case("output is .jpg", OK, (2,), ("x.jpg",), predict(out="x.jpg")),
    Case("output is .zarr alone", OK, (0, 2), (), predict(out=".zarr")),
    Case("no permission to write", _both(file("in.tif", plain()), lambda f: (f / "a").mkdir(0o755)),
         (5, 6), ("a",), predict(out="a/x.zarr"), nobody=True),
    Case("its run folder is a file", _theirs(".x.zarr.tilenet"), (5, 6), FOREIGN),
    Case("its run folder is a dangling link", _both(OK, _link(".x.zarr.tilenet", "gone")),
         (5, 6), FOREIGN),
    Case("its lock is a folder", _both(OK, lambda f: (f / ".x.zarr.tilenet/lock").mkdir(
         parents=True)), (5, 6), FOREIGN),
    Case("its plan is text", _theirs(".x.zarr.tilenet/plan.json", "no plan"), (0,), ()),
    Case("several outputs into a file", _both(OK, file("x", "theirs"), file("b.tif", plain())),
         (5,), ("x",), ("predict", "in.tif", "b.tif", "--out", "x", *MODEL)),
    Case("two inputs of one name", files(a__tif=plain(), a__png=PNG), (5,), ("one mask",),
         ("predict", "a.tif", "a.png", "--out", "x", *MODEL)),
    Case("names that differ in case", files(a__tif=plain(), A__tif=plain()), (5,), ("one mask",),
         ("predict", "a.tif", "A.tif", "--out", "x", *MODEL)),
    Case("too large for a PNG", file("in.tif", png(9000, 9000, extra=TEXT)), (2,), ("PNG",),
         predict(out="x.png")),
    Case("one of three is bad", files(a__tif=plain(), b__tif=b"text", c__tif=plain()), (7,),
         (), ("predict", "a.tif", "b.tif", "c.tif", "--out", "x", *MODEL)),
    Case("all three are bad", files(a__tif=b"", b__tif=b"text", c__tif=PNG[:50]), (7,),
         (), ("predict", "a.tif", "b.tif", "c.tif", "--out", "x", *MODEL)),
]  # fmt: skip


def _table() -> list[Case]:
    cases = [*_truncations(), *PLACES, *OUTPUTS]
    for name, (data, codes) in IMAGES.items():
        bomb = "of" in name and codes == (3,)
        cases.append(Case(f"image: {name}", file("in.tif", data), codes, bomb=bomb))
    for name, content in DISGUISES.items():
        make = _both(file("in.tif", content), file("ok.tif", plain()))
        cases.append(Case(f"disguise: {name}", make, (3,), ("in.tif",)))
        cases.append(Case(f"disguise, info: {name}", make, (3,), ("in.tif",), ("info", "in.tif")))
    for name in sorted(VIRTUAL):
        make = files(in__tif=plain(), in__zip=_zip("a.tif", plain()))
        cases.append(Case(f"name: {name}", make, (2, 3) if name == "-" else (3,), (),
                          predict(source=name)))  # fmt: skip
    for name in sorted(DISTANT):
        cases.append(Case(f"name: {name}", OK, (2,), ("--allow-remote",), predict(source=name)))
    for name, (beside, content, codes) in SIDECARS.items():
        cases.append(Case(f"sidecar: {name}", _both(OK, file(beside, content)), codes))
    return cases


FILES = _table()
