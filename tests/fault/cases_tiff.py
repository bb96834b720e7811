"""TIFF files by hand: cut off, bombs, odd tags, odd places on the map."""

from __future__ import annotations

import struct
import zlib
from functools import partial

import numpy as np
import tiff
from cases import DAMAGED, Case, file, predict
from rasters import picture
from tiff import Tag, double, geokeys, long, short, strips, text, tiles, write

SMALL = ("--tile", "32", "--overlap", "8", "--chunk", "32", "--block", "32")
"""Several blocks of a small raster, so that the run goes through the scheduler."""


def pixels(height: int = 40, width: int = 50, bands: int = 3, dtype: str = "uint8") -> bytes:
    """Return a picture's bytes, band by band in each pixel."""
    values = picture(height, width, bands, dtype=dtype, high=1 if "f" in dtype else 255)
    return np.ascontiguousarray(np.moveaxis(values, 0, 2)).tobytes()


def tile_bytes(side: int = 32, count: int = 4) -> list[bytes]:
    """Return tiles, deflated."""
    return [zlib.compress(pixels(side, side)) for _ in range(count)]


PLAIN = strips()
DEFLATED = tiles() | {tiff.COMPRESSION: short(8)}


def plain(changes: dict[int, Tag | None] | None = None, **options: object) -> bytes:
    """Return the plain picture with other tags."""
    return write(PLAIN | (changes or {}), [pixels()], **options)


def _truncations() -> list[Case]:
    """Cut off at each place of the structure."""
    files = {
        "strip": plain(), "bigtiff": plain(big=True), "big-endian": plain(order=">"),
        "tiles": write(DEFLATED, tile_bytes()),
    }  # fmt: skip
    places = {
        "nothing": 0, "one byte": 1, "byte order": 2, "magic": 4, "header": 8, "IFD count": 10,
        "first tag": 22, "half a tag": 29, "before the last tag": 120, "within values": 152,
        "IFD": 170,
    }  # fmt: skip
    cases = [
        Case(f"{name} cut after {place}", file("in.tif", data[:size]), (3,), ("in.tif",))
        for name, data in files.items()
        for place, size in places.items()
        if size < len(data) - 200
    ]
    for name, data in files.items():
        for share in (0.3, 0.6, 0.99):
            size = int(len(data) * share)
            make = file("in.tif", data[:size])
            cases.append(Case(f"{name} cut at {share}", make, DAMAGED, ("in.tif",)))
    whole = file("in.tif", files["tiles"][:-50])
    cases.append(Case("last tile cut, many blocks", whole, DAMAGED, ("in.tif",), predict(*SMALL)))
    return cases


HUGE = 2**31 - 1
BOMBS = {
    "2^31-1 square": write(strips(HUGE, HUGE) | {tiff.ROWS: long(1)}, [b"x"]),
    "2^31-1 square in tiles": write(tiles(HUGE, HUGE, 256), [b"x"]),
    "2^32-1 square": write(strips(2**32 - 1, 2**32 - 1), [b"x"]),
    "60,000 square in one strip": write(strips(60000, 60000), [b"x"]),
    "60,000 square in one tile": write(
        tiles(60000, 60000) | {tiff.TILE_WIDTH: long(60000), tiff.TILE_HEIGHT: long(60000)}, [b"x"]
    ),
    "65,529 samples": write(strips() | {tiff.SAMPLES: short(65529)}, [pixels()]),
    "65,529 samples apart": write(
        strips() | {tiff.SAMPLES: short(65529), tiff.PLANAR: short(2)}, [pixels()]
    ),
    "5,000 samples": write(
        strips() | {tiff.SAMPLES: short(5000), tiff.BITS: short(*[8] * 5000)}, [pixels()]
    ),
    "4,096 samples of 8 bytes in tiles": write(
        tiles(512, 512, 512) | {tiff.SAMPLES: short(4096), tiff.BITS: short(*[64] * 4096)}, [b"x"]
    ),
    "tile of 2^30": write(
        tiles() | {tiff.TILE_WIDTH: long(2**30), tiff.TILE_HEIGHT: long(2**30)}, [b"x"]
    ),
    "tile of 2^31": write(
        tiles() | {tiff.TILE_WIDTH: long(2**31), tiff.TILE_HEIGHT: long(2**31)}, [b"x"]
    ),
    "tile of 65,536": write(
        tiles() | {tiff.TILE_WIDTH: long(65536), tiff.TILE_HEIGHT: long(65536)}, [b"x"]
    ),
    "tile of 16,384 of 3 bands": write(tiles() | dict.fromkeys(
        (tiff.TILE_WIDTH, tiff.TILE_HEIGHT), long(16384)), [zlib.compress(b"")]),
    "deflated tile of 16,384": write(
        DEFLATED | dict.fromkeys((tiff.TILE_WIDTH, tiff.TILE_HEIGHT), long(16384)),
        [zlib.compress(bytes(1 << 20))],
    ),
    "strip of 128 MB": write(strips(65536, 700) | {tiff.COMPRESSION: short(8)}, [b"x"]),
    "2^30 tiles": write(
        tiles(2**19, 2**19, 16) | {tiff.TILE_OFFSETS: Tag(tiff.LONG, bytes(8), 2**30),
        tiff.TILE_COUNTS: Tag(tiff.LONG, bytes(8), 2**30)}),
    "2^32-1 values of bits": plain({tiff.BITS: Tag(tiff.SHORT, bytes(8), 2**32 - 1)}),
    "2^62 values in a BigTIFF": plain(
        {tiff.OFFSETS: Tag(tiff.LONG8, bytes(16), 2**62)}, big=True
    ),
}  # fmt: skip


