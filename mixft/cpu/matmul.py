"""CPU routine of ``mixft.kernels.matmul``: FP32 products, and oneDNN's BF16 product where the CPU has the instructions.

torch's FP16 matmul takes several times as long as its FP32 one on a CPU without FP16 arithmetic, so FP16 is computed in
FP32. Three BF16 products of operands split in two would take 1.4 times as long where BF16 has twice the rate of FP32.

A BF16 product is rounded by the library that computes it, so what follows the sum has to be done there as well: oneDNN
applies GELU and SiLU to its FP32 sum, and adds a residual to it. Its ReLU would turn NaN into 0; one after the rounding
gives the same bits as one before it. Where the pre-activation is kept for a backward, the activation is that of the
kept, rounded one, as in torch: to have both exactly would take a second product.

FP32 products go to oneDNN where the CPU has AVX-512: MKL, which serves torch's FP32 matmul, keeps to AVX2 on CPUs that
are not Intel's, and then takes twice as long.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .activation import finish_product
from .activation_backward import activation_backward, one_pass
from .instruction_set import has_avx512, has_bf16_dot
from .overlap import without_overlap


@functools.cache
def has_onednn_linear() -> bool:
    """Whether oneDNN's FP32 linear layer is there and uses AVX-512."""
    return torch.backends.mkldnn.is_available() and has_avx512() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# oneDNN prepares each new shape for about 2 ms, which fewer multiplications than these do not win back in a few calls.
ONEDNN_MULTIPLICATIONS = 2**26


def fp32_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` of FP32 tensors [M, K], [K, N] and [N]."""
    if a.shape[0] * b.numel() >= ONEDNN_MULTIPLICATIONS and has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, without_overlap(b.t()), bias, "none", [], "")
    return F.linear(a, b.t(), bias)


# oneDNN's names of the activations that it applies to its FP32 sum: operation and variant.
FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


# From so many elements on torch's addition of a bias costs more than oneDNN's, which comes with a longer preparation.
FUSED_BIAS = 2**17


def bf16_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` of BF16 tensors, rounded once."""
    if bias is None:
        return torch.mm(a, b)
    if a.shape[0] * b.shape[1] >= FUSED_BIAS and a.shape[1] > 0 and has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, without_overlap(b.t()), bias, "none", [], "")
    return F.linear(a, b.t(), bias)


def bf16_linear(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None = None
) -> Tensor | None:
    """The BF16 result for BF16 tensors, rounded once; None where no BF16 product of this CPU gives it."""
    if not has_bf16_dot():
        return None
    if residual is None and activation in ("none", "relu"):
        return finish_product(bf16_product(a, b, bias), activation, torch.bfloat16)[0]
    if a.numel() == 0 or b.numel() == 0 or not has_onednn_linear():
        return None
    if residual is None:
        operation, variant = FUSED[activation]
        return torch.ops.mkldnn._linear_pointwise(a, without_overlap(b.t()), bias, operation, [], variant)
    if activation == "none":
        return torch.ops.mkldnn._linear_pointwise.binary(a, residual, without_overlap(b.t()), bias, "add")
    return None


def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``activation(a @ b + bias) + residual`` and the pre-activation in ``a``'s dtype, empty unless asked for."""
    bare = activation == "none" and not keep_preactivation and bias is None and residual is None
    if bare and a.dim() == 2 and a.dtype == out_dtype == torch.bfloat16 and has_bf16_dot():
        # The two products of a layer's backward.
        return torch.mm(a, b), a.new_empty(0)
    shape = None
    if a.dim() != 2:
        shape = (*a.shape[:-1], b.shape[1])
        a = a.reshape(math.prod(shape[:-1]), a.shape[-1])
        residual = None if residual is None else residual.reshape(a.shape[0], b.shape[1])
    dtypes = {out_dtype, *(tensor.dtype for tensor in (a, bias, residual) if tensor is not None)}
    in_bf16 = dtypes == {torch.bfloat16}
    keep_dtype = a.dtype if keep_preactivation else None
    out = preactivation = None
    if in_bf16 and not keep_preactivation:
        out = bf16_linear(a, b, bias, activation, residual)
    elif in_bf16 and residual is None and activation != "none":
        product = bf16_linear(a, b, bias, "none")
        if product is not None:
            out, preactivation = finish_product(product, activation, out_dtype, None, keep_dtype)
    if out is None:
        product = fp32_product(a.float(), b.float(), None if bias is None else bias.float())
        out, preactivation = finish_product(product, activation, out_dtype, residual, keep_dtype)
    if preactivation is None:
        return out if shape is None else out.view(shape), a.new_empty(0)
    return (out, preactivation) if shape is None else (out.view(shape), preactivation.view(shape))


def matmul_activation_backward(
    a: Tensor, b: Tensor, kept: Tensor, activation: str, want_sum: bool
) -> tuple[Tensor, Tensor]:
    """``(a @ b) * d activation(kept)`` [M, N] in the dtype of ``a`` and its FP32 sum over rows, empty unless wanted."""
    grad = bf16_linear(a, b, None, "none") if a.dtype == torch.bfloat16 else None
    if grad is None:
        grad = fp32_product(a.float(), b.float(), None)
    if native.available():
        out = grad if grad.dtype == a.dtype else torch.empty_like(grad, dtype=a.dtype)
        return out, one_pass(grad, kept, activation, out, want_sum)
    return activation_backward(grad, kept, activation, a.dtype, want_sum)


def matmul_accumulate_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` for a contiguous FP32 ``out`` [M, N]."""
    out.add_(fp32_product(a.float(), b.float(), None))
