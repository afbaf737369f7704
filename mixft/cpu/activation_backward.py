"""CPU routine of ``mixft.kernels.activation_backward``: torch's own derivatives, in FP32."""

import torch
from torch import Tensor


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