def _directories(count: int) -> bytes:
    """Return a picture followed by so many empty directories."""
    first = plain()
    entry = struct.calcsize("<HHHII")
    tags = struct.pack("<HHHII", 1, tiff.WIDTH, tiff.LONG, 1, 5)
    chain = b"".join(
        tags + struct.pack("<I", len(first) + (k + 1) * (entry + 4) if k + 1 < count else 0)
        for k in range(count)
    )
    return plain(follow=lambda end: len(first)) + chain


# What need not be read to see the picture is no reason to refuse it.
LOOPS = {
    "IFD points to itself": plain(follow=lambda end: 8),
    "IFD points into its data": plain(follow=lambda end: 200),
    "IFD points beyond the end": plain(follow=lambda end: end + 999),
    "sub-IFD points to its parent": plain({tiff.SUBIFDS: long(8)}),
    "sub-IFDs by the thousand": plain({tiff.SUBIFDS: long(*[8] * 5000)}),
    "2^32-1 GCPs": plain({tiff.TIEPOINT: Tag(tiff.DOUBLE, bytes(48), 2**32 - 1)}),
    "2^31 bytes of metadata": plain({tiff.METADATA: Tag(tiff.ASCII, b"<GDALMetadata>" * 2, 2**31)}),
    "100,000 IFDs": _directories(100_000),
}

# GDAL's word for what it refuses is GDAL's affair: the file's name is what the line must hold.
ODD: dict[str, dict[int, Tag | None]] = {
    "0 wide": {tiff.WIDTH: long(0)},
    "0 high": {tiff.HEIGHT: long(0)},
    "0×0": {tiff.WIDTH: long(0), tiff.HEIGHT: long(0)},
    "no width": {tiff.WIDTH: None},
    "no height": {tiff.HEIGHT: None},
    "negative width": {tiff.WIDTH: Tag(tiff.SLONG, (-50,))},
    "width as text": {tiff.WIDTH: text("fifty")},
    "0 bands": {tiff.SAMPLES: short(0), tiff.BITS: short(8)},
    "0 bits": {tiff.BITS: short(0, 0, 0)},
    "33 bits": {tiff.BITS: short(33, 33, 33)},
    "tag of type 99": {tiff.BITS: Tag(99, bytes(8), 2**31)},
    "65,535 bits": {tiff.BITS: short(65535, 65535, 65535)},
    "bits of three kinds": {tiff.BITS: short(8, 16, 32)},
    "sample format 99": {tiff.FORMAT: short(99, 99, 99)},
    "formats of three kinds": {tiff.FORMAT: short(1, 2, 3)},
    "8-bit floats": {tiff.FORMAT: short(3, 3, 3)},
    "compression 99": {tiff.COMPRESSION: short(99)},
    "compression 0": {tiff.COMPRESSION: short(0)},
    "JPEG 2000 inside": {tiff.COMPRESSION: short(34712)},
    "JPEG XL inside": {tiff.COMPRESSION: short(50002)},
    "planar 3": {tiff.PLANAR: short(3)},
    "0 rows a strip": {tiff.ROWS: long(0)},
    "tiles of 0": {tiff.TILE_WIDTH: long(0), tiff.TILE_HEIGHT: long(0), tiff.ROWS: None},
    "tiles without height": {tiff.TILE_WIDTH: long(32), tiff.ROWS: None},
}

