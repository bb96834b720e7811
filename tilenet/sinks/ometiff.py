"""OME-TIFFs of a finished mask: tiled pyramids that QuPath, Fiji and napari open.

Tiles are compressed here, once, into a file of tiles: a TIFF keeps them level by level and row by
row, which is not how a mask is read. `tifffile` then writes what is around them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree as ET  # we only write XML here

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window as RasterWindow

from tilenet import durable
from tilenet.classes import NODATA
from tilenet.errors import OutputError, TilenetError, UsageError
from tilenet.geometry import Window
from tilenet.pyramid import halve
from tilenet.quiet import ignoring
from tilenet.sinks.geotiff import Read
from tilenet.sinks.spec import Before, MaskSpec

__all__ = ["check_slides", "write_ome_tiff"]

_TILE = 512
_WINDOW = 6 * _TILE  # four chunks of a usual store
_LEVEL = 3  # of zlib, as in our other files
_CLASSIC_BYTES = 4_000_000_000  # what surely fits into 32-bit offsets, if nothing compresses
_CACHE_BYTES = 16 << 20  # of GDAL and tifffile: theirs grow with machine and file
_SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"

Pixels = NDArray[np.uint8]


def check_slides(where: object) -> None:
    """Raise UsageError unless the extra `slides` is installed, which writes OME-TIFFs."""
    if find_spec("tifffile") is None:
        raise UsageError("OME-TIFF needs the extra slides", where, "pip install 'tilenet[slides]'")


def write_ome_tiff(
    read: Read,
    spec: MaskSpec,
    out: Path,
    before: Before = lambda _written: None,
    scratch: Path | None = None,
) -> None:
    """Write the mask as a tiled OME-TIFF, its coarser levels as SubIFDs, deflated.

    The file depends on nothing but the mask, and is on disk when the call returns. Memory does not
    grow with the raster, but for 16 bytes and tifffile's tables per tile. A place on a map is not
    kept: OME knows of none.

    Parameters
    ----------
    read : callable
        Window -> (height, width) uint8; called once for every pixel.
    spec : MaskSpec
        The mask.
    out : Path
        Name of the file; replaced if it exists.
    before : callable, optional
        Called with the file's `sha256` and `size` just before it gets its name.
    scratch : Path, optional
        Folder of the same file system for what is not complete; the output's own if not given.

    Raises
    ------
    UsageError
        If the extra `slides` is not installed.
    OutputError
        If the file does not read back as it was written.
    OSError
        As the system says.
    """
    check_slides(out)
    with tempfile.TemporaryDirectory(".tmp", f".{out.name}.", scratch or out.parent) as name:
        made = Path(name, out.name)
        with Path(name, ".tiles").open("w+b") as file:
            tiles = _Tiles(file, [(height, width) for _, _, height, width in spec.levels])
            digests = list(_fill(tiles, read, spec))
            _write(made, tiles, spec)
            try:
                _compare(made, tiles, digests)
            except (TilenetError, OSError, MemoryError):
                raise
            except Exception as error:  # GDAL's, zlib's and tifffile's classes have no common one
                raise _differs(made) from error
        with made.open("rb") as opened:
            os.fsync(opened.fileno())
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        before({"sha256": digest, "size": made.stat().st_size})
        durable.rename(made, out)


class _Tiles:
    """The compressed tiles of every level, in one file in the order in which they were made.

    Beyond the mask's border a tile has no answer, which has no vote in a majority: so four tiles
    make a coarser one as if the border was not there.

    Parameters
    ----------
    file : binary file
        Open for reading and writing.
    sides : list of (int, int)
        Height and width of each level.
    """

    def __init__(self, file: BinaryIO, sides: list[tuple[int, int]]) -> None:
        self.sides = sides
        self._file = file
        self._places = [
            np.zeros((-(-height // _TILE), -(-width // _TILE), 2), np.int64)
            for height, width in sides
        ]

    def grid(self, level: int) -> Iterator[tuple[int, int]]:
        """Yield the row and column of each tile of a level, in a TIFF's order."""
        rows, cols, _ = self._places[level].shape
        return ((row, col) for row in range(rows) for col in range(cols))

    def put(self, level: int, row: int, col: int, pixels: Pixels) -> None:
        """Keep one tile; `pixels`, (h, w), may be cut off by the mask's border."""
        tile = np.full((_TILE, _TILE), NODATA, np.uint8)
        tile[: pixels.shape[0], : pixels.shape[1]] = pixels
        packed = zlib.compress(tile, _LEVEL)
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(packed)
        self._places[level][row, col] = offset, len(packed)

    def packed(self, level: int) -> Iterator[bytes]:
        """Yield the compressed tiles of a level, in a TIFF's order."""
        for place in self.grid(level):
            offset, size = self._places[level][place].tolist()
            self._file.seek(offset)
            yield self._file.read(size)

    def get(self, level: int, row: int, col: int) -> Pixels:
        """Return a tile, (512, 512); no answer beyond the last one."""
        rows, cols, _ = self._places[level].shape
        if row >= rows or col >= cols:
            return np.full((_TILE, _TILE), NODATA, np.uint8)
        offset, size = self._places[level][row, col].tolist()
        self._file.seek(offset)
        data = zlib.decompress(self._file.read(size))
        return np.frombuffer(data, np.uint8).reshape(_TILE, _TILE)


