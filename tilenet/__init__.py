"""Segment images of any size: overlapping tiles, U-Net inference, blended seams, Zarr or GeoTIFF.

The library's front door is `tilenet.api`; the command is `tilenet`.
"""

__version__ = "0.1.0"
