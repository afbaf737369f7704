"""The self-test of ``mixft doctor``: one small case for every op and dtype, here those of products and quantization.

Inputs are rounded to the case's dtype first, so that the error is the op's own. The bounds are a few roundings of the
result's dtype; for the ops that quantize within, a few times the int8 step of 1/254 of a range.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixft import ops
from mixft.cli import self_test_steps
from mixft.cli.self_test import FP32, ROUNDING, Case

INT8_STEP = 1 / 254
ROWS, COLUMNS, DEPTH = 17, 35, 66


def _layer(dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH) / 8, torch.randn(COLUMNS)
    return [x.to(dtype), weight.to(dtype), bias.to(dtype)]


def _with_gradients(layer: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """A layer's output and the gradients of the sum of its squares, each leaf with its own."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = layer(*leaves)
    # FP64 stays what it is.
    total = out.to(torch.promote_types(out.dtype, FP32)).square().sum()
    return [out, *torch.autograd.grad(total / 8, leaves)]


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


def _mlp_case(dtype: torch.dtype) -> Case:
    def inputs(dtype: torch.dtype) -> list[Tensor]:
        back = torch.randn(DEPTH, COLUMNS) / 8
        return [*_layer(dtype), back.to(dtype), torch.randn(DEPTH).to(dtype)]

    def exact(*tensors: Tensor) -> list[Tensor]:
        def block(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x, weight1, bias1)), weight2, bias2) + x

        return _with_gradients(block, *tensors)

    def actual(*tensors: Tensor) -> list[Tensor]:
        return _with_gradients(lambda x, *parameters: ops.mlp(x, *parameters, "silu", residual=x), *tensors)

    return Case("mlp", dtype, inputs, actual, exact, 3 * ROUNDING[dtype])


def _int8_linear_case(dtype: torch.dtype) -> Case:
    return Case(
        "training_int8_linear",
        dtype,
        _layer,
        lambda *tensors: _with_gradients(ops.training_int8_linear, *tensors),
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


def _lora_linear_case(dtype: torch.dtype) -> Case:
    def inputs(dtype: torch.dtype) -> list[Tensor]:
        a, b = torch.randn(4, DEPTH) / 8, torch.randn(COLUMNS, 4) / 2
        return [*_weight_only_inputs(dtype), a.to(dtype), b.to(dtype)]

    return Case(
        "lora_int8_linear",
        dtype,
        inputs,
        lambda x, weight, scale, bias, a, b: [ops.lora_int8_linear(x, weight, scale[:, None], bias, a, b, 0.5)],
        lambda x, weight, scale, bias, a, b: [F.linear(x, weight * scale[:, None], bias) + 0.5 * (x @ a.t() @ b.t())],
        3 * INT8_STEP + 2 * ROUNDING[dtype],
    )


def _outlier_linear_case(dtype: torch.dtype) -> Case:
    return Case(
        "outlier_int8_linear",
        dtype,
        _weight_only_inputs,
        lambda x, weight, scale, bias: [ops.outlier_int8_linear(x, weight, scale[:, None], bias, threshold=2.5)],
        lambda x, weight, scale, bias: [F.linear(x, weight * scale[:, None], bias)],
        3 * INT8_STEP + ROUNDING[dtype],
    )


def _static_linear_case(dtype: torch.dtype) -> Case:
    def actual(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        _, input_scale, zero_point = ops.quantize(x, dim=None, symmetric=False)
        inputs = {"input_scale": input_scale, "input_zero_point": zero_point}
        return [ops.static_int8_linear(x, weight, scale[:, None], bias, **inputs)]

    return Case(
        "static_int8_linear",
        dtype,
        _weight_only_inputs,
        actual,
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


CASES = [
    make(dtype)
    for make in (
        _matmul_case,
        _mlp_case,
        _int8_matmul_case,
        _weight_only_case,
        _dynamic_linear_case,
        _lora_linear_case,
        _outlier_linear_case,
        _static_linear_case,
        _int8_linear_case,
        _quantize_case,
        _dequantize_case,
        self_test_steps.unscale_case,
        self_test_steps.grad_stats_case,
        self_test_steps.accumulate_case,
        self_test_steps.grad_scalars_case,
        self_test_steps.adamw_case,
        self_test_steps.sgd_case,
        self_test_steps.lion_case,
    )
    for dtype in ROUNDING
]
