"""A function of ours in a process of its own: for what could end this one, or make it grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["run_apart"]


def run_apart(
    module: str, function: str, content: bytes, timeout: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a function without arguments, and return how its process ended.

    Modules come from where this process has them, never from the folder it stands in, where
    `python -c` would look first.

    Parameters
    ----------
    module, function : str
        Names.
    content : bytes
        For its standard input.
    timeout : float or None
        Seconds.

    Raises
    ------
    OSError
        It cannot be started.
    subprocess.TimeoutExpired
        It took longer, and was ended.
    """
    home = str(Path(__file__).parent.parent)
    code = f"import sys; sys.path.append({home!r}); from {module} import {function}; {function}()"
    return subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-P", "-c", code],
        input=content,
        capture_output=True,
        check=False,
        timeout=timeout,
    )
