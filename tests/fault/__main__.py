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
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

KINDS = [path.stem for path in sorted(Path(__file__).parent.glob("fault_*.py"))]


def missing(needs: tuple[str, ...]) -> list[str]:
    """Return what this machine lacks: programs, or to be root."""
    return [
        need for need in needs
        if (os.geteuid() if need == "root" else shutil.which(need) is None)
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument("--long", action="store_true", help="the full numbers of trials")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    chosen = [f"fault_{name.removeprefix('fault_')}" for name in options.names] or KINDS
    results = {}
    for kind in chosen:
        start, module = time.monotonic(), importlib.import_module(kind)
        lacking = missing(getattr(module, "NEEDS", ()))
        if lacking:
            results[kind] = {"skipped": f"needs {', '.join(lacking)}"}
            print(kind.removeprefix("fault_"), json.dumps(results[kind]), flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="tilenet-") as folder:
            outcome = module.run(Path(folder), long=options.long)
        results[kind] = {
            "trials": outcome.trials, "failed": len(outcome.failures), **outcome.figures,
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        print(kind.removeprefix("fault_"), json.dumps(results[kind]), flush=True)
        for line in outcome.failures[:20]:
            print("  FAILED:", line, flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return int(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
