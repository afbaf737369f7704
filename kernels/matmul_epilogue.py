"""What happens to the FP32 sum of a matrix product before its one cast: the epilogue, and who asks for what.

    forward      preactivation = sum + bias;  out = activation(preactivation) + residual
    derivative   out = sum * activation'(kept)

``preactivation`` is written where the backward will want it, as ``kept``. On request the columns of the result are
summed in FP32, one partial sum a row of tiles, which a second, ordered pass adds up: atomics would make the sum differ
from run to run. A kernel is given None for each operand that a product lacks.
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
        preactivation: [M, N], contiguous, 16 bits: written.
        kept: as ``preactivation``: read, for the derivative.
        column_sum: whether the columns of the result are summed.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    activation: str = "none"
    bias: Tensor | None = None
    residual: Tensor | None = None
    preactivation: Tensor | None = None
    kept: Tensor | None = None
    column_sum: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def size(self) -> str:
        """The shape bucket of a product whose operands are aligned."""
        M, N, _ = self.shape
        if M <= 32:
            return "small"
        if M * N <= 2**21:
            return "medium"
        return "wide" if self.is_bare else "large"

    @property
    def is_bare(self) -> bool:
        """Whether nothing is fused but the bias."""
        return self.activation == "none" and all(it is None for it in (self.residual, self.preactivation, self.kept))

    @property
    def is_plain(self) -> bool:
        """Whether torch's own linear layer computes the same thing: bare, and of one dtype."""
        return (
            self.is_bare and self.out.dtype == self.a.dtype and (self.bias is None or self.bias.dtype == self.a.dtype)
        )

    def column_partials(self, rows: int) -> Tensor | None:
        """Where tiles of so many rows store the sums of their columns; None unless asked for."""
        M, N, _ = self.shape
        if not self.column_sum:
            return None
        return torch.empty((triton.cdiv(M, rows), N), dtype=torch.float32, device=self.a.device)


@triton.jit
def load_tile(matrix, at, mask):
    if mask is None:
        return matrix.load(at).to(tl.float32)
    else:
        return tl.load(matrix + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(matrix, at, mask, values):
    if mask is None:
        matrix.store(at, values.to(matrix.dtype))
    else:
        tl.store(matrix + at, values.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def apply_epilogue(
    total, bias, residual, preactivation, kept, out, column_partials,
    at, mask, tile_m, rows, columns, M, N, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile: ``total`` at ``rows`` and ``columns``, row ``tile_m`` of the tiles.

    The matrices are pointers, ``at`` and ``mask`` the tile's offsets and which of them lie in the matrix; or tensor
    descriptors, which know where a matrix ends: ``at`` is the tile's first row and column, and ``mask`` None.
    """
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if kept is not None:
        total = multiply_by_slope(total, load_tile(kept, at, mask), ACTIVATION)
    else:
        if preactivation is not None:
            store_tile(preactivation, at, mask, total)
        total = activate(total, ACTIVATION)
    if residual is not None:
        total += load_tile(residual, at, mask)
    store_tile(out, at, mask, total)
    if column_partials is not None:
        column_sum = tl.sum(tl.where(rows[:, None] < M, total, 0.0), axis=0)
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

# The activation of an epilogue and the operands that it has beside ``out``, by a name.
EPILOGUES = {
    "none": ("none",),
    "split": ("none",),
    "silu": ("silu",),
    "add": ("none", "residual"),
    "gelu+keep": ("gelu", "preactivation"),
    "gelu+keep+add": ("gelu", "preactivation", "residual"),
    "gelu_tanh+keep": ("gelu_tanh", "preactivation"),
    "slope": ("gelu", "kept", "column_partials"),
}


def epilogue_constants(name: str, *, bias: bool) -> dict[str, str | None]:
    """What a variant with that epilogue is compiled for: its activation, and None for each operand that it lacks."""
    activation, *operands = EPILOGUES[name]
    operands += ["bias"] if bias else []
    optional = ("bias", "residual", "preactivation", "kept", "column_partials")
    return {"ACTIVATION": activation} | {operand: None for operand in optional if operand not in operands}
