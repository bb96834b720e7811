"""Zarr stores of a picture, written as other tools write them."""

import numpy as np
import xarray as xr
import zarr
from zarr.errors import ZarrUserWarning

from tilenet.quiet import ignoring


def halved(pixels):
    """Return every second pixel of the last two axes."""
    return pixels[..., ::2, ::2]


def ome(
    path,
    pixels,
    axes="cyx",
    *,
    zarr_format=2,
    levels=1,
    mpp=None,
    chunks=None,
    labels=(),
    **options,
):
    """Write an OME-Zarr image, 0.4 in format 2 and 0.5 in 3; `pixels` in the order of `axes`."""
    root = zarr.create_group(path, zarr_format=zarr_format)
    kinds = {"c": "channel", "t": "time"}
    datasets, data = [], pixels
    for level in range(levels):
        made = root.create_array(
            str(level), shape=data.shape, dtype=data.dtype,
            chunks=chunks or tuple(32 if a in "yx" else 1 for a in axes),
            **({"dimension_names": list(axes)} if zarr_format == 3 else {}), **options,
        )  # fmt: skip
        made[...] = data
        scale = [2.0**level * (mpp or 1) if a in "yx" else 1.0 for a in axes]
        datasets.append(
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
        data = halved(data)
    unit = {"unit": "micrometer"} if mpp else {}
    described = [
        {"name": a, "type": kinds.get(a, "space")} | (unit if a in "zyx" else {}) for a in axes
    ]
    document = {
        "multiscales": [{"axes": described, "datasets": datasets, "version": "0.4"}],
        "omero": {"channels": [{"label": label} for label in labels]},
    }
    if zarr_format == 3:
        document["multiscales"][0].pop("version")
        document = {"ome": {"version": "0.5", **document}}
    root.attrs.update(document)
    return path


def dataset(pixels, transform=None, **variables):
    """Return a data set with the variable `image` of dimensions band, y, x."""
    found = xr.Dataset({"image": (("band", "y", "x"), pixels), **variables})
    if transform is not None:
        a, _, c, _, e, f = transform
        height, width = pixels.shape[1:]
        found = found.assign_coords(
            x=c + a * (np.arange(width) + 0.5), y=f + e * (np.arange(height) + 0.5)
        )
    return found


def write(path, found, zarr_format=3, **options):
    """Write a data set as xarray does."""
    with ignoring(ZarrUserWarning), ignoring(UserWarning):
        found.to_zarr(path, zarr_format=zarr_format, consolidated=False, **options)
    return path
