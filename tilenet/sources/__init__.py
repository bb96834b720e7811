"""Images on disk, read window by window: `open_raster` and `find_inputs`."""

from tilenet.sources.folder import Input, find_inputs
from tilenet.sources.header import CACHE_BYTES, RasterInfo
from tilenet.sources.raster import Raster, open_raster

__all__ = ["CACHE_BYTES", "Input", "Raster", "RasterInfo", "find_inputs", "open_raster"]
