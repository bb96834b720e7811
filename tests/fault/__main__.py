"""The fault suite: `make fault`, `make fault-long`, or `python tests/fault [--long] [NAME ...]`.

Each kind of fault is a module with `run(folder, long=…) -> Outcome`. What is printed is what was
tried; the exit code is 1 if any promise was broken. A kind that needs what this machine lacks
(root, a compiler, strace) says so and is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

KINDS = [path.stem for path in sorted(Path(__file__).parent.glob("fault_*.py"))]


def missing(needs: tuple[str, ...]) -> list[str]:
    """Return what this machine lacks: programs, or to be root."""
    return [
        need for need in needs
        if (os.geteuid() if need == "root" else shutil.which(need) is None)
    ]  # fmt: skip


def run(kind: str, *, long: bool) -> dict[str, Any]:
    """Run one kind of fault in this process; return its figures."""
    start, module = time.monotonic(), importlib.import_module(kind)
    lacking, failures = missing(getattr(module, "NEEDS", ())), []
    if lacking:
        found: dict[str, Any] = {"skipped": f"needs {', '.join(lacking)}"}
    else:
        with tempfile.TemporaryDirectory(prefix="tilenet-") as folder:
            outcome = module.run(Path(folder), long=long)
        failures = outcome.failures
        found = {
            "trials": outcome.trials, "failed": len(failures), **outcome.figures,
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
    print(kind.removeprefix("fault_"), json.dumps(found), flush=True)
    for line in failures[:20]:
        print("  FAILED:", line, flush=True)
    return found


def run_apart(kind: str, *, long: bool) -> dict[str, Any]:
    """Run one kind in a process of its own: some fork, and must not meet others' threads."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        line = [sys.executable, __file__, kind, "--out", out.name, *(["--long"] if long else [])]
        code = subprocess.run(line, check=False).returncode
        text = Path(out.name).read_bytes()
    return dict(json.loads(text)[kind]) if text else {"failed": 1, "exit_code": code}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument("--long", action="store_true", help="the full numbers of trials")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    chosen = [f"fault_{name.removeprefix('fault_')}" for name in options.names] or KINDS
    how = run if len(chosen) == 1 else run_apart
    results = {kind: how(kind, long=options.long) for kind in chosen}
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return int(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
