"""``mixft.ops.matmul``: 16-bit matrix product with FP32 accumulation, its epilogue in the same pass."""

import math

import torch
from torch import Tensor

from .activation import check_activation
from .activation_backward import activation_backward
from .registration import define_op
from .validation import FLOATS


@define_op("matmul")
def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:-1], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype), a.new_empty(shape if keep_preactivation else (0,))


@define_op("matmul")
def matmul_activation_backward(
    a: Tensor, b: Tensor, kept: Tensor, activation: str, want_sum: bool
) -> tuple[Tensor, Tensor]:
    columns = b.shape[1]
    return a.new_empty(a.shape[0], columns), a.new_empty((columns if want_sum else 0,), dtype=torch.float32)


@define_op("matmul", mutates_args=("out",))
def matmul_accumulate_(out: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def save_for_backward(ctx, inputs, output) -> None:
    a, b, bias, activation, _, keep_preactivation, residual = inputs
    out, preactivation = output
    # ReLU's slope can be read from its output, which the next layer keeps anyway, unless a residual is added to it.
    output_serves = activation == "relu" and residual is None
    kept = preactivation if keep_preactivation else out if output_serves else None
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, kept)
    # The pre-activation stays differentiable: a second derivative then meets activation_backward, which has none and
    # says so, where a constant would give a wrong one.
    ctx.set_materialize_grads(False)
    if not keep_preactivation:
        ctx.mark_non_differentiable(preactivation)
    ctx.activation = activation
    ctx.dtype = a.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.columns_first = b.stride(0) == 1


def backward(ctx, grad, grad_preactivation):
    a, b, kept = ctx.saved_tensors
    needs_a, needs_b, needs_bias, *_, needs_residual = ctx.needs_input_grad
    activation = ctx.activation
    grad_residual = None
    if needs_residual and grad is not None:
        grad_residual = grad.to(ctx.residual_dtype)
    if grad is None:
        grad, grad_preactivation, activation = grad_preactivation, None, "none"
    lead = grad.shape[:-1]
    rows = math.prod(lead)
    grad = grad.reshape(rows, grad.shape[-1])
    grad_a = grad_b = grad_bias = None
    if not (needs_a or needs_b or needs_bias):
        return None, None, None, None, None, None, grad_residual
    if activation == "none":
        if needs_bias:
            grad_bias = grad.sum(0, dtype=torch.float32)
        grad = grad.to(ctx.dtype)
    elif kept is None:
        raise RuntimeError(
            f"the gradient of {activation!r} needs the pre-activation: call mixft.ops.matmul, or pass "
            "keep_preactivation=True"
        )
    else:
        grad, grad_bias = activation_backward(grad, kept, activation, ctx.dtype, needs_bias)
    if grad_preactivation is not None:
        grad_preactivation = grad_preactivation.reshape(grad.shape)
        grad = grad + grad_preactivation
        if needs_bias:
            grad_bias = grad_bias + grad_preactivation.sum(0, dtype=torch.float32)
    if needs_a:
        grad_a = product(grad, b.t()).view(*lead, b.shape[0])
    if needs_b:
        a = a.reshape(rows, a.shape[-1])
        # In the memory layout of b, which for weight.t() is what autograd accumulates into weight.grad without a copy.
        grad_b = product(grad.t(), a).t() if ctx.columns_first else product(a.t(), grad)
    grad_bias = grad_bias.to(ctx.bias_dtype) if needs_bias else None
    return grad_a, grad_b, grad_bias, None, None, None, grad_residual


def product(a: Tensor, b: Tensor) -> Tensor:
    return matmul_forward(a, b, None, "none", a.dtype, False)[0]


matmul_forward.register_autograd(backward, setup_context=save_for_backward)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(a @ b + bias) + residual``, summed in FP32 and rounded once.

    FP16 and BF16 run in mixft's kernels; on GPUs without matrix instructions in Triton (Turing), and for FP32
    operands, in torch's own matmul, which follows torch's ``float32_matmul_precision``. A product with nothing fused is
    torch's too where that is the faster one, with its partial sums in FP32. Differentiable in ``a``, ``b``, ``bias``
    and ``residual``; a second derivative exists for ``activation=None`` only. The gradient of the pre-activation is
    rounded to the dtype of ``a`` before the two products that use it, as torch rounds it.

    Args:
        a: [..., M, K] or [K], FP16, BF16 or FP32, any strides.
        b: [K, N], the dtype of ``a``, any strides; for a linear layer ``weight.t()``.
        bias: [N], the dtype of ``a`` or FP32.
        activation: ``None``, ``"relu"``, ``"gelu"`` (the erf form), ``"gelu_tanh"`` or ``"silu"``; the formulas are in
            ``mixft.kernels.activation``.
        out_dtype: FP16, BF16 or FP32; the dtype of ``a`` when not given.
        residual: [..., M, N], the shape of the result; the dtype of ``a`` or FP32, any strides. It is added after the
            activation, as a transformer block adds its input to what its last linear layer makes of it.

    Returns:
        [..., M, N], or [N] for a 1-D ``a``, contiguous.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, or an unknown activation.
        TypeError: a dtype that is not supported, or operands of different dtypes.
    """
    name = check_activation(activation)
    dtype = a.dtype
    if dtype not in FLOATS:
        raise TypeError(f"a is {dtype}; matmul takes float16, bfloat16 and float32")
    if b.dtype != dtype:
        raise TypeError(f"a is {dtype} and b is {b.dtype}; both must have one dtype")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"out_dtype is {out_dtype}; it can be float16, bfloat16 or float32")
    if b.dim() != 2 or a.dim() == 0 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be [..., M, K] and [K, N]")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; both must be on one device")
    keep = a.requires_grad or b.requires_grad
    if bias is not None:
        if bias.dtype != dtype and bias.dtype != torch.float32:
            raise TypeError(f"bias is {bias.dtype}; it must be {dtype}, as a is, or torch.float32")
        if bias.dim() != 1 or bias.shape[0] != b.shape[1]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be ({b.shape[1]},), as b is {tuple(b.shape)}"
            )
        if bias.device != a.device:
            raise ValueError(f"bias is on {bias.device} and a on {a.device}; all must be on one device")
        keep = keep or bias.requires_grad
    if residual is not None:
        shape = (*a.shape[:-1], b.shape[1])
        if residual.dtype not in (dtype, torch.float32):
            raise TypeError(f"residual is {residual.dtype}; it must be {dtype}, as a is, or torch.float32")
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be {shape}, the result's")
        if residual.device != a.device:
            raise ValueError(f"residual is on {residual.device} and a on {a.device}; all must be on one device")
    needs_slope = activation is not None and (activation != "relu" or residual is not None)
    keep = keep and needs_slope and torch.is_grad_enabled()
    return matmul_forward(a, b, bias, name, out_dtype or dtype, keep, residual)[0]
