"""Many Dask workers of one machine: `workers.py SCHEDULER COUNT FOLDER PRELOAD`.

As `dask worker`, one process each, but everything is imported once and the processes are forks of
that: 32 that import for themselves would keep two cores busy for minutes and fill the memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import distributed

import tilenet.engine.task  # noqa: F401 - what the workers would import with their first task


async def serve(address: str, folder: str, preload: str) -> None:
    async with distributed.Worker(
        address, nthreads=3, memory_limit=0, dashboard=False, local_directory=folder,
        preload=[preload],
    ) as worker:  # fmt: skip
        await worker.finished()


def main() -> None:
    address, count, folder, preload = sys.argv[1:]
    children = []
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            asyncio.run(serve(address, folder, preload))
            os._exit(0)
        children.append(pid)
    sys.stdout.write(" ".join(map(str, children)) + "\n")
    sys.stdout.flush()
    try:
        signal.pause()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main()
