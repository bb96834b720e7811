"""A labelled data set as the trainer sees it: samples, what is broken among them, the two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tilenet.classes import ClassInfo
from tilenet.errors import InputError
from tilenet.geometry import Window
from tilenet.training.images import ImageRef
from tilenet.training.labels import Label

__all__ = ["BrokenDataError", "DataSet", "Found", "Parts", "Problem", "Sample"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something broken, in one line.

    Parameters
    ----------
    what : str
        What is wrong.
    where : str
        The file or pair.
    """

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what}; {self.where}"


class BrokenDataError(InputError):
    """The data set is broken; `problems` names each place.

    Parameters
    ----------
    problems : sequence of Problem
        One line each; the first one stands for all in the summary.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, more = problems[0], "" if len(problems) == 1 else ", the first"
        super().__init__(
            f"{len(problems)} broken{more}: {first.what}", first.where,
            "mend or remove what is named",
        )  # fmt: skip
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image, or a spatial block of one, with its label.

    Parameters
    ----------
    name : str
        Unique; decides the fold.
    image : ImageRef
        Pixels.
    label : Label
        Truth on the image's grid.
    window : Window or None
        The part of the image that this sample is; None = all.
    part : {"train", "val", ""}
        Given by the layout, or "" where the split decides.
    height, width : int
        Of the whole image; 0 until checked.
    """

    name: str
    image: ImageRef
    label: Label
    window: Window | None = None
    part: str = ""
    height: int = 0
    width: int = 0

    @property
    def extent(self) -> Window:
        """The window, or the whole image."""
        return self.window or Window(0, 0, self.height, self.width)


@dataclass(slots=True)
class Found:
    """What a layout found.

    Parameters
    ----------
    layout : str
        In words, for the log.
    samples : list of Sample
        In order of their names.
    problems : list of Problem
        What did not pair up.
    class_names : tuple of str
        Classes that polygons name.
    """

    layout: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DataSet:
    """A checked data set.

    Parameters
    ----------
    layout : str
        In words.
    samples : tuple of Sample
        In order of their names.
    classes : tuple of ClassInfo
        In order.
    palette : tuple of str
        The palette in lines of a palette file; empty for polygons.
    bands : int
        Of every image.
    dtype : str
        Numpy name of the pixels.
    resolution : dict of str to float
        `ground_resolution` or `mpp`, as in `tilenet.json`, where all images agree on it.
    """

    layout: str
    samples: tuple[Sample, ...]
    classes: tuple[ClassInfo, ...]
    palette: tuple[str, ...]
    bands: int
    dtype: str
    resolution: dict[str, float]


@dataclass(frozen=True, slots=True)
class Parts:
    """The two parts of a data set.

    Parameters
    ----------
    train, val : tuple of Sample
        In order of their names.
    words : str
        How they were made.
    """

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    words: str
