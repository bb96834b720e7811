"""What comes from strangers: names that cannot be paths, documents that are no documents.

Where a name is too long or holds a NUL, `pathlib` raises; here nothing is there.
"""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["exists", "is_file", "is_folder", "parse_json"]


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything is there."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is there, perhaps behind links."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there, perhaps behind links."""
    return os.path.isdir(path)  # noqa: PTH112


def parse_json(text: bytes | str) -> Any:
    """Return the content of a JSON document.

    Raises
    ------
    ValueError
        It is none, or nested too deep to be one of ours.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
