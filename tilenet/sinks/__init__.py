"""What a run leaves behind: the Zarr store of a mask, and exports of it (COG, OME-TIFF, PNG).

A sink owns file formats, their metadata and their durability. It knows nothing of tiles, models or
schedulers, and imports neither torch nor Dask.
"""

from tilenet.sinks.geotiff import write_geotiff, write_probabilities
from tilenet.sinks.label import enlist, is_listed, label_path, read_image
from tilenet.sinks.metadata import crs_keys, warnings_for
from tilenet.sinks.ometiff import check_slides, write_ome_tiff
from tilenet.sinks.png import encode_png, write_png
from tilenet.sinks.seal import Seal
from tilenet.sinks.skeleton import complete, seal_path
from tilenet.sinks.spec import ArrayLayout, Before, LabelOf, MaskSpec, ZarrFormat, zarr_format_for
from tilenet.sinks.store import MaskStore, StoredChunk, document, documents, open_store

__all__ = [
    "ArrayLayout",
    "Before",
    "LabelOf",
    "MaskSpec",
    "MaskStore",
    "Seal",
    "StoredChunk",
    "ZarrFormat",
    "check_slides",
    "complete",
    "crs_keys",
    "document",
    "documents",
    "encode_png",
    "enlist",
    "is_listed",
    "label_path",
    "open_store",
    "read_image",
    "seal_path",
    "warnings_for",
    "write_geotiff",
    "write_ome_tiff",
    "write_png",
    "write_probabilities",
    "zarr_format_for",
]
