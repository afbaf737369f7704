"""What a run measures while it trains: step times, losses, accuracy, tokens, memory."""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

FINAL_STEPS = 20  # steps whose mean is the training loss shown and reported
EVENT_SECONDS = 0.25  # a progress event reads the loss, which waits for the device: so not after every step

Emit = Callable[..., None]


class StepClock:
    """Seconds of each step: by the clock on a CPU, by events, which wait for nothing, on a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple] = []

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, started) -> None:
        self.marks.append((started, self.now()))

    def seconds(self) -> list[float]:
        if not self.on_gpu:
            return [end - start for start, end in self.marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self.marks]


class Meter:
    """Losses, accuracy and tokens so far, kept on the device and read only when they are shown."""

    def __init__(self, device: torch.device):
        self.losses: list[torch.Tensor] = []
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = 0
        self.tokens = 0
        self.started = self.shown = time.perf_counter()

    def count(self, logits: torch.Tensor, labels: torch.Tensor, predictions: int, tokens: int) -> None:
        self.correct += (logits.detach().argmax(-1) == labels).sum()
        self.seen += predictions
        self.tokens += tokens

    def due(self) -> bool:
        return time.perf_counter() - self.shown >= EVENT_SECONDS

    def show(self, emit: Emit, learning_rate: float, loss_scale: float | None) -> None:
        """Emit a ``step`` event."""
        emit(
            "step",
            step=len(self.losses),
            loss=finite(self.recent_loss()),
            accuracy=self.correct.item() / self.seen,
            learning_rate=learning_rate,
            loss_scale=loss_scale,
            tokens_per_second=self.tokens / (time.perf_counter() - self.started),
        )
        self.shown = time.perf_counter()

    def recent_loss(self) -> float:
        return torch.stack(self.losses[-FINAL_STEPS:]).mean().item()


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by torch's allocator, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose figure a new process takes over from the one that started it.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
