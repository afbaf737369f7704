"""What the device reaches in this very run: the ceilings that every figure is held against."""

import contextlib
from dataclasses import dataclass
from functools import partial

import torch

from .timing import Effort, interleaved, quartiles

# Larger than any cache, so that a copy runs at the speed of memory.
STREAM_BYTES = 2**27
MATMUL_SIZE = {"cpu": 768, "cuda": 8192}
RATES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
# A product of 16-bit or 8-bit numbers can also be computed at the rate of a wider type, where that is faster.
AT_LEAST = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp32"), "int8": tuple(RATES)}


@dataclass(frozen=True)
class Machine:
    """Ceilings, each the median of this run.

    Attributes:
        copy_bytes_per_second: of ``torch.Tensor.copy_``, reads and writes counted.
        read_bytes_per_second: of a sum over FP32.
        update_bytes_per_second: of an addition in place, reads and writes counted: a CPU, which reads what a copy
            overwrites too, moves more so.
        matmul_operations_per_second: of torch's own product of large square matrices, multiplications and additions
            counted, by type of the operands: "fp32" (at torch's precision setting), "fp16", "bf16", "int8".
    """

    copy_bytes_per_second: float
    read_bytes_per_second: float
    matmul_operations_per_second: dict[str, float]
    update_bytes_per_second: float = 0.0

    def floor_seconds(self, nbytes: int, operations: int = 0, rate: str | None = None) -> float:
        """The least time for so much traffic and so many operations of type ``rate``, the two overlapped."""
        fastest = max(self.copy_bytes_per_second, self.read_bytes_per_second, self.update_bytes_per_second)
        traffic = nbytes / fastest
        if rate is None:
            return traffic
        known = self.matmul_operations_per_second
        return max(traffic, operations / max(known[name] for name in AT_LEAST[rate] if name in known))


def measure_machine(device: torch.device, effort: Effort) -> Machine:
    """Measure the ceilings; a type whose product this torch cannot compute on the device has no rate."""
    source = torch.ones(STREAM_BYTES // 4, device=device)
    target = torch.empty_like(source)
    # One FP32 sum for each of many rows: a single one would measure the additions, which depend on each other.
    rows = source.view(-1, 2**12)
    streams = {"copy": lambda: target.copy_(source), "read": lambda: rows.sum(1), "update": lambda: source.add_(target)}
    streams = interleaved(streams, device, effort)
    products = interleaved(_products(device), device, effort)
    operations = 2 * MATMUL_SIZE[device.type] ** 3
    return Machine(
        copy_bytes_per_second=2 * STREAM_BYTES / quartiles(streams["copy"])[1],
        read_bytes_per_second=STREAM_BYTES / quartiles(streams["read"])[1],
        update_bytes_per_second=3 * STREAM_BYTES / quartiles(streams["update"])[1],
        matmul_operations_per_second={name: operations / quartiles(times)[1] for name, times in products.items()},
    )


def _products(device: torch.device) -> dict:
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device)
    products = {}
    for name, dtype in RATES.items():
        # The second operand is stored as [N, K], the layout of a linear layer's weight.
        x, y = (a, b.t()) if dtype != torch.int8 else ((a * 16).to(dtype), (b * 16).to(dtype).t())
        x, y = x.to(dtype), y.to(dtype)
        multiply = partial(torch._int_mm if dtype == torch.int8 else torch.mm, x, y)
        with contextlib.suppress(RuntimeError):
            multiply()
            products[name] = multiply
    return products