DATA: dict[str, dict[int, Tag | None]] = {
    "deflate of no deflate": {tiff.COMPRESSION: short(8)},
    "LZW of no LZW": {tiff.COMPRESSION: short(5)},
    "JPEG of no JPEG": {tiff.COMPRESSION: short(7), tiff.PHOTOMETRIC: short(6)},
    "old JPEG of no JPEG": {tiff.COMPRESSION: short(6), tiff.PHOTOMETRIC: short(6)},
    "ZSTD of no ZSTD": {tiff.COMPRESSION: short(50000)},
    "LERC of no LERC": {tiff.COMPRESSION: short(34887)},
    "LZMA of no LZMA": {tiff.COMPRESSION: short(34925)},
    "WebP of no WebP": {tiff.COMPRESSION: short(50001)},
    "fax of 8 bits": {tiff.COMPRESSION: short(4)},
    "predictor 99": {tiff.COMPRESSION: short(8), tiff.PREDICTOR: short(99)},
    "float predictor of bytes": {tiff.COMPRESSION: short(8), tiff.PREDICTOR: short(3)},
    "offset beyond the end": {tiff.OFFSETS: long(10**6), tiff.COUNTS: long(6000)},
    "offset of 2^32-1": {tiff.OFFSETS: long(2**32 - 1), tiff.COUNTS: long(6000)},
    "count beyond the end": {tiff.OFFSETS: long(4000), tiff.COUNTS: long(10**6)},
    "count too small": {tiff.OFFSETS: long(200), tiff.COUNTS: long(10)},
    "negative count": {tiff.OFFSETS: long(200), tiff.COUNTS: Tag(tiff.SLONG, (-6000,))},
    "count of 2^32-1": {tiff.OFFSETS: long(200), tiff.COUNTS: long(2**32 - 1)},
}


