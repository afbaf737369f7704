"""``mixft.ops.matmul``: 16-bit matrix product with FP32 accumulation, its epilogue in the same pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .activation import ACTIVATIONS, check_activation
from .activation_backward import activation_backward, column_sums, differentiable_activation_backward
from .registration import define_op, is_transformed, needs_dispatch, without_dispatch
from .validation import FLOATS, check_out_dtype


@define_op("matmul")
def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
    residual: Tensor | None,
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
    ctx.activation = activation
    ctx.dtype = a.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.columns_first = b.stride(0) == 1
    ctx.accumulate_into = None


def set_up_context(ctx, inputs, output) -> None:
    save_for_backward(ctx, inputs, output)
    # The pre-activation stays differentiable, as a second derivative goes through it.
    ctx.set_materialize_grads(False)
    keep_preactivation = inputs[5]
    if not keep_preactivation:
        ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, grad_preactivation):
    a, b, kept = ctx.saved_tensors
    # The seven of matmul_forward, and one of AccumulatingMatmul's.
    needs_a, needs_b, needs_bias, _, _, _, needs_residual, *_ = ctx.needs_input_grad
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
            grad_bias = column_sums(grad)
        grad = grad.to(ctx.dtype)
    elif kept is None:
        raise RuntimeError(
            f"the gradient of {activation!r} needs the pre-activation; call mixft.ops.matmul, or pass "
            "keep_preactivation=True"
        )
    else:
        slope = differentiable_activation_backward if derives_again() else in_backward(activation_backward, grad, kept)
        grad, grad_bias = slope(grad, kept, activation, ctx.dtype, needs_bias)
    if grad_preactivation is not None:
        grad_preactivation = grad_preactivation.reshape(grad.shape)
        grad = grad + grad_preactivation
        if needs_bias:
            grad_bias = grad_bias + grad_preactivation.sum(0, dtype=torch.float32)
    multiply = in_backward(matmul_forward, grad, a, b)
    if needs_a:
        grad_a = product(multiply, grad, b.t()).view(*lead, b.shape[0])
    a = a.reshape(rows, a.shape[-1]) if needs_b else None
    if needs_b and ctx.accumulate_into is not None:
        accumulate = in_backward(matmul_accumulate_, ctx.accumulate_into, grad, a)
        if ctx.accumulate_into.is_contiguous():
            accumulate(ctx.accumulate_into, a.t(), grad)
        else:
            accumulate(ctx.accumulate_into.t(), grad.t(), a)
        if accumulate is not matmul_accumulate_:
            torch.autograd.graph.increment_version(ctx.accumulate_into)
    elif needs_b:
        # In the memory layout of b, which for weight.t() is what autograd accumulates into weight.grad without a copy.
        grad_b = product(multiply, grad.t(), a).t() if ctx.columns_first else product(multiply, a.t(), grad)
    grad_bias = grad_bias.to(ctx.bias_dtype) if needs_bias else None
    return grad_a, grad_b, grad_bias, None, None, None, grad_residual


def in_backward(op, *tensors: Tensor | None) -> Callable:
    """``op`` for a call in a backward: under ``create_graph`` autograd has to see it."""
    return op if torch.is_grad_enabled() else without_dispatch(op, *tensors)


def product(multiply: Callable, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by ``matmul_forward`` or its implementation."""
    return multiply(a, b, None, "none", a.dtype, False, None)[0]


matmul_forward.register_autograd(backward, setup_context=set_up_context)


