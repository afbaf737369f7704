"""The self-test of ``mixft doctor``: one small case for every op and dtype.

Inputs are rounded to the case's dtype first, so that the error is the op's own. The bounds are a few roundings of the
result's dtype; for the ops that quantize within, a few times the int8 step of 1/254 of a range.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixft import ops
from mixft.cli.self_test import Case

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {FP16: 2e-3, BF16: 1.6e-2, FP32: 1e-5}
INT8_STEP = 1 / 254
ROWS, COLUMNS, DEPTH = 17, 35, 66


def _layer(dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH) / 8, torch.randn(COLUMNS)
    return [x.to(dtype), weight.to(dtype), bias.to(dtype)]


def _with_gradients(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """A layer's output and the gradients of the sum of its squares, each leaf with its own."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = layer(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum() / 8, leaves)]


def _exact_with_gradients(activation: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        out = activation(F.linear(*leaves))
        return [out.detach(), *torch.autograd.grad(out.square().sum() / 8, leaves)]

    return exact


def _matmul_case(dtype: torch.dtype) -> Case:
    return Case(
        "matmul",
        dtype,
        _layer,
        lambda *tensors: _with_gradients(lambda x, w, b: ops.matmul(x, w.t(), b, "gelu"), *tensors),
        _exact_with_gradients(F.gelu),
        2 * ROUNDING[dtype],
    )


def _int8_linear_case(dtype: torch.dtype) -> Case:
    return Case(
        "int8_linear",
        dtype,
        _layer,
        lambda *tensors: _with_gradients(ops.int8_linear, *tensors),
        _exact_with_gradients(lambda out: out),
        5 * INT8_STEP + ROUNDING[dtype],
    )


def _int8_operands(dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randint(-127, 128, (ROWS, DEPTH), dtype=torch.int8),
        torch.randint(-127, 128, (COLUMNS, DEPTH), dtype=torch.int8),
        torch.rand(ROWS) / 100,
        torch.rand(COLUMNS) / 100,
        torch.randn(COLUMNS).to(dtype),
    ]


def _int8_matmul_case(dtype: torch.dtype) -> Case:
    return Case(
        "int8_matmul",
        dtype,
        _int8_operands,
        lambda a, b, a_scale, b_scale, bias: [ops.int8_matmul(a, b, a_scale, b_scale, bias, "silu", dtype)],
        lambda a, b, a_scale, b_scale, bias: [F.silu(a_scale[:, None] * b_scale * (a @ b.T) + bias)],
        ROUNDING[dtype],
    )


def _weight_only_inputs(dtype: torch.dtype) -> list[Tensor]:
    _, b, _, b_scale, bias = _int8_operands(dtype)
    return [torch.randn(ROWS, DEPTH).to(dtype), b, b_scale, bias]


def _weight_only_case(dtype: torch.dtype) -> Case:
    return Case(
        "weight_only_matmul",
        dtype,
        _weight_only_inputs,
        lambda a, b, b_scale, bias: [ops.weight_only_matmul(a, b, b_scale, bias)],
        lambda a, b, b_scale, bias: [b_scale * (a @ b.T) + bias],
        ROUNDING[dtype],
    )


def _dynamic_linear_case(dtype: torch.dtype) -> Case:
    return Case(
        "dynamic_int8_linear",
        dtype,
        _weight_only_inputs,
        lambda x, weight, scale, bias: [ops.dynamic_int8_linear(x, weight, scale[:, None], bias)],
        lambda x, weight, scale, bias: [F.linear(x, weight * scale[:, None], bias)],
        3 * INT8_STEP + ROUNDING[dtype],
    )


def _quantize_case(dtype: torch.dtype) -> Case:
    def actual(x: Tensor) -> list[Tensor]:
        results = []
        for options in ({}, {"dim": 0, "symmetric": False}, {"dim": None}, {"group_size": 11, "symmetric": False}):
            values, scale, zero_point = ops.quantize(x, **options)
            steps = values.double() if zero_point is None else values.double() - _expand(zero_point, values)
            results.append(steps * _expand(scale, values))
        return results

    return Case(
        "quantize",
        dtype,
        lambda dtype: [torch.randn(ROWS, DEPTH).to(dtype)],
        actual,
        lambda x: [x] * 4,
        1.01 * INT8_STEP,
    )


def _expand(scale: Tensor, values: Tensor) -> Tensor:
    """One scale an element, from one a group along the last dimension, a row, a column or the tensor."""
    scale = scale.double()
    groups = scale.shape[-1]
    return scale.repeat_interleave(values.shape[-1] // groups, -1) if groups > 1 else scale


def _dequantize_case(dtype: torch.dtype) -> Case:
    return Case(
        "dequantize",
        dtype,
        lambda _: [
            torch.randint(-128, 128, (ROWS, DEPTH), dtype=torch.int8),
            torch.rand(ROWS, 1),
            torch.randint(-128, 128, (ROWS, 1), dtype=torch.int32),
        ],
        lambda values, scale, zero_point: [ops.dequantize(values, scale, zero_point, dtype=dtype)],
        lambda values, scale, zero_point: [(values - zero_point) * scale],
        ROUNDING[dtype],
    )


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1000).to(dtype), torch.randn(ROWS, DEPTH).to(dtype), torch.randn(1).to(dtype)]


