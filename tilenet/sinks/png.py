"""A mask as a palette PNG, for small pictures without a place on a map."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet import durable
from tilenet.classes import NODATA
from tilenet.errors import OutputError
from tilenet.sinks.spec import Before, MaskSpec

__all__ = ["encode_png", "write_png"]

_LEVEL = 3  # of zlib: on masks half the time of the default, and hardly larger


def write_png(
    mask: NDArray[np.uint8],
    spec: MaskSpec,
    out: Path,
    before: Before = lambda _written: None,
    scratch: Path | None = None,
) -> None:
    """Write `mask` as `encode_png` makes it; it is on disk when the call returns.

    Parameters
    ----------
    mask : ndarray of uint8
        (height, width) of `spec`.
    spec : MaskSpec
        Classes and colours.
    out : Path
        Name of the file.
    before : callable, optional
        Called with the file's `sha256` and `size` just before it gets its name.
    scratch : Path, optional
        Folder of the same file system for what is not complete; the output's own if not given.

    Raises
    ------
    OutputError
        If the encoded picture does not decode to the mask.
    OSError
        As the system says.
    """
    data = encode_png(mask, spec, out)
    before({"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    durable.write(out, data, scratch=scratch)


def encode_png(mask: NDArray[np.uint8], spec: MaskSpec, out: Path) -> bytes:
    """Return `mask` as an 8-bit palette PNG: index = class id, 255 transparent.

    The picture is decoded and compared.

    Parameters
    ----------
    mask : ndarray of uint8
        (height, width) of `spec`.
    spec : MaskSpec
        Classes and colours.
    out : Path
        What an error names.

    Raises
    ------
    OutputError
        If it does not decode to the mask.
    """
    from PIL import Image  # other masks do without it

    palette = np.zeros((256, 3), np.uint8)
    for c in spec.classes:
        palette[c.id] = c.color
    image = Image.frombytes("P", (spec.width, spec.height), mask.tobytes())
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=NODATA, compress_level=_LEVEL)
    with Image.open(buffer) as written:
        if not np.array_equal(np.asarray(written), mask):
            raise OutputError("the PNG does not decode to the mask", out, "try another format")
    return buffer.getvalue()
