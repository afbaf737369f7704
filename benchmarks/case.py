"""What a benchmark case is, and the check that a provider's output passes before it is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .recording import Sweep

OURS = "mixft"


class Missing(Exception):
    """A provider's package is not installed; the message says which."""


class Refused(Exception):
    """A provider does not serve a case here; the message says why."""


@dataclass(frozen=True)
class Call:
    """What a provider does for a case, ready to be timed.

    Attributes:
        run: the work itself.
        result: makes of what ``run`` returned the tensors to check; None where it returned these.
        held: bytes of the tensors that the provider holds, by component; None where that means nothing.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Sequence[Tensor]] | None = None
    held: Callable[[], dict[str, int]] | None = None

    def checked_result(self) -> Sequence[Tensor]:
        """Run once and return the tensors to check."""
        returned = self.run()
        return returned if self.result is None else self.result(returned)


Provider = Callable[[Any], Call]


def each(function: Callable[[Any], Any], result: Callable[[Any], Sequence[Tensor]] | None = None) -> Provider:
    """A provider whose work is ``function(inputs)``, the same every time."""
    return lambda inputs: Call(lambda: function(inputs), result)


def compiled(function: Callable[[Any], Any], result: Callable[[Any], Sequence[Tensor]] | None = None) -> Provider:
    """:func:`each` under ``torch.compile``."""
    return lambda inputs: each(torch.compile(function, dynamic=False), result)(inputs)


@dataclass(frozen=True)
class Case:
    """One entry of the registry: inputs, who does the work on them, and what the result must be.

    Attributes:
        name: unique, ``family/size``.
        inputs: makes the inputs on a device, the same ones after the same ``torch.manual_seed``.
        exact: the result in FP64 from those inputs, computed on their device.
        providers: implementations of the work by name, mixft's first. Each takes the inputs and returns a
            :class:`Call`, whose first run is the one that is checked; it raises Missing or Refused where it cannot.
        bound: largest error that counts as the same work, relative to the largest exact value of each tensor.
        own_bounds: bounds of single providers by name.
        bytes: least memory traffic of the work, read and written.
        operations: multiplications and additions of the work's matrix products.
        rate: the type of those products: "fp32", "fp16", "bf16" or "int8".
        tokens: tokens that a call processes.
        devices: types of the devices that the case is for.
        needs: bytes of memory that all providers hold together, where that may be too much.
        long: left out of quick runs.
        memory: whether the memory of each provider is measured too.
        sweep: the case's place in a series.
        reason_if_slower: why a peer is faster than mixft here, if one is and nothing can be done.
    """

    name: str
    inputs: Callable[[torch.device], Any]
    exact: Callable[[Any], Sequence[Tensor]]
    providers: Mapping[str, Provider]
    bound: float
    bytes: int
    operations: int = 0
    rate: str | None = None
    tokens: int | None = None
    own_bounds: Mapping[str, float] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: int = 0
    long: bool = False
    memory: bool = False
    sweep: Sweep | None = None
    reason_if_slower: str | None = None

    @property
    def family(self) -> str:
        return self.name.split("/")[0]


def complaint(outputs: Sequence[Tensor], exact: Sequence[Tensor], bound: float) -> str | None:
    """Why ``outputs`` are not ``exact`` within ``bound``; None when they are."""
    if len(outputs) != len(exact):
        return f"{len(outputs)} results, expected {len(exact)}"
    for output, true in zip(outputs, exact, strict=True):
        if output.shape != true.shape:
            return f"shape {tuple(output.shape)}, expected {tuple(true.shape)}"
        if not true.numel():
            continue
        difference = (output.detach().to(true.device, torch.float64) - true).abs().max().item()
        error = difference / true.abs().max().clamp(min=torch.finfo(torch.float64).tiny).item()
        # Written so that NaN does not pass.
        if not error <= bound:
            return f"error {error:.1e}, bound {bound:.1e}"
    return None
