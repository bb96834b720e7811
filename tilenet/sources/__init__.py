"""Images on disk, read window by window: `open_raster` and `find_inputs`."""

from tilenet.sources.area import Area, area_of
from tilenet.sources.bucket import open_objects
from tilenet.sources.folder import Input, find_inputs
from tilenet.sources.gdal import CACHE_BYTES, environment
from tilenet.sources.grid import Grid
from tilenet.sources.manifest import STDIN, read_manifest
from tilenet.sources.opening import grid_of, open_handle, open_raster
from tilenet.sources.picture import is_mask_store
from tilenet.sources.raster import Raster
from tilenet.sources.rasterinfo import RasterInfo, is_as_found
from tilenet.sources.remote import RemoteName, given, named
from tilenet.sources.view import View

__all__ = [
    "CACHE_BYTES",
    "STDIN",
    "Area",
    "Grid",
    "Input",
    "Raster",
    "RasterInfo",
    "RemoteName",
    "View",
    "area_of",
    "environment",
    "find_inputs",
    "given",
    "grid_of",
    "is_as_found",
    "is_mask_store",
    "named",
    "open_handle",
    "open_objects",
    "open_raster",
    "read_manifest",
]
