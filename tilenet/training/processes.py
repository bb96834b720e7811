"""Several processes of one run, one for each GPU: who writes, and who waits.

`accelerate launch -m tilenet train …` and `torchrun -m tilenet train …` start them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate.state import AcceleratorState, PartialState

from tilenet.errors import UsageError

__all__ = ["Processes", "joined"]


@dataclass(frozen=True, slots=True)
class Processes:
    """A process among those of its run.

    Parameters
    ----------
    index, count : int
        Which one, of how many; the first one writes.
    """

    index: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        PartialState().wait_for_everyone()

    def check_batch(self, batch_size: int) -> None:
        """Raise UsageError unless a batch splits over the processes."""
        if batch_size % self.count:
            raise UsageError(
                f"a batch of {batch_size} does not split over {self.count} processes",
                "--batch-size",
                f"try {-(-batch_size // self.count) * self.count}",
            )


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes of this run for as long as the context lasts.

    Parameters
    ----------
    device : str
        "cpu", or a CUDA device.
    """
    state = PartialState(cpu=device == "cpu")
    processes = Processes(state.process_index, state.num_processes)
    if not processes.is_main:  # one of them is enough to tell the user
        logging.getLogger("tilenet").setLevel(logging.ERROR)
    try:
        yield processes
    finally:
        state.destroy_process_group()
        # Accelerate keeps one state per program, and would refuse another precision next time.
        AcceleratorState._reset_state(reset_partial_state=True)
