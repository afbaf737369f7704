"""What a benchmark case is, and the check that its outputs pass before any of them is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """One case's inputs, made.

    Attributes:
        providers: implementations of the same work by name, mixft's first. Each takes nothing and returns the tensors
            that hold its result; the first call of each is the one that is checked.
        exact: the same tensors in FP64.
        bound: largest error of a provider that counts as the same work, relative to the largest exact value.
        bytes: least memory traffic of the work, read and written.
        operations: multiplications and additions of the work's matrix products.
        own_bounds: by name, the providers with a bound of their own.
    """

    providers: dict[str, Callable[[], Sequence[Tensor]]]
    exact: Sequence[Tensor]
    bound: float
    bytes: int
    operations: int = 0
    own_bounds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the registry.

    Attributes:
        name: unique, ``family/size``.
        build: makes the inputs on a device.
        peers: the names of the workload's providers after mixft's.
    """

    name: str
    build: Callable[[torch.device], Workload]
    peers: tuple[str, ...] = ("torch",)


def complaint(outputs: Sequence[Tensor], workload: Workload, provider: str) -> str | None:
    """Why ``outputs`` of ``provider`` are not the result of the work; None when they are."""
    bound = workload.own_bounds.get(provider, workload.bound)
    if len(outputs) != len(workload.exact):
        return f"{len(outputs)} results, expected {len(workload.exact)}"
    for output, exact in zip(outputs, workload.exact, strict=True):
        if output.shape != exact.shape:
            return f"shape {tuple(output.shape)}, expected {tuple(exact.shape)}"
        if not exact.numel():
            continue
        difference = (output.detach().double().cpu() - exact).abs().max().item()
        error = difference / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny).item()
        # Written so that NaN does not pass.
        if not error <= bound:
            return f"error {error:.1e}, bound {bound:.1e}"
    return None
