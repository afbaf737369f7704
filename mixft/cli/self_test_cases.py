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


RATE, DECAY = 0.1, 0.1


def _step_case(name: str, dtype: torch.dtype, moments: int, step_: Callable[..., None], exact: Callable) -> Case:
    """Two steps on FP32 masters with scaled gradients, then one that an overflow has to stop.

    Args:
        moments: state tensors a parameter.
        step_: called with the lists of parameters, gradients, masters, each state, and steps, and the scalars.
        exact: the parameter and its state after two steps, from the parameter and the unscaled gradient.
    """

    def actual(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone()
        masters = [] if dtype == FP32 else [param.float()]
        states = [torch.zeros_like(param, dtype=torch.float32) for _ in range(moments)]
        step, lr, inverse, clean, overflow = (
            torch.tensor(value, device=param.device) for value in (0.0, RATE, 0.25, 0.0, 1.0)
        )
        for found_inf in (clean, clean, overflow):
            listed = [[state] for state in states]
            step_([param], [grad], masters, *listed, [step], lr=lr, inv_scale=inverse, found_inf=found_inf)
        return [param, *(masters or [param]), *states, step]

    def expected(param: Tensor, grad: Tensor) -> list[Tensor]:
        weight, *states = exact(param, grad / 4)
        return [weight, weight, *states, torch.tensor(2.0, dtype=torch.float64)]

    return Case(name, dtype, _parameter_and_gradient, actual, expected, ROUNDING[dtype])


def _by_torch(make: Callable, *names: str) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Two steps of the torch optimizer that ``make`` makes: the parameter, and its state by ``names``."""

    def exact(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone().requires_grad_()
        param.grad = grad
        optimizer = make([param], lr=RATE, weight_decay=DECAY)
        optimizer.step()
        optimizer.step()
        return [param.detach(), *(optimizer.state[param][name] for name in names)]

    return exact


def _adamw_case(dtype: torch.dtype) -> Case:
    def step_(params, grads, masters, first, second, steps, **scalars) -> None:
        ops.adamw_(params, grads, masters, first, second, [], steps, weight_decay=DECAY, **scalars)

    return _step_case("adamw_", dtype, 2, step_, _by_torch(torch.optim.AdamW, "exp_avg", "exp_avg_sq"))


def _sgd_case(dtype: torch.dtype) -> Case:
    options = {"momentum": 0.9, "nesterov": True}

    def step_(*tensors, **scalars) -> None:
        ops.sgd_(*tensors, weight_decay=DECAY, **options, **scalars)

    def make(params, **common) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **common, **options)

    return _step_case("sgd_", dtype, 1, step_, _by_torch(make, "momentum_buffer"))


def _lion_case(dtype: torch.dtype) -> Case:
    def step_(*tensors, **scalars) -> None:
        ops.lion_(*tensors, weight_decay=DECAY, **scalars)

    def exact(param: Tensor, grad: Tensor) -> list[Tensor]:
        # A constant gradient: every step is along its sign.
        for _ in range(2):
            param = param * (1 - RATE * DECAY) - RATE * grad.sign()
        return [param, grad * (1 - 0.99**2)]

    return _step_case("lion_", dtype, 1, step_, exact)


def _accumulate_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = grads[0].clone()
        spoiled[-1] = float("inf")
        sums = [torch.ones_like(grad, dtype=FP32) for grad in grads]
        flags = torch.zeros(2, device=grads[0].device)
        counts = torch.zeros(len(grads), dtype=torch.int64, device=grads[0].device)
        inv_scale = torch.full((1,), 0.25, device=grads[0].device)
        ops.accumulate_(grads, sums, found_inf=flags[:1], nonfinite=counts, inv_scale=inv_scale)
        ops.accumulate_([spoiled], [torch.zeros_like(sums[0])], found_inf=flags[1:], nonfinite=counts[:1])
        return [*sums, torch.cat([flags, counts[:1]])]

    def exact(*grads: Tensor) -> list[Tensor]:
        return [*(1 + grad / 4 for grad in grads), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)]

    return Case("accumulate_", dtype, _gradients, actual, exact, ROUNDING[FP32])


def _grad_scalars_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = torch.cat([grads[0], grads[0].new_tensor([float("nan"), float("-inf")])])
        clean = ops.grad_scalars(grads, inv_scale=torch.tensor(0.25, device=grads[0].device), max_norm=1.0)
        broken = ops.grad_scalars([grads[1], spoiled])
        return [torch.stack([*clean[:3], broken.found_inf]), broken.nonfinite]

    def exact(*grads: Tensor) -> list[Tensor]:
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt() / 4
        flags = [torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0)]
        return [torch.stack([norm, 1 / (norm + 1e-6), *flags]), torch.tensor([0.0, 2.0], dtype=torch.float64)]

    return Case("grad_scalars", dtype, _gradients, actual, exact, ROUNDING[FP32])


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
        _unscale_case,
        _grad_stats_case,
        _accumulate_case,
        _grad_scalars_case,
        _adamw_case,
        _sgd_case,
        _lion_case,
    )
    for dtype in (FP16, BF16, FP32)
]
