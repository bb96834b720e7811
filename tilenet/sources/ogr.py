"""Vector formats: pyogrio, which brings a GDAL of its own. Its only importer."""

from __future__ import annotations

from functools import cache
from typing import Any

from tilenet.quiet import quiet_gdal

__all__ = ["ogr"]


@cache
def ogr() -> Any:
    """Return pyogrio.

    Raises
    ------
    ImportError
        It is not installed.
    """
    with quiet_gdal():
        import pyogrio
    return pyogrio