class Matmul(torch.autograd.Function):
    """``matmul_forward`` where nothing but autograd has to see the call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = matmul_forward.without_dispatch[inputs[0].device.type](*inputs)
        set_up_context(ctx, inputs, output)
        return output

    backward = staticmethod(backward)


class AccumulatingMatmul(torch.autograd.Function):
    """``matmul_forward`` whose gradient of ``b`` is added to a buffer and is None to autograd."""

    @staticmethod
    def forward(ctx, a, b, bias, activation, out_dtype, keep_preactivation, residual, accumulate_into):
        inputs = (a, b, bias, activation, out_dtype, keep_preactivation, residual)
        output = without_dispatch(matmul_forward, a, b, bias, residual)(*inputs)
        save_for_backward(ctx, inputs, output)
        # Not among the saved tensors, which must not change before the backward: every backward changes it.
        ctx.accumulate_into = accumulate_into
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("a matmul with accumulate_into")
        return *backward(ctx, grad, None), None


def derives_again() -> bool:
    """Whether a backward runs under ``create_graph``, so that what it does is to be differentiated in its turn."""
    # A compiler traces it with gradients on, and has no second derivative of its own.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_second_derivative(name: str) -> None:
    """Raise RuntimeError in the backward of an autograd function under ``create_graph``, which has no derivative."""
    if derives_again():
        raise RuntimeError(f"{name} has no second derivative; take the first without create_graph")


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    residual: Tensor | None = None,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """``activation(a @ b + bias) + residual``, summed in FP32 and rounded once.

    FP16 and BF16 run in mixft's kernels; on GPUs without matrix instructions in Triton (Turing), and for FP32
    operands, in torch's own matmul, which follows torch's ``float32_matmul_precision``. A product with nothing fused is
    torch's too where that is the faster one, with its partial sums in FP32. Differentiable in ``a``, ``b``, ``bias``
    and ``residual``, and twice but for ``accumulate_into``. The gradient of the pre-activation is rounded to the dtype
    of ``a`` before the two products that use it, as torch rounds it. Under the transforms of ``torch.func`` and in
    forward mode torch's operators compute all of it, which round in between.

    Args:
        a: [..., M, K] or [K], FP16, BF16 or FP32, any strides.
        b: [K, N], the dtype of ``a``, any strides; for a linear layer ``weight.t()``.
        bias: [N], the dtype of ``a`` or FP32.
        activation: ``None``, ``"relu"``, ``"gelu"`` (the erf form), ``"gelu_tanh"`` or ``"silu"``; the formulas are in
            ``mixft.kernels.activation``.
        out_dtype: FP16, BF16 or FP32; the dtype of ``a`` when not given.
        residual: [..., M, N], the shape of the result; the dtype of ``a`` or FP32, any strides. It is added after the
            activation, as a transformer block adds its input to what its last linear layer makes of it.
        accumulate_into: FP32 [K, N], contiguous or the transpose of a contiguous tensor. The backward adds the gradient
            of ``b`` to it, unrounded and in the same pass as the product, and gives autograd none for ``b``; without a
            gradient of ``b`` nothing is added. For a linear layer ``weight.main_grad.t()``.

    Returns:
        [..., M, N], or [N] for a 1-D ``a``, contiguous.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, or an unknown activation.
        TypeError: a dtype that is not supported, or operands of different dtypes.
        NotImplementedError: ``accumulate_into`` under a transform of ``torch.func`` or in forward mode.
    """
    name = check_activation(activation)
    check_operands(a, b)
    check_added("bias", bias, (b.shape[1],), a)
    check_added("residual", residual, (*a.shape[:-1], b.shape[1]), a)
    if out_dtype is not None:
        check_out_dtype(out_dtype)
    if is_transformed(a, b, bias, residual):
        if accumulate_into is not None:
            raise NotImplementedError(
                "accumulate_into takes what a backward adds, and a transform of torch.func or forward-mode "
                "differentiation has none; leave it out, for a linear layer by fuse_wgrad_accumulation=False"
            )
        return _by_torch(a, b, bias, name, out_dtype or a.dtype, residual)
    needs_slope = activation is not None and (activation != "relu" or residual is not None)
    keep = needs_slope and wants_gradient(a, b, bias)
    arguments = (a, b, bias, name, out_dtype or a.dtype, keep, residual)
    if accumulate_into is None:
        if needs_dispatch(a, b, bias, residual):
            return matmul_forward(*arguments)[0]
        if wants_gradient(a, b, bias, residual):
            return Matmul.apply(*arguments)[0]
        return matmul_forward.without_dispatch[a.device.type](*arguments)[0]
    if accumulate_into.dtype != torch.float32:
        raise TypeError(f"accumulate_into is {accumulate_into.dtype}; it must be torch.float32")
    in_order = accumulate_into.is_contiguous() or accumulate_into.t().is_contiguous()
    if accumulate_into.shape != b.shape or accumulate_into.device != a.device or not in_order:
        raise ValueError(
            f"accumulate_into has shape {tuple(accumulate_into.shape)}, strides {accumulate_into.stride()} and is on "
            f"{accumulate_into.device}; it must be {tuple(b.shape)}, as b is, without gaps and on {a.device}"
        )
    return AccumulatingMatmul.apply(*arguments, accumulate_into)


def _by_torch(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, residual: Tensor | None
) -> Tensor:
    out = a @ b
    out = ACTIVATIONS[activation](out if bias is None else out + bias)
    return (out if residual is None else out + residual).to(out_dtype)


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def check_operands(a: Tensor, b: Tensor) -> None:
    """Raise ValueError or TypeError unless :func:`matmul` can multiply them."""
    if a.dtype not in FLOATS:
        raise TypeError(f"a is {a.dtype}; matmul takes float16, bfloat16 and float32")
    if b.dtype != a.dtype:
        raise TypeError(f"a is {a.dtype} and b is {b.dtype}; both must have one dtype")
    if b.dim() != 2 or a.dim() == 0 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be [..., M, K] and [K, N]")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device} and b on {b.device}; both must be on one device")


def check_added(name: str, tensor: Tensor | None, shape: tuple[int, ...], a: Tensor) -> None:
    """Raise ValueError or TypeError unless ``tensor``, None or of ``shape``, can be added to a product of ``a``."""
    if tensor is None:
        return
    if tensor.dtype not in (a.dtype, torch.float32):
        raise TypeError(f"{name} is {tensor.dtype}; it must be {a.dtype}, as the operands are, or torch.float32")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape} to be added to the product")
    if tensor.device != a.device:
        raise ValueError(f"{name} is on {tensor.device} and the operands are on {a.device}; all must be on one device")
