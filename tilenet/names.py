"""Names from strangers: what cannot be a path (too long, with a NUL) is one that does not exist.

`pathlib` raises there; `os.path` answers.
"""

from __future__ import annotations

import os

__all__ = ["exists", "is_file", "is_folder"]


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything is there."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is there, perhaps behind links."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there, perhaps behind links."""
    return os.path.isdir(path)  # noqa: PTH112
