"""CPU routine of ``mixft.kernels.activation_backward``: torch's own derivatives, which compute in FP32.

Where everything is of one 16-bit dtype torch reads and writes that dtype in one pass; the sum over rows is then one of
rounded values, in FP32.
"""

import torch
from torch import Tensor

# Beyond 64 every slope is 0 or 1 in FP32; without the limits an infinite pre-activation would give 0 * Inf.
LIMIT = 64.0


def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``grad * d activation(kept)`` [M, N] in ``dtype`` and its FP32 sum over rows [N], empty unless asked for."""
    if not grad.dtype == kept.dtype == dtype:
        grad, kept = grad.float(), kept.float()
    kept = kept.reshape(grad.shape)
    if activation == "relu":
        value = torch.ops.aten.threshold_backward(grad, kept, 0)
    elif activation == "gelu":
        value = torch.ops.aten.gelu_backward(grad, kept.clamp(-LIMIT, LIMIT))
    elif activation == "gelu_tanh":
        value = torch.ops.aten.gelu_backward(grad, kept.clamp(-LIMIT, LIMIT), approximate="tanh")
    elif activation == "silu":
        value = torch.ops.aten.silu_backward(grad, kept.clamp(-LIMIT, LIMIT))
    else:
        value = grad
    # Not grad itself, and not in a layout of grad such as the zero strides of an expanded scalar.
    out = value.to(dtype, memory_format=torch.contiguous_format, copy=value is grad or value.dtype != dtype)
    return out.contiguous(), value.sum(0, dtype=torch.float32) if want_bias else value.new_empty(0, dtype=torch.float32)
