"""Bad and odd inputs by hand: name, how it is made, command line, exit code, words of the message.

The tables lie in `cases_*.py`; here is what a row means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL = ("--model", "{shared}/conv.onnx")
PREDICT = ("predict", "in.tif", "--out", "x.zarr", *MODEL)
DAMAGED = (3, 7)
"""What a raster with unreadable blocks gives: 3 where all are, 7 where some are."""

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One row.

    Parameters
    ----------
    name : str
        Unique.
    make : callable
        Makes the case's own files in its own, empty folder; the command runs there.
    codes : tuple of int
        The exit code, or several that are right.
    words : tuple of str
        What the one line of error must contain.
    arguments : tuple of str
        The command line; ``{shared}`` is the folder of what all cases have.
    bomb : bool
        Must be refused within 2 s and 200 MB.
    nobody : bool
        Runs as a user without rights.
    """

    name: str
    make: Make
    codes: tuple[int, ...]
    words: tuple[str, ...] = ()
    arguments: tuple[str, ...] = PREDICT
    bomb: bool = False
    nobody: bool = False

    @property
    def negative(self) -> bool:
        """Whether it must fail."""
        return 0 not in self.codes


def nothing(folder: Path) -> None:
    """Make no file."""


def file(name: str, content: bytes | str | Callable[[], bytes]) -> Make:
    """Return a maker of one file."""

    def make(folder: Path) -> None:
        data = content() if callable(content) else content
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return make


def files(**contents: bytes | str) -> Make:
    """Return a maker of several files; ``__`` in a name stands for a dot."""
    makers = [file(name.replace("__", "."), content) for name, content in contents.items()]

    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def predict(*extra: str, source: str = "in.tif", out: str = "x.zarr") -> tuple[str, ...]:
    """Return a command line of predict; a model among `extra` takes the place of the usual one."""
    model = () if "--model" in extra else MODEL
    return ("predict", source, "--out", out, *model, *extra)
