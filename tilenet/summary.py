"""Pixels and area per class: lines for a person, a CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from tilenet import durable
from tilenet.errors import OutputError, convert_errors, one_line
from tilenet.results import ClassPixels, PredictResult, RunResult

__all__ = ["check_csv", "lines", "write_csv"]

COLUMNS = (
    "input", "output", "class_id", "class", "pixels", "share", "area", "area_unit", "error",
)  # fmt: skip
"""Of the CSV. `share` is of the pixels that have an answer."""

_UNITS = {"mm2": "mm²", "ha": "ha", None: ""}
_MAX_INPUTS = 20  # of more inputs only the sum is told: thousands of lines are no summary
_MAX_CLASSES = 20


def check_csv(path: Path) -> None:
    """Raise OutputError if there is something at `path` that is no table of ours.

    A run of hours should not find that out at its end.
    """
    with convert_errors(path):
        if path.is_dir():
            raise OutputError("the table is a folder", path, "give --csv a file")
        if not path.exists() and not path.is_symlink():
            return
        with path.open("rb") as file:
            head = file.readline(len(_row(COLUMNS)))
        if head != _row(COLUMNS):
            raise OutputError("the file exists and is not tilenet's", path, "choose another --csv")


def write_csv(result: PredictResult, path: Path) -> None:
    """Write one row per input and class, and one for each input that failed.

    The file is on disk when the call returns, whole or not at all; its folder is made if need be.

    Parameters
    ----------
    result : PredictResult
        What became of the inputs.
    path : Path
        The table; one of ours is replaced.

    Raises
    ------
    OutputError, ResourceError
        It cannot be written.
    """
    errors = {failure.input: failure.error for failure in result.failed}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run in result.runs:
        rows += _rows(run, errors.pop(run.input, ""))
    rows += [(name, "", "", "", "", "", "", "", error) for name, error in errors.items()]
    check_csv(path)
    with convert_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, b"".join(map(_row, rows)))


def _rows(run: RunResult, error: str) -> list[tuple[str, ...]]:
    return [
        (
            run.input,
            run.output,
            str(one.id),
            one.name,
            str(one.pixels),
            f"{_share(one, run.classes):.6f}",
            "" if one.area is None else repr(one.area),
            one.area_unit or "",
            error,
        )
        for one in run.classes
    ]


def _row(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    # A file's name need not be text.
    return text.getvalue().encode(errors="backslashreplace")


def _share(one: ClassPixels, classes: Iterable[ClassPixels]) -> float:
    return one.pixels / (sum(c.pixels for c in classes) or 1)


def lines(result: PredictResult) -> list[str]:
    """Return what a person reads at the end: a line per input if they are few, and a table.

    The table has the classes that occur, summed over all inputs. Of a mask of which others make
    parts, there is only a line to say how far it is.
    """
    if not result.runs or not result.complete:
        return [_so_far(run) for run in result.runs]
    several = len(result.runs) > 1
    text = []
    if several and len(result.runs) <= _MAX_INPUTS:
        text = [_line(run) for run in result.runs]
    if several:
        text.append(f"{len(result.runs)} masks:")
    nodata = sum(run.nodata_pixels for run in result.runs)
    return text + _table(_summed(result.runs), nodata)


def _summed(runs: Iterable[RunResult]) -> list[ClassPixels]:
    """Return the classes of all runs; an area only where every run has one in the same unit."""
    found: dict[tuple[int, str], list[ClassPixels]] = {}
    for run in runs:
        for one in run.classes:
            found.setdefault((one.id, one.name), []).append(one)
    summed = []
    for (number, name), parts in found.items():
        areas = [part.area for part in parts if part.area is not None]
        units = {part.area_unit for part in parts}
        same = len(units) == 1 and len(areas) == len(parts)
        summed.append(
            ClassPixels(
                number,
                name,
                sum(part.pixels for part in parts),
                sum(areas) if same else None,
                parts[0].area_unit if same else None,
            )
        )
    return summed


def _told(classes: Iterable[ClassPixels]) -> list[ClassPixels]:
    """Return the largest classes that occur, in order."""
    there = sorted((one for one in classes if one.pixels), key=lambda one: -one.pixels)
    return sorted(there[:_MAX_CLASSES], key=lambda one: one.id)


def _area(one: ClassPixels) -> str:
    return "" if one.area is None else f"{one.area:,.6g} {_UNITS[one.area_unit]}"


def _line(run: RunResult) -> str:
    parts = []
    for one in _told(run.classes):
        inside = [f"{100 * _share(one, run.classes):.1f} %", _area(one)]
        parts.append(f"{one_line(one.name)} {one.pixels:,} px ({', '.join(filter(None, inside))})")
    return f"{one_line(run.output)}: {'; '.join(parts) or 'no answer'}"


def _so_far(run: RunResult) -> str:
    done = f"{run.blocks_done} of {run.blocks} blocks of {one_line(run.output)} are done"
    return f"part {run.part}: {done}; the other parts make the rest"


def _table(classes: list[ClassPixels], nodata: int) -> list[str]:
    told = _told(classes)
    rows = [("class", "pixels", "share", "area")]
    rows += [
        (one_line(c.name), f"{c.pixels:,}", f"{100 * _share(c, classes):.2f} %", _area(c))
        for c in told
    ]
    left = sum(1 for one in classes if one.pixels) - len(told)
    if left:
        rows.append((f"({left} smaller classes)", "", "", ""))
    if nodata:
        rows.append(("(no answer)", f"{nodata:,}", "", ""))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows
    ]
