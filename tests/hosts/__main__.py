"""Hosts that lose each other: `make cluster`, or `python tests/hosts [--short] [NAME ...]`.

A client, a scheduler and two workers, each on a host of its own (namespaces for network, name and
processes; one file system), under TLS. In the middle of a run something breaks; the mask must have
a local run's bytes, or the command ends with exit 9 in bounded time and a rerun has them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fault"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import network


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases; default all")
    parser.add_argument("--short", action="store_true", help="a smaller run and a shorter cut")
    parser.add_argument("--lacking", action="store_true", help="only say what this machine lacks")
    options = parser.parse_args()
    lacking = network.lacking()
    if lacking or options.lacking:
        print(lacking)
        return int(bool(lacking) and not options.lacking)
    network.enter()
    from cuts import CASES, LONG, SHORT, strangers, try_case

    size, failed = SHORT if options.short else LONG, 0
    with tempfile.TemporaryDirectory(prefix="tilenet-hosts-") as folder:
        for name in options.names or [*CASES, "strangers"]:
            if name == "strangers":
                problem, figures = strangers(Path(folder), size)
            else:
                problem, figures = try_case(name, Path(folder), size)
            failed += bool(problem)
            print(name, json.dumps(figures), flush=True)
            if problem:
                print("  FAILED:", problem, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
