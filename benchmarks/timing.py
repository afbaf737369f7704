"""Interleaved timing: every provider of a case takes its turn in every round, in one process; medians over rounds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Longer than the clock's and the scheduler's grain; shorter samples repeat their call.
SAMPLE_SECONDS = 0.005
# Larger than any cache, so that a copy runs at the speed of memory.
COPY_BYTES = 2**27


@dataclass(frozen=True)
class Machine:
    """What the device reaches in this very run: the floor that each figure is held against."""

    copy_bytes_per_second: float
    matmul_operations_per_second: float

    def floor_seconds(self, nbytes: int, operations: int) -> float:
        """The least time for so much memory traffic and so many operations, the two overlapped."""
        return max(nbytes / self.copy_bytes_per_second, operations / self.matmul_operations_per_second)


def interleaved_medians(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds a call, by name. On a GPU that is device time, by events, with the caches cleared before each."""
    clock = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    repeats = {name: 1 if device.type == "cuda" else _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        # Another one goes first every round, so that no provider always follows the same neighbour.
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock(calls[name], repeats[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def measure_machine(device: torch.device, rounds: int) -> Machine:
    """Copy bandwidth, reads and writes counted, and the rate of torch's matmul: FP16 on a GPU, FP32 on a CPU."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    size, dtype = (4096, torch.float16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    seconds = interleaved_medians(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b)}, device, rounds
    )
    return Machine(2 * COPY_BYTES / seconds["copy"], 2 * size**3 / seconds["matmul"])


def _cpu_clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], object]) -> int:
    call()
    return max(1, round(SAMPLE_SECONDS / max(_cpu_clock(call, 1), 1e-7)))


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(COPY_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[], object], repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record(torch.cuda.current_stream(device))
            call()
            stop.record(torch.cuda.current_stream(device))
            stop.synchronize()
            total += start.elapsed_time(stop) / 1e3
        return total / repeats

    return clock