def _unscale_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        grads = [grad.clone() for grad in grads]
        spoiled = grads[0].clone()
        spoiled[-1] = float("inf")
        inverse, clean, overflow = (torch.full((1,), value, device=grads[0].device) for value in (0.3, 0.0, 0.0))
        ops.unscale_(grads, inverse, clean)
        ops.unscale_([spoiled], inverse, overflow)
        return [*grads, torch.cat([clean, overflow])]

    return Case(
        "unscale_",
        dtype,
        _gradients,
        actual,
        lambda *grads: [
            *(grad * torch.tensor(0.3).double() for grad in grads),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
        ],
        ROUNDING[dtype],
    )


def _grad_stats_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = torch.cat([grads[0], grads[0].new_tensor([float("nan"), float("-inf")])])
        return [ops.grad_stats(grads)[0], ops.grad_stats([spoiled])[1]]

    return Case(
        "grad_stats",
        dtype,
        _gradients,
        actual,
        lambda *grads: [torch.stack([grad.square().sum() for grad in grads]), torch.tensor([2.0], dtype=torch.float64)],
        ROUNDING[FP32],
    )


def _parameter_and_gradient(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(ROWS, DEPTH).to(dtype), torch.randn(ROWS, DEPTH).to(dtype)]


def _adamw_case(dtype: torch.dtype) -> Case:
    """Two steps on FP32 masters with scaled gradients, then one that an overflow has to stop."""
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

    def actual(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone()
        masters = [] if dtype == FP32 else [param.float()]
        first, second = (torch.zeros_like(param, dtype=torch.float32) for _ in range(2))
        step, lr, inverse, clean, overflow = (
            torch.tensor(value, device=param.device) for value in (0.0, options["lr"], 0.25, 0.0, 1.0)
        )
        for found_inf in (clean, clean, overflow):
            ops.adamw_(
                [param],
                [grad],
                masters,
                [first],
                [second],
                [],
                [step],
                lr=lr,
                inv_scale=inverse,
                found_inf=found_inf,
                weight_decay=options["weight_decay"],
            )
        return [param, *(masters or [param]), first, second, step]

    def exact(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone().requires_grad_()
        param.grad = grad / 4
        optimizer = torch.optim.AdamW([param], **options)
        optimizer.step()
        optimizer.step()
        state = optimizer.state[param]
        return [param.detach(), param.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"].double()]

    return Case(
        "adamw_",
        dtype,
        _parameter_and_gradient,
        actual,
        exact,
        ROUNDING[dtype],
    )


CASES = [
    make(dtype)
    for make in (
        _matmul_case,
        _int8_matmul_case,
        _weight_only_case,
        _dynamic_linear_case,
        _int8_linear_case,
        _quantize_case,
        _dequantize_case,
        _unscale_case,
        _grad_stats_case,
        _adamw_case,
    )
    for dtype in (FP16, BF16, FP32)
]
