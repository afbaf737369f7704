"""How ``mixft doctor`` holds one op to FP64: what a case is, and how it is run."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# What one rounding of a result may cost, with room.
ROUNDING = {FP16: 2e-3, BF16: 1.6e-2, FP32: 1e-5}


@dataclass(frozen=True)
class Case:
    """One op at one dtype.

    Attributes:
        op: its name in ``mixft.ops``.
        dtype: of the floating inputs, or of the result where the inputs are int8.
        inputs: makes the inputs on the CPU.
        actual: the op on those inputs, as a list of tensors to compare.
        exact: the same list from the same inputs as FP64 tensors.
        bound: the largest error that passes.
    """

    op: str
    dtype: torch.dtype
    inputs: Callable[[torch.dtype], list[Tensor]]
    actual: Callable[..., list[Tensor]]
    exact: Callable[..., list[Tensor]]
    bound: float


@dataclass(frozen=True)
class Outcome:
    """What one case gave on one device: an error to hold against the case's bound, or a failure to run at all."""

    case: Case
    error: float | None
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.case.bound


def run_case(case: Case, device: torch.device) -> Outcome:
    """Run ``case`` on ``device``. Whatever the op raises is its outcome, so a broken one does not hide the others."""
    with ThreadPoolExecutor(1) as thread:
        attempt = thread.submit(_error, case, device)
    if (failure := attempt.exception()) is not None:
        return Outcome(case, None, f"{type(failure).__name__}: {' '.join(str(failure).split())}")
    return Outcome(case, attempt.result(), None)


def _error(case: Case, device: torch.device) -> float:
    torch.manual_seed(0)
    inputs = case.inputs(case.dtype)
    exact = case.exact(*(tensor.double() for tensor in inputs))
    actual = case.actual(*(tensor.to(device) for tensor in inputs))
    return max(_relative_error(a, e) for a, e in zip(actual, exact, strict=True))


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    actual = actual.detach().double().cpu()
    if actual.shape != exact.shape:
        raise ValueError(f"result of shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    difference = (actual - exact).abs().max().item()
    if not math.isfinite(difference):
        raise ValueError("the result holds NaN or Inf")
    return difference / exact.abs().max().item()
