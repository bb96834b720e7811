"""The block engine: plan, forward and join of a block, journal, and the run that drives them."""

from tilenet.quiet import without_module

# With it, each start takes 0.2 s more, and each opening and reading of a remote raster a session of
# its own, only to hand GDAL the credentials that it finds in the environment by itself.
with without_module("boto3"):
    import rasterio  # noqa: F401 - whoever imports it from here on has this one
