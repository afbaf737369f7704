"""Calls that launch every kernel, as users' calls do: the ops, every optimizer in every storage, and odd sizes.

Every form that a ``variants`` lists is among them, and any other is one that ``recorded_launches.py`` has too.
"""

import functools
from collections.abc import Callable

import recorded_launches
import torch
from optimizer_cases import CASES, STORAGES, OptimizerCase, give_gradients, mixed_parameters
from recorded_launches import accumulated, fused_backward, half, product, quantized, w8a8_static, w8a16

from mixft import ops
from mixft.amp import GradAccumulator, LossScaler, clip_grad_norm_
from mixft.cli import self_test_cases
from mixft.cli.self_test import Case
from mixft.kernels.quantize_gradient import quantize_gradient

CLIPPING = {"max_grad_norm": 1.0}


def op(case: Case) -> None:
    case.actual(*case.inputs(case.dtype))


def steps(case: OptimizerCase, options: dict) -> None:
    """A step with a scaler, one with gradients unscaled and clipped before it, one without, and a checkpoint."""
    params = mixed_parameters("cpu")
    optimizer = case.ours(params, **options)
    scaler = LossScaler(device="cpu")
    for unscale in (False, True):
        scaler.scale(torch.ones(()))
        give_gradients(params)
        if unscale:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
    give_gradients(params)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def accumulated_step(case: OptimizerCase) -> None:
    """Of two micro-batches, at gradients and parameters that begin inside a vector of 16 bytes."""
    params = [torch.nn.Parameter(half(18)[1:])]
    optimizer = case.ours(params, **case.options)
    scaler = LossScaler(device="cpu")
    accumulator = GradAccumulator(optimizer, scaler)
    params[0].grad = half(18)[1:]
    ops.grad_stats([params[0].grad])
    ops.grad_scalars([params[0].grad])
    for _ in range(2):
        scaler.scale(torch.ones(()))
        accumulator.accumulate(set_to_none=False)
    scaler.step(optimizer)
    scaler.update()
    single = case.ours(params, **case.options)
    scaler.scale(torch.ones(()))
    scaler.unscale_(single)
    scaler.step(single)


def step_without_scalars() -> None:
    param, grad, first, second = torch.empty(4, 1000)
    ops.adamw_([param], [grad], [], [first], [second], [], [torch.zeros(())], lr=torch.tensor(0.1))


def layer(M: int, N: int, K: int, activation: str | None = None) -> None:
    """The forward and the backward of a linear layer of N features."""
    x, weight = half(M, K).requires_grad_(), half(N, K).requires_grad_()
    out = ops.matmul(x, weight.t(), None, activation)
    out.backward(torch.empty_like(out))


def overlapping(rows: int) -> torch.Tensor:
    """Rows of 4096 values that no descriptor describes."""
    return half(2**17).as_strided((rows, 4096), (16, 1))


def gradient_at_random() -> None:
    quantize_gradient(torch.empty(64, 64), torch.empty(64), torch.empty(64), torch.zeros((), dtype=torch.int64))


LAUNCHES: dict[str, Callable[[], None]] = recorded_launches.PRODUCTS | recorded_launches.LAUNCHES
# What the others lack of the forms that ship.
LAUNCHES |= {
    "wide layer": lambda: layer(4096, 4096, 4096),
    "medium layer": lambda: layer(1024, 1024, 1024, "gelu"),
    "medium slopes in a product": lambda: fused_backward(1024, 1024, 1024, "gelu"),
    "wide with a bias": lambda: product(4096, 4096, 4096, bias=True),
    "medium, added up": lambda: accumulated(1024, 1024, 1024),
    "small": lambda: product(16, 16384, 1024, "silu", bias=True),
    "split, with a bias": lambda: product(256, 256, 4096, bias=True),
    "split, activated": lambda: product(256, 256, 4096, "gelu", bias=True, keep=True, residual=True),
    "overlapping rows": lambda: product(4096, 4096, 4096, bias=True, left=overlapping(4096)),
    "overlapping rows, medium": lambda: product(
        512, 4096, 4096, "gelu_tanh", bias=True, keep=True, left=overlapping(512)
    ),
    "overlapping rows, kept": lambda: product(4096, 4096, 4096, "gelu", bias=True, keep=True, left=overlapping(4096)),
    "overlapping rows, all": lambda: product(
        4096, 4096, 4096, "gelu", bias=True, keep=True, residual=True, left=overlapping(4096)
    ),
    "overlapping rows, residual": lambda: product(4096, 4096, 4096, residual=True, left=overlapping(4096)),
    "overlapping rows, slopes": lambda: fused_backward(4096, 4096, 4096, "gelu", left=overlapping(4096)),
    "w8a8 static, few rows": lambda: w8a8_static(16, 16384, 1024),
    "w8a16 few rows": lambda: w8a16(16, 16384, 1024),
    "w8a16 many rows": lambda: w8a16(4096, 4096, 4096),
    "rows with a factor": lambda: quantized(4096, 4096, 1, torch.float16, factor=True),
    "long rows": lambda: quantized(4096, 16384, 1, torch.bfloat16, symmetric=False, stochastic=True),
    "columns with a factor": lambda: quantized(1, 256, 4096, torch.bfloat16, factor=True),
    "gradient at random": gradient_at_random,
    "step without scalars": step_without_scalars,
}
LAUNCHES |= {f"{case.op} {case.dtype}": functools.partial(op, case) for case in self_test_cases.CASES}
LAUNCHES |= {f"{case} of micro-batches": functools.partial(accumulated_step, case) for case in CASES}
LAUNCHES |= {
    f"{case} {options}": functools.partial(steps, case, case.options | options)
    for case in CASES
    for options in (*case.variations, *STORAGES.values(), *(storage | CLIPPING for storage in STORAGES.values()))
}
