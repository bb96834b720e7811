"""Images on disk, read window by window: `open_raster` and `find_inputs`."""

from tilenet.sources.folder import Input, find_inputs
from tilenet.sources.gdal import CACHE_BYTES
from tilenet.sources.grid import Grid
from tilenet.sources.opening import grid_of, open_handle, open_raster
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.sources.view import View

__all__ = [
    "CACHE_BYTES",
    "Grid",
    "Input",
    "Raster",
    "RasterInfo",
    "View",
    "find_inputs",
    "grid_of",
    "open_handle",
    "open_raster",
]
