"""CPU routine of ``mixft.kernels.matmul``: FP32 products, and torch's BF16 product where the CPU has the instructions.

torch's FP16 matmul takes several times as long as its FP32 one on a CPU without FP16 arithmetic, so FP16 is computed in
FP32. BF16 products go to torch only when nothing happens between the sum and the cast, because torch rounds its result.
FP32 products go to oneDNN where the CPU has AVX-512: MKL, which serves torch's FP32 matmul, keeps to AVX2 on CPUs that
are not Intel's, and then takes twice as long.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS
from .instruction_set import has_bf16_dot


@functools.cache
def has_onednn_linear() -> bool:
    """Whether oneDNN's FP32 linear layer is there and uses AVX-512."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# oneDNN prepares each new shape for about 2 ms, which fewer multiplications than these do not win back in a few calls.
ONEDNN_MULTIPLICATIONS = 2**26


def fp32_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` of FP32 tensors [M, K], [K, N] and [N]."""
    if a.shape[0] * b.numel() >= ONEDNN_MULTIPLICATIONS and has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return F.linear(a, b.t(), bias)


def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """``activation(a @ b + bias)`` and the pre-activation in ``a``'s dtype, an empty tensor unless asked for."""
    lead = a.shape[:-1]
    a = a.reshape(math.prod(lead), a.shape[-1])
    one_dtype = out_dtype == a.dtype and (bias is None or bias.dtype == a.dtype)
    plain = activation == "none" and one_dtype and not keep_preactivation
    if plain and a.dtype == torch.bfloat16 and has_bf16_dot():
        product = F.linear(a, b.t(), bias)
    else:
        product = fp32_product(a.float(), b.float(), None if bias is None else bias.float())
    preactivation = product.to(a.dtype, copy=True) if keep_preactivation else a.new_empty(0)
    out = ACTIVATIONS[activation](product).to(out_dtype)
    shape = (*lead, b.shape[1])
    return out.view(shape), preactivation.view(shape) if keep_preactivation else preactivation


def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``grad * d activation(kept)`` [M, N] in ``dtype`` and its FP32 sum over rows [N], empty unless asked for."""
    grad = grad.float()
    # Beyond 64 every slope is 0 or 1 in FP32; without the limits an infinite pre-activation would give 0 * Inf.
    kept = kept.float().reshape(grad.shape).clamp(-64.0, 64.0)
    if activation == "relu":
        value = torch.ops.aten.threshold_backward(grad, kept, 0)
    elif activation == "gelu":
        value = torch.ops.aten.gelu_backward(grad, kept)
    elif activation == "gelu_tanh":
        value = torch.ops.aten.gelu_backward(grad, kept, approximate="tanh")
    elif activation == "silu":
        value = torch.ops.aten.silu_backward(grad, kept)
    else:
        value = grad
    # A layout of grad, such as the zero strides of an expanded scalar, must not become the output's.
    out = value.to(dtype, memory_format=torch.contiguous_format, copy=True)
    return out, value.sum(0) if want_bias else value.new_empty(0)
