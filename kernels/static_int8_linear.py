"""The layer with frozen int8 weights whose input has one scale and zero point, found beforehand.

    Q(x) = round(x / s + z) in [-128, 127]        out = act(s * w_scale * ((Q(x) - z) w^T) + bias)

x FP16, BF16 or FP32 [M, K], w int8 [N, K], w_scale FP32 [N, 1], bias [N], s FP32 and z int32 0-d, out [M, N] of the
dtype of x. Values beyond the range are clamped to it, an infinity too; NaN counts as zero. Rounding is to the nearest,
ties to even. Two launches: the quantizer, which needs no reduction, and the product of ``int8_matmul``, with z in its
epilogue.
"""

import torch
import triton
import triton.language as tl

from .architecture import Architecture
from .int8_matmul import int8_matmul
from .int8_rounding import UNIT_ROUNDER
from .variant import Elementwise, Variant

BLOCK = 4096
WARPS = 8


@triton.jit
def static_quantize_kernel(x_ptr, scale_ptr, zero_point_ptr, values_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    y = tl.where(x == x, x * inverse, 0.0) + tl.load(zero_point_ptr).to(tl.float32)
    y = tl.minimum(tl.maximum(y, -128.0), 127.0) + UNIT_ROUNDER
    tl.store(values_ptr + offsets, y.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)


def static_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
    weight_sum: torch.Tensor,
) -> torch.Tensor:
    """Launch both; ``weight_sum`` int32 [N] holds the sums of the rows of ``weight``."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            static_quantize_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, input_scale, input_zero_point, values, x.numel(), BLOCK=BLOCK, num_warps=WARPS, num_stages=1
            )
    scales, zero_points = (value.view(1, 1).expand(x.shape[0], 1) for value in (input_scale, input_zero_point))
    return int8_matmul(values, weight, scales, weight_scale, bias, activation, x.dtype, zero_points, weight_sum)


def variants(arch: Architecture) -> list[Variant]:
    """The quantizer for each input dtype; the product's variants are those of ``int8_matmul``."""
    pointers = {"scale_ptr": "*fp32", "zero_point_ptr": "*i32", "values_ptr": "*i8"}
    return [
        Variant(
            name=f"static_quantize[{dtype}]",
            function=static_quantize_kernel,
            signature={"x_ptr": f"*{dtype}", **pointers, "count": "i32"},
            constexprs={"BLOCK": BLOCK},
            divisible_by_16=("x_ptr", *pointers, "count"),
            num_warps=WARPS,
            work=Elementwise(BLOCK, width + 1),
        )
        for dtype, width in (("fp16", 2), ("bf16", 2), ("fp32", 4))
    ]
