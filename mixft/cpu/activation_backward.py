"""CPU routine of ``mixft.kernels.activation_backward``: one pass where compiled, else torch's own derivatives.

torch reads and writes 16-bit tensors of one dtype in one pass; the sum over rows is then one of rounded values.
"""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .activation import CODES

# Beyond 64 every slope is within 1e-25 of 0 or 1; without the limits an infinite pre-activation would give 0 * Inf.
LIMIT = 64.0

# Column sums are taken over groups of rows, and the groups' sums added in order: rows in a group at least, and groups
# at most.
ROWS = 32
GROUPS = 64

compiled = native.Routine(
    "activation_backward",
    *(c_void_p, c_int, c_int64),
    *(c_void_p, c_int),
    *(c_int64, c_int64, c_int),
    *(c_void_p, c_int),
    *(c_int64, c_void_p, c_void_p),
)


def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``grad * d activation(kept)`` [M, N] in ``dtype`` and its FP32 sum over rows [N], empty unless asked for."""
    if native.available():
        out = torch.empty(grad.shape, dtype=dtype, device="cpu")
        return out, one_pass(grad, kept, activation, out, want_bias)
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


def column_sums(x: Tensor) -> Tensor:
    """FP32 [N]: the sum over the rows of ``x`` [M, N], of any float dtype and any strides."""
    if native.available():
        return one_pass(x, None, "none", None, True)
    return x.sum(0, dtype=torch.float32)


def one_pass(grad: Tensor, kept: Tensor | None, activation: str, out: Tensor | None, want_sums: bool) -> Tensor:
    """:func:`activation_backward` into a contiguous ``out``, which may be ``grad``; returns the sum, or empty.

    Without ``kept`` the activation is "none"; without ``out`` only the sum is computed.
    """
    rows, columns = grad.shape
    if columns > 1 and grad.stride(1) != 1:
        grad = grad.contiguous()
    kept = None if kept is None else kept.contiguous()
    group = max(ROWS, -(-rows // GROUPS))
    groups = -(-rows // group) if want_sums else 0
    sums = torch.empty(columns if want_sums else 0, dtype=torch.float32, device="cpu")
    partial = torch.empty((groups, columns), dtype=torch.float32, device="cpu")
    compiled(
        *(*native.typed(grad), grad.stride(0), *native.typed(kept)),
        *(rows, columns, CODES[activation]),
        *native.typed(out),
        *(group, partial.data_ptr(), sums.data_ptr() if want_sums else None),
    )
    return sums
