"""What happens to the FP32 sum of a matrix product before its one cast: the epilogue, and who asks for what.

    forward      preactivation = sum + bias;  out = activation(preactivation) + residual
    derivative   out = sum * activation'(preactivation)

``preactivation`` is written in the forward where the backward will want it, and read for the derivative. On request
the columns of the result are summed in FP32, one partial sum a row of tiles, which a second, ordered pass adds up:
atomics would make the sum differ from run to run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, multiply_by_slope


@dataclass(frozen=True)
class Product:
    """One product with its epilogue; all tensors on one device.

    Attributes:
        a: [M, K], FP16 or BF16, any strides.
        b: [K, N], the dtype of ``a``, any strides.
        out: [M, N], contiguous, FP16, BF16 or FP32.
        activation: a name of ``activation.py``.
        bias: [N], contiguous, floating.
        residual: [M, N], contiguous, floating; may be ``out`` itself, which is then added to.
        preactivation: [M, N], contiguous, 16 bits.
        access: of the pre-activation: ``"none"``, ``"write"`` in a forward, ``"read"`` for the derivative.
        column_sum: whether the columns of the result are summed.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    activation: str = "none"
    bias: Tensor | None = None
    residual: Tensor | None = None
    preactivation: Tensor | None = None
    access: str = "none"
    column_sum: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def is_bare(self) -> bool:
        """Whether nothing is fused but the bias."""
        return self.activation == "none" and self.residual is None and self.access == "none"

    @property
    def is_plain(self) -> bool:
        """Whether torch's own linear layer computes the same thing: bare, and of one dtype."""
        return (
            self.is_bare and self.out.dtype == self.a.dtype and (self.bias is None or self.bias.dtype == self.a.dtype)
        )

    def flags(self) -> dict[str, bool | str]:
        """The constants of :func:`apply_epilogue`."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "PREACTIVATION": self.access,
            "ACTIVATION": self.activation,
            "COLUMN_SUM": self.column_sum,
        }

    def column_partials(self, rows: int) -> Tensor:
        """Where tiles of so many rows store the sums of their columns; empty unless asked for."""
        M, N, _ = self.shape
        tiles = triton.cdiv(M, rows) if self.column_sum else 0
        return torch.empty((tiles, N), dtype=torch.float32, device=self.a.device)


@triton.jit
def apply_epilogue(
    total, bias, residual, preactivation, out, column_partials,
    tile_m, rows, columns, M, N,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PREACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMN_SUM: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile: ``total`` at ``rows`` and ``columns``, row ``tile_m`` of the tiles."""
    row_mask = rows[:, None] < M
    mask = row_mask & (columns[None, :] < N)
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if PREACTIVATION == "read":
        kept = tl.load(preactivation + offsets, mask=mask, other=0.0).to(tl.float32)
        total = multiply_by_slope(total, kept, ACTIVATION)
    else:
        if PREACTIVATION == "write":
            tl.store(preactivation + offsets, total.to(preactivation.dtype.element_ty), mask=mask)
        total = activate(total, ACTIVATION)
    if HAS_RESIDUAL:
        total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)
    if COLUMN_SUM:
        column_sum = tl.sum(tl.where(row_mask, total, 0.0), axis=0)
        tl.store(column_partials + tile_m.to(tl.int64) * N + columns, column_sum, mask=columns < N)


# What kernels are compiled with where no tensors are at hand.

# The operand layouts of forward (a @ weight.t()), grad_a (grad @ weight) and grad_b (grad.t() @ a): which strides are
# 1, and which extent is the number of tokens, the one that need not be divisible by 16.
LAYOUTS = {
    "forward": (("a_stride_k", "b_stride_k"), "M"),
    "grad_a": (("a_stride_k", "b_stride_n"), "M"),
    "grad_b": (("a_stride_m", "b_stride_n"), "K"),
}

# (M, N, K) of a product in each bucket, for which times are estimated.
SHAPES = {
    "small": (16, 4096, 4096),
    "medium": (512, 4096, 4096),
    "large": (4096, 4096, 4096),
    "wide": (4096, 4096, 4096),
    "unaligned": (4095, 4095, 4095),
}


def _epilogue(activation: str = "none", *, residual: bool = False, access: str = "none") -> dict[str, bool | str]:
    return {
        "HAS_RESIDUAL": residual,
        "PREACTIVATION": access,
        "ACTIVATION": activation,
        "COLUMN_SUM": access == "read",
    }


# The flags of :func:`apply_epilogue` but for the bias, by a name.
EPILOGUES = {
    "none": _epilogue(),
    "split": _epilogue(),
    "silu": _epilogue("silu"),
    "add": _epilogue(residual=True),
    "gelu+keep": _epilogue("gelu", access="write"),
    "gelu+keep+add": _epilogue("gelu", access="write", residual=True),
    "gelu_tanh+keep": _epilogue("gelu_tanh", access="write"),
    "slope": _epilogue("gelu", access="read"),
}
