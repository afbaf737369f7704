"""CPU routine of ``mixft.kernels.matmul``: FP32 products, and torch's BF16 product where the CPU has the instructions.

torch's FP16 matmul takes several times as long as its FP32 one on a CPU without FP16 arithmetic, so FP16 is computed in
FP32. BF16 products go to torch only when nothing happens between the sum and the cast, because torch rounds its result.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has BF16 dot-product instructions, AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    if plain and a.dtype == torch.bfloat16 and multiplies_bf16():
        product = F.linear(a, b.t(), bias)
    else:
        product = F.linear(a.float(), b.float().t(), None if bias is None else bias.float())
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
