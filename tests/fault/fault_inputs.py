"""Bad and odd inputs: the right exit code, one line, no traceback, no hang, no signal, no bomb.

`python tests/fault/fault_inputs.py WORD ...` runs the cases of that name, or whose names hold the
word, and prints how each ended.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workload import Ended, Outcome, Workload, digest  # noqa: I001  # sets the path of the rest

import networks
import rasters
from cases import Case
from cases_files import FILES
from cases_models import MODELS, make_models
from cases_tiff import TIFFS
from cases_usage import USAGE, make_mask
from forked import Forked, Forker
from places import differences

CASES = [*TIFFS, *FILES, *MODELS, *USAGE]
_BOMB_SECONDS, _BOMB_BYTES = 2.0, 200e6
RUN_FOLDER = ".x.zarr.tilenet"
_SHARE = 3  # one of so many cases in the short suite
_EVERY = 14  # one of so many is a command of its own too


def make_shared(folder: Path) -> None:
    """Make what cases share: a good raster, a good network."""
    folder.mkdir(parents=True)
    rasters.write_tif(folder / "ok.tif", rasters.picture(40, 50), georeferenced=True)
    networks.conv(folder / "conv.onnx")
    rasters.write_tif(folder / "truth.tif", rasters.picture(40, 50, 1, high=2))
    make_models(folder)
    make_mask(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the files of a case, without those of work in progress."""
    found = (p for p in folder.rglob("*") if p.is_file() and RUN_FOLDER not in p.parts)
    return {path: path.read_bytes() for path in found if path.stat().st_dev == folder.stat().st_dev}


def complaints(case: Case, ended: Ended, before: dict[Path, bytes], folder: Path) -> list[str]:
    """Return what is wrong with how a case ended."""
    wrong = []
    if ended.code not in case.codes:
        wrong.append(f"code {ended.code}, not {' or '.join(map(str, case.codes))}")
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("tilenet: error: ")]
    if "Traceback" in ended.err:
        wrong.append("a traceback")
    if any(not line.startswith("tilenet: ") for line in lines):
        wrong.append("foreign lines on stderr")
    lists = ended.code == 7 or case.arguments[0] == "train"  # one line for each input
    if ended.code and not lists and len(errors) != 1:
        wrong.append(f"{len(errors)} lines of error")
    if ended.code in case.codes and ended.code:
        wrong += [f"no {word!r}" for word in case.words if not any(word in e for e in errors)]
    if ended.code not in (0, 7) and contents(folder) != before:
        wrong.append("files were changed")
    if isinstance(ended, Forked) and case.bomb:
        if ended.seconds > _BOMB_SECONDS:
            wrong.append(f"{ended.seconds:.1f} s")
        if ended.grown > _BOMB_BYTES:
            wrong.append(f"{ended.grown / 1e6:.0f} MB")
    return wrong


class Bench:
    """A folder with what cases share, and the ways to run one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        folder.chmod(0o755)  # also who has no rights comes to where the files lie
        self.forker = Forker.ready()
        made = self.forker.call(lambda: make_shared(self.shared), seconds=60)
        assert made.code == 0, made.err
        self.before = digest(self.shared)

    def arguments(self, case: Case) -> list[str]:
        return [part.replace("{shared}", str(self.shared)) for part in case.arguments]

    def place(self, case: Case) -> Path:
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case.make(folder)
        if case.nobody:
            folder.chmod(0o777)
        return folder

    def forked(self, case: Case) -> tuple[Ended, list[str]]:
        """Run a case in a forked child, and look at its mask if there is one."""
        folder = self.place(case)
        before = contents(folder)
        ended = self.forker.command(self.arguments(case), folder, nobody=case.nobody)
        wrong = complaints(case, ended, before, folder)
        if ended.code == 0 and case.arguments[0] == "predict":
            source, _, out = self.arguments(case)[1:4]
            looked = self.forker.call(lambda: differences(folder / source, folder / out))
            wrong += looked.err.splitlines()
        return ended, wrong

    def alone(self, case: Case) -> tuple[Ended, list[str]]:
        """Run a case as the command that a user types."""
        folder = self.place(case)
        before = contents(folder)
        workload = Workload(self.folder, self.shared / "conv.onnx")
        line = [sys.executable, "-m", "tilenet", *self.arguments(case)]
        ended = workload.run(line, timeout=30, cwd=folder)
        return ended, complaints(case, ended, before, folder)

    def close(self) -> list[str]:
        """Return what became of the files that no case may touch."""
        return [] if digest(self.shared) == self.before else ["shared files were changed"]


def run(folder: Path, *, long: bool) -> Outcome:
    """Run the cases, or a share of them, in forked children, and some of these as commands."""
    bench = Bench(folder)
    failures, slowest, alone = [], 0.0, 0
    chosen = CASES[:: 1 if long else _SHARE]
    for index, case in enumerate(chosen):
        ended, wrong = bench.forked(case)
        slowest = max(slowest, ended.seconds)
        if not case.nobody and (index % _EVERY == 0):
            alone += 1
            wrong += [f"{w} (as a command)" for w in bench.alone(case)[1]]
        if wrong:
            failures.append(f"{case.name}: {', '.join(wrong)}: {ended.err.strip()[:300]}")
    failures += bench.close()
    negative = sum(case.negative for case in chosen)
    return Outcome(
        len(chosen), failures,
        {"negative": negative, "commands": alone, "slowest": round(slowest, 2)},
    )  # fmt: skip


def main(words: list[str]) -> int:
    """Run the cases whose names hold one of the words; print how each ended."""
    names = {case.name for case in CASES}

    def meant(name: str) -> bool:
        return not words or any(w == name if w in names else w in name for w in words)

    chosen = [case for case in CASES if meant(case.name)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="tilenet-") as folder:
        bench = Bench(Path(folder))
        start = time.monotonic()
        for case in chosen:
            ended, wrong = bench.forked(case)
            failed += bool(wrong)
            verdict = f"FAILED {', '.join(wrong)}" if wrong else "ok"
            grown = ended.grown / 1e6 if isinstance(ended, Forked) else 0
            print(f"{case.name}: {ended.code} {ended.seconds:.2f} s {grown:.0f} MB {verdict}")
            shown = ended.err if wrong or os.environ.get("SHOW") else ""
            print("".join(f"    {line[:300]}\n" for line in shown.splitlines()[-12:]), end="")
        for line in bench.close():
            print("FAILED", line)
        print(f"{len(chosen)} cases, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
