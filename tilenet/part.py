"""A part: the share of a run that one of several commands makes, each without knowing the others.

`--part auto` takes it from the variables that schedulers set for each task of an array.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilenet.errors import UsageError

__all__ = ["Part"]

_FROM_ZERO = (
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("AWS_BATCH_JOB_NODE_INDEX", "AWS_BATCH_JOB_NUM_NODES"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes sets the first one only
)
"""Variables with an index that counts from 0, and a count."""

_SLURM = "SLURM_ARRAY_TASK_"
_WHERE = "--part auto"


@dataclass(frozen=True, slots=True)
class Part:
    """One of several shares of a run's work.

    Parameters
    ----------
    index : int
        Which one, from 1.
    count : int
        How many there are.

    Raises
    ------
    UsageError
        There is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"there is no part {self}", "--part", "write I/N, with I from 1 to N")

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> Part:
        """Return the part that ``I/N`` names, or for ``auto`` the environment.

        Raises
        ------
        UsageError
            It names none.
        """
        if text == "auto":
            return cls._found(environment)
        numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if numbers is None:
            raise UsageError(f"no part {text}", "--part", "write I/N, as in 2/8, or auto")
        return cls(int(numbers[1]), int(numbers[2]))

    @classmethod
    def _found(cls, environment: Mapping[str, str]) -> Part:
        if f"{_SLURM}ID" in environment:
            return cls._of_slurm(environment)
        for index, count in _FROM_ZERO:
            if index in environment:
                return cls(_number(environment, index) + 1, _number(environment, count))
        names = [f"{_SLURM}ID", *(index for index, _ in _FROM_ZERO)]
        raise UsageError(
            f"this is no task of an array: none of {', '.join(names)} is set", _WHERE, "write I/N"
        )

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> Part:
        task, first, last, step, count = (
            _number(environment, f"{_SLURM}{name}")
            for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
        )
        if step < 1 or first + (count - 1) * step != last or (task - first) % step:
            raise UsageError(
                f"the array's tasks {first} to {last} are not evenly numbered", _WHERE,
                "write I/N, or submit an array like 1-8",
            )  # fmt: skip
        return cls((task - first) // step + 1, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """What files of this part are called by."""
        return f"{self.index}-of-{self.count}"

    def range_of(self, items: int) -> range:
        """Return which of so many numbered items are this part's: neighbours, as many as others'.

        Of a single one it is the first part.
        """
        first, stop = (-(-items * k // self.count) for k in (self.index - 1, self.index))
        return range(first, stop)

    def every[T](self, items: Sequence[T]) -> Sequence[T]:
        """Return this part's items when they are dealt out in turn."""
        return items[self.index - 1 :: self.count]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UsageError(f"{name} is not set", _WHERE, "set it in the job, or write I/N")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{name} is no number: {text}", _WHERE, "write I/N")
    return int(text)
