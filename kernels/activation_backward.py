"""The backward pass of an activation: the gradient of the pre-activation, and of the bias in the same pass.

    out[i, j] = grad[i, j] * activation'(kept[i, j])
    bias_grad[j] = sum_i grad[i, j] * activation'(kept[i, j])

``grad`` is [M, N] with any strides, ``kept`` the pre-activation [M, N]; both FP16, BF16 or FP32. Arithmetic is FP32,
with one cast at the store of ``out``; the sum stays FP32.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import multiply_by_slope
from .architecture import Architecture
from .variant import BYTES, Elementwise, Variant


@triton.jit
def activation_backward_kernel(
    grad, kept, out, bias_partial, M, N, grad_stride_m, grad_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, WANT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for block in range(BLOCKS):
        rows = (tl.program_id(0) * BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        grad_offsets = rows[:, None].to(tl.int64) * grad_stride_m + columns[None, :].to(tl.int64) * grad_stride_n
        offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
        value = tl.load(grad + grad_offsets, mask=mask, other=0.0).to(tl.float32)
        value = multiply_by_slope(value, tl.load(kept + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)
        if WANT_BIAS:
            column_sum += tl.sum(value, axis=0)
    if WANT_BIAS:
        partial_offsets = tl.program_id(0).to(tl.int64) * N + columns
        tl.store(bias_partial + partial_offsets, column_sum, mask=columns < N)


@dataclass(frozen=True)
class ActivationBackwardConfig:
    """Tile sizes of the elementwise backward kernel, and how many row tiles one program adds up."""

    BLOCK_M: int = 8
    BLOCK_N: int = 256
    BLOCKS: int = 8
    num_warps: int = 4


def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``grad * d activation(kept)`` [M, N] in ``dtype`` and its FP32 sum over rows [N], empty unless asked for.

    ``grad`` is [M, N] with any strides, ``kept`` the pre-activation of as many elements; for ReLU its output serves.
    """
    M, N = grad.shape
    config = ActivationBackwardConfig()
    grid = (triton.cdiv(M, config.BLOCK_M * config.BLOCKS), triton.cdiv(N, config.BLOCK_N))
    out = torch.empty((M, N), dtype=dtype, device=grad.device)
    bias_partial = torch.empty((grid[0] if want_bias else 0, N), dtype=torch.float32, device=grad.device)
    if M > 0 and N > 0:
        with torch.cuda.device_of(grad):
            activation_backward_kernel[grid](
                grad,
                kept.contiguous(),
                out,
                bias_partial if want_bias else out,
                M,
                N,
                *grad.stride(),
                WANT_BIAS=want_bias,
                ACTIVATION=activation,
                num_stages=1,
                **asdict(config),
            )
    # Partial sums added by a second, ordered pass: atomics would make the gradient differ from run to run.
    return out, bias_partial.sum(0) if want_bias else bias_partial.new_empty(0)


def variants(arch: Architecture) -> list[Variant]:
    """With and without the bias, from a gradient in FP32 and in 16 bits."""
    return [
        activation_backward_variant("bf16", "silu", "fp32", want_bias=False),
        activation_backward_variant("fp16", "gelu", "fp16", want_bias=True),
    ]


def activation_backward_variant(dtype: str, activation: str, grad_dtype: str, *, want_bias: bool) -> Variant:
    config = asdict(ActivationBackwardConfig())
    num_warps = config.pop("num_warps")
    signature = {"grad": f"*{grad_dtype}", "kept": f"*{dtype}", "out": f"*{dtype}", "bias_partial": "*fp32"}
    signature |= {"M": "i32", "N": "i32", "grad_stride_m": "i32"}
    return Variant(
        name=f"activation_backward[{dtype},{grad_dtype},{activation}]",
        function=activation_backward_kernel,
        signature=signature,
        constexprs={**config, "grad_stride_n": 1, "WANT_BIAS": want_bias, "ACTIVATION": activation},
        divisible_by_16=tuple(signature),
        num_warps=num_warps,
        work=Elementwise(config["BLOCK_M"] * config["BLOCK_N"], BYTES[grad_dtype] + 2 * BYTES[dtype]),
    )