def _fill(tiles: _Tiles, read: Read, spec: MaskSpec) -> Iterator[bytes]:
    """Make the tiles of every level; yield the hash of each window that is read."""
    for window in _windows(spec.height, spec.width):
        data = np.ascontiguousarray(read(window))
        yield hashlib.sha256(data).digest()
        for top in range(0, window.height, _TILE):
            for left in range(0, window.width, _TILE):
                row, col = (window.row + top) // _TILE, (window.col + left) // _TILE
                tiles.put(0, row, col, data[top : top + _TILE, left : left + _TILE])
    for level in range(1, len(tiles.sides)):
        for row, col in tiles.grid(level):
            four = [
                [tiles.get(level - 1, 2 * row + down, 2 * col + right) for right in (0, 1)]
                for down in (0, 1)
            ]
            tiles.put(level, row, col, halve(np.block(four)))


def _write(made: Path, tiles: _Tiles, spec: MaskSpec) -> None:
    import tifffile

    mpp = spec.georeference.mpp
    place: dict[str, Any] = {}
    if mpp is not None:  # for readers of TIFF that know nothing of OME
        place = {"resolution": (10_000 / mpp[1], 10_000 / mpp[0]), "resolutionunit": "CENTIMETER"}
    pixels = sum(height * width for height, width in tiles.sides)
    # Of kind "ome", tifffile would write a random identifier and a description of its own.
    with tifffile.TiffWriter(made, bigtiff=pixels > _CLASSIC_BYTES, kind="generic") as file:
        for level, shape in enumerate(tiles.sides):
            first = level == 0
            file.write(
                tiles.packed(level),
                shape=shape,
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="minisblack",
                compression="zlib",
                description=_describe(spec) if first else None,
                software=f"tilenet {version('tilenet')}" if first else False,
                subfiletype=0 if first else 1,
                subifds=len(tiles.sides) - 1 if first else None,
                metadata=None,
                **(place if first else {}),
            )


def _describe(spec: MaskSpec) -> bytes:
    """Return the OME-XML in ASCII: whatever else is in it, as character references."""
    root = ET.Element(
        "OME",
        {
            "xmlns": _SCHEMA,
            "xmlns:xsi": _XSI,
            "xsi:schemaLocation": f"{_SCHEMA} {_SCHEMA}/ome.xsd",
            "Creator": f"tilenet {version('tilenet')}",
        },
    )
    image = ET.SubElement(root, "Image", ID="Image:0", Name=spec.title)
    sizes = {"X": spec.width, "Y": spec.height, "Z": 1, "C": 1, "T": 1}
    attributes = {f"Size{axis}": str(size) for axis, size in sizes.items()}
    if spec.georeference.mpp is not None:
        for axis, side in zip("XY", reversed(spec.georeference.mpp), strict=True):
            attributes[f"PhysicalSize{axis}"] = repr(float(side))
            attributes[f"PhysicalSize{axis}Unit"] = "µm"
    pixels = ET.SubElement(
        image, "Pixels", {"ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": "uint8"} | attributes
    )
    ET.SubElement(pixels, "Channel", ID="Channel:0:0", Name="class", SamplesPerPixel="1")
    ET.SubElement(pixels, "TiffData", IFD="0", PlaneCount="1")
    names = {c.id: c.name for c in spec.classes} | {NODATA: "no answer"}
    colors = {c.id: "#{:02x}{:02x}{:02x}".format(*c.color) for c in spec.classes}
    kept = ET.SubElement(root, "StructuredAnnotations")
    for number, (what, values) in enumerate((("classes", names), ("colors", colors))):
        name = f"Annotation:{number}"
        ET.SubElement(image, "AnnotationRef", ID=name)
        annotation = ET.SubElement(kept, "MapAnnotation", ID=name, Namespace=f"tilenet/{what}")
        value = ET.SubElement(annotation, "Value")
        for key, text in sorted(values.items()):
            ET.SubElement(value, "M", K=str(key)).text = text
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    body: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=False)
    return head.encode() + body


def _differs(made: Path) -> OutputError:
    return OutputError("the OME-TIFF does not read back as the mask", made.name, "try again")


def _compare(made: Path, tiles: _Tiles, digests: list[bytes]) -> None:
    """Read the file back, all of it: level 0 as GDAL sees it, the others as tifffile does."""
    import tifffile

    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), ignoring(NotGeoreferencedWarning):
        src = rasterio.open(made, driver="GTiff")
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), src:
        for window, digest in zip(_windows(*src.shape), digests, strict=True):
            where = RasterWindow(window.col, window.row, window.width, window.height)
            if hashlib.sha256(src.read(1, window=where)).digest() != digest:
                raise _differs(made)
    with tifffile.TiffFile(made) as file:
        levels = file.series[0].levels
        if not file.is_ome or [level.shape for level in levels] != tiles.sides:
            raise _differs(made)
        for number, level in enumerate(levels[1:], 1):
            segments = level.keyframe.segments(maxworkers=1, buffersize=_CACHE_BYTES)
            for place, (data, _, _) in zip(tiles.grid(number), segments, strict=True):
                wanted = tiles.get(number, *place)
                if data is None or not np.array_equal(data[0, :, :, 0], wanted):
                    raise _differs(made)


def _windows(height: int, width: int) -> Iterator[Window]:
    whole = Window(0, 0, height, width)
    for row in range(0, height, _WINDOW):
        for col in range(0, width, _WINDOW):
            yield Window(row, col, _WINDOW, _WINDOW).intersection(whole)
