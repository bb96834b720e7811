"""Images on disk, read window by window: `open_raster` and `find_inputs`."""

from tilenet.sources.folder import Input, find_inputs
from tilenet.sources.raster import Raster, RasterInfo, open_raster

__all__ = ["Input", "Raster", "RasterInfo", "find_inputs", "open_raster"]
