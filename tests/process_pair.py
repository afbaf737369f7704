"""Two processes that make one gloo group, for what a single one cannot show."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# Within which a process that waits for the other fails, in place of hanging.
PATIENCE = timedelta(seconds=30)


class ProcessPair:
    """Calls a function in both at once; they stay for the next call, as importing torch is most of the time.

    Args:
        folder: an empty one, where they meet.
    """

    def __init__(self, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, spawn, join, (str(folder / "store"), rank)) for rank in range(2)]

    def call(self, function: Callable, *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returned in each, in order; raises what it raised."""
        running = [pool.submit(function, rank, *args) for rank, pool in enumerate(self._pools)]
        return [process.result() for process in running]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


def join(store: str, rank: int) -> None:
    # The Triton interpreter has its own tests.
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=PATIENCE
    )