def _bits(bits: int, bands: int = 3, **changes: Tag) -> bytes:
    """Return pixels of so many bits, packed."""
    row = -(-50 * bands * bits // 8)
    tags = strips(bands=bands, bits=bits) | {int(k[1:]): v for k, v in changes.items()}
    return write(tags, [np.random.default_rng(bits).bytes(40 * row)])


def _typed(dtype: str, form: int, bands: int = 3) -> bytes:
    bits = 8 * np.dtype(dtype).itemsize
    tags = strips(bands=bands, bits=bits) | {tiff.FORMAT: short(*[form] * bands)}
    return write(tags, [pixels(bands=bands, dtype=dtype)])


KINDS: dict[str, tuple[bytes, tuple[int, ...], tuple[str, ...]]] = {
    # Refused: what is no picture, or would be taken for another.
    "int64": (_typed("int64", 2), (3,), ("int64",)),
    "uint64": (_typed("uint64", 1), (3,), ("uint64",)),
    "complex64": (_typed("complex64", 6), (3,), ("complex64",)),
    "complex128": (_typed("complex128", 6), (3,), ("complex128",)),
    "complex int16": (_typed("int32", 5), (3,), ("complex",)),
    "palette": (_bits(8, 1, t262=short(3), t320=short(*range(768))), (3,), ("palette", "-expand")),
    "bilevel": (_bits(1, 1), (3,), ("palette",)),
    "palette of 4 bits": (_bits(4, 1, t262=short(3), t320=short(*range(48))), (3,), ("palette",)),
    # Another number of bands than the model's.
    "1 band": (_bits(8, 1), (4,), ("1 bands", "wants 3", "--bands")),
    "2 bands": (_bits(8, 2), (4,), ("2 bands",)),
    "4 bands, none of them alpha": (_bits(8, 4, t338=short(0)), (4,), ("4 bands", "--bands")),
    "5 bands": (_bits(8, 5, t338=short(0, 0, 0, 0)), (4,), ("5 bands",)),
    "13 bands": (_bits(8, 13, t338=short(*[0] * 12)), (4,), ("13 bands",)),
    "gray and alpha": (_bits(8, 2, t338=short(2)), (4,), ("1 bands",)),
    # Read as they are.
    "1 bit a sample": (_bits(1), (0,), ()),
    "2 bits a sample": (_bits(2), (0,), ()),
    "4 bits a sample": (_bits(4), (0,), ()),
    "12 bits a sample": (_bits(12), (0,), ()),
    "uint16": (_typed("uint16", 1), (0,), ()),
    "int8": (_typed("int8", 2), (0,), ()),
    "int16": (_typed("int16", 2), (0,), ()),
    "int32": (_typed("int32", 2), (0,), ()),
    "uint32": (_typed("uint32", 1), (0,), ()),
    "float16": (_typed("float16", 3), (0,), ()),
    "float32": (_typed("float32", 3), (0,), ()),
    "float64": (_typed("float64", 3), (0,), ()),
    "RGBA": (_bits(8, 4, t262=short(2), t338=short(2)), (0,), ()),
    "CMYK": (_bits(8, 4, t262=short(5)), (0,), ()),  # GDAL makes RGBA of it
    "YCbCr without JPEG": (_bits(8, 3, t262=short(6)), (0,), ()),
    "CIE L*a*b*": (_bits(8, 3, t262=short(8)), (0,), ()),
    "photometric 999": (_bits(8, 3, t262=short(999)), (0,), ()),
    "no photometric": (plain({tiff.PHOTOMETRIC: None}), (0,), ()),
    "big-endian": (plain(order=">"), (0,), ()),
    "BigTIFF": (plain(big=True), (0,), ()),
    # GDAL takes a chunk without a place in the file for one of zeros; nobody can tell them apart.
    "strip that is not stored": (plain({tiff.OFFSETS: long(0), tiff.COUNTS: long(0)}), (0,), ()),
    "planes without their strips": (plain({tiff.PLANAR: short(2)}), (0,), ()),
    "more rows than strips": (plain({tiff.HEIGHT: long(400), tiff.ROWS: long(40)}), (0,), ()),
    "negative offset": (
        plain({tiff.OFFSETS: Tag(tiff.SLONG, (-200,)), tiff.COUNTS: long(6000)}),
        (0,),
        (),
    ),
}


def _floats(value: float) -> bytes:
    values = np.moveaxis(picture(40, 50, 3, dtype="float32", high=1), 0, 2).copy()
    values[5:9, 7:12] = value
    tags = strips(bits=32) | {tiff.FORMAT: short(3, 3, 3)}
    return write(tags, [values.astype("<f4").tobytes()])


def _placed(changes: dict[int, Tag]) -> bytes:
    utm = {
        tiff.SCALE: double(10, 10, 0), tiff.TIEPOINT: double(0, 0, 0, 500000, 5000000, 0),
        tiff.GEOKEYS: geokeys((1024, 1), (1025, 1), (3072, 32633)),
    }  # fmt: skip
    return plain(utm | changes)


NAN, INF = float("nan"), float("inf")
GCPS = [v for k in range(4) for v in (10 * (k % 2), 10 * (k // 2), 0, 5 + k % 2, 47 - k // 2, 0)]
PLACES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    # Carried as GDAL itself reads them; what is no place at all is refused.
    "UTM": (_placed({}), (0,)),
    "south up": (_placed({tiff.SCALE: double(10, -10, 0)}), (0,)),
    "rotated": (_placed({tiff.SCALE: None, tiff.TIEPOINT: None, tiff.MATRIX: double(
        8, 6, 0, 5e5, 6, -8, 0, 5e6, 0, 0, 0, 0, 0, 0, 0, 1)}), (0,)),
    "pixel is point": (_placed({tiff.GEOKEYS: geokeys((1024, 1), (1025, 2), (3072, 32633))}), (0,)),
    "ground control points": (
        plain({tiff.TIEPOINT: double(*GCPS), tiff.GEOKEYS: geokeys((1024, 2), (2048, 4326))}), (0,)
    ),
    "RPC": (plain({tiff.RPC: double(*range(1, 93))}), (0,)),
    "CRS without transform": (plain({tiff.GEOKEYS: geokeys((1024, 1), (3072, 32633))}), (0,)),
    "transform without CRS": (_placed({tiff.GEOKEYS: None}), (0,)),
    "EPSG 999": (_placed({tiff.GEOKEYS: geokeys((1024, 1), (3072, 999))}), (0,)),
    "user-defined CRS of nothing": (_placed({tiff.GEOKEYS: geokeys((1024, 1), (3072, 32767))}),
                                    (0,)),
    "vertical CRS only": (_placed({tiff.GEOKEYS: geokeys((1024, 32767), (4096, 5773))}), (0,)),
    "geocentric CRS": (_placed({tiff.GEOKEYS: geokeys((1024, 3), (2048, 4978))}), (0,)),
    "key directory of 65,535": (_placed({tiff.GEOKEYS: short(1, 1, 0, 65535)}), (0,)),
    "keys into nowhere": (_placed({tiff.GEOKEYS: short(1, 1, 0, 1, 3072, 34736, 9, 9)}), (0,)),
    "scale 0": (_placed({tiff.SCALE: double(0, 0, 0)}), (0,)),
    "scale NaN": (_placed({tiff.SCALE: double(NAN, NAN, 0)}), (3,)),
    "scale infinite": (_placed({tiff.SCALE: double(INF, INF, 0)}), (3,)),
    "scale 1e300": (_placed({tiff.SCALE: double(1e300, 1e300, 0)}), (0,)),
    "tie point NaN": (_placed({tiff.TIEPOINT: double(0, 0, 0, NAN, NAN, 0)}), (3,)),
    "half a tie point": (_placed({tiff.TIEPOINT: double(0, 0, 0)}), (0,)),
    "nodata is text": (plain({tiff.NODATA: text("none")}), (0,)),
    "nodata 1e400": (plain({tiff.NODATA: text("1e400")}), (0,)),
    "nodata -1 of bytes": (plain({tiff.NODATA: text("-1")}), (0,)),
    "nodata NaN of bytes": (plain({tiff.NODATA: text("nan")}), (0,)),
    "nodata 300 of bytes": (plain({tiff.NODATA: text("300")}), (0,)),
    "nodata of every pixel": (
        write(strips() | {tiff.NODATA: text("7")}, [b"\7" * 6000]), (0,)
    ),
    "metadata is no XML": (plain({tiff.METADATA: text("<GDALMetadata><Item")}), (0,)),
    "orientation 3": (plain({274: short(3)}), (0,)),
    "NaN among the pixels": (_floats(NAN), (0,)),
    "infinite pixels": (_floats(INF), (0,)),
    "pixels of 1e38": (_floats(1e38), (0,)),
}  # fmt: skip


def _table() -> list[Case]:
    cases = _truncations()
    named = ("in.tif",)
    for name, data in BOMBS.items():
        cases.append(Case(f"bomb: {name}", file("in.tif", data), (3,), named, bomb=True))
    for name, data in LOOPS.items():
        cases.append(Case(f"loop: {name}", file("in.tif", data), (0,), bomb=True))
    cases += [Case(f"tags: {k}", file("in.tif", plain(v)), (3,), named) for k, v in ODD.items()]
    cases += [Case(f"data: {k}", file("in.tif", plain(v)), DAMAGED, named) for k, v in DATA.items()]
    cases += [
        Case(f"kind: {name}", file("in.tif", data), codes, words)
        for name, (data, codes, words) in KINDS.items()
    ]
    for name, (data, codes) in PLACES.items():
        cases.append(Case(f"place: {name}", file("in.tif", data), codes))
        if codes == (0,):
            cog = predict(out="x.tif")
            cases.append(Case(f"place: {name}, COG", file("in.tif", data), codes, (), cog))
    header = partial(struct.pack, "<2sHI")
    wrong = {
        "byte order IM": header(b"IM", 42, 8), "magic 41": header(b"II", 41, 8),
        "IFD in the header": header(b"II", 42, 4), "IFD at 0": header(b"II", 42, 0),
        "IFD beyond the end": header(b"II", 42, 2**32 - 1),
        "BigTIFF of 4-byte offsets": struct.pack("<2sHHHQ", b"II", 43, 4, 0, 16),
        "empty IFD": header(b"II", 42, 8) + bytes(6),
        "65,535 tags, none there": header(b"II", 42, 8) + b"\xff\xff",
    }  # fmt: skip
    cases += [Case(f"header: {k}", file("in.tif", v), (3,), named) for k, v in wrong.items()]
    return cases


TIFFS = _table()
