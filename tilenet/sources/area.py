"""Where the work matters: inside an area of interest, and inside tissue or another mask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilenet.geometry import Window
from tilenet.sources.cover import Cover, cover_of
from tilenet.sources.opening import open_raster
from tilenet.sources.outline import Outline, outline_of
from tilenet.sources.rasterinfo import RasterInfo
from tilenet.sources.tissue import find_cover
from tilenet.watchdog import watched

__all__ = ["Area", "area_of"]


@dataclass(frozen=True, slots=True)
class Area:
    """Which pixels of a grid matter: those that every part keeps.

    Parameters
    ----------
    outline : Outline or None
        Polygons.
    cover : Cover or None
        A mask.
    """

    outline: Outline | None = None
    cover: Cover | None = None

    @property
    def sha256(self) -> str:
        """Hash of what decides; not of the names of files."""
        parts = [
            "" if self.outline is None else self.outline.sha256,
            "" if self.cover is None else self.cover.mask.sha256,
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def kept(self, window: Window) -> NDArray[np.bool_]:
        """Return which pixels of a window are kept, (h, w); read-only.

        The same for a pixel whatever window it is asked for in.

        Raises
        ------
        InputError
            A mask that is kept in a file does not read.
        """
        kept: NDArray[np.bool_] = np.broadcast_to(np.bool_(True), (window.height, window.width))
        for part in (self.outline, self.cover):
            if part is not None and kept.any():
                kept = kept & part.kept(window)
        return kept

    def check(self) -> None:
        """Raise InputError if a mask that is kept in a file is gone or has changed."""
        if self.cover is not None:
            self.cover.mask.check()


def area_of(info: RasterInfo, aoi: Path | None, within: str, timeout: float = 600.0) -> Area | None:
    """Return where the work on a raster matters; None for everywhere.

    Parameters
    ----------
    info : RasterInfo
        The raster.
    aoi : Path or None
        Polygons.
    within : str
        "none", "auto", or the path of a mask.
    timeout : float
        Seconds after which a read counts as stuck.

    Raises
    ------
    InputError
        A file does not read, or says nothing of this raster.
    UsageError
        An extra is not installed.
    """
    outline: Outline | None = None
    cover: Cover | None = None
    if aoi is not None:
        with watched(str(aoi), timeout):
            outline = outline_of(str(aoi), info)
    if within == "auto":
        cover = find_cover(info, timeout)
    elif within != "none":
        with watched(within, timeout):
            cover = cover_of(info, partial(open_raster, Path(within), checked=False))
    return None if outline is None and cover is None else Area(outline, cover)
