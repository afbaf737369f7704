"""What happens to the sum of a product with int8 weights before its one cast, in FP32.

    out = act(a_scale[m] * b_scale[n] * (sum - zero_point[m] * b_sum[n]) + bias[n])

``a_scale``, the zero points with ``b_sum``, and the bias are each there or not; the zero points come off an int32 sum.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate


@dataclass(frozen=True)
class Epilogue:
    """The epilogue of one product [M, N]; all tensors on one device.

    Attributes:
        out: [M, N], FP16, BF16 or FP32, contiguous.
        a_scale: FP32 [M, 1], any strides.
        b_scale: FP32 [N, 1], any strides.
        a_zero_point: int32 [M, 1], any strides.
        b_sum: int32 [N], contiguous.
        bias: floating [N], any stride.
        activation: a name of ``activation.py``.
    """

    out: Tensor
    a_scale: Tensor | None
    b_scale: Tensor
    a_zero_point: Tensor | None
    b_sum: Tensor | None
    bias: Tensor | None
    activation: str

    def arguments(self) -> dict[str, Tensor | int | str | None]:
        """The kernels' arguments, by name."""
        return {
            "a_scale_ptr": self.a_scale,
            "b_scale_ptr": self.b_scale,
            "a_zero_point_ptr": self.a_zero_point,
            "b_sum_ptr": self.b_sum,
            "bias_ptr": None if self.bias is None else self.bias.contiguous(),
            "out_ptr": self.out,
            "a_scale_stride": 0 if self.a_scale is None else self.a_scale.stride(0),
            "b_scale_stride": self.b_scale.stride(0),
            "a_zero_point_stride": 0 if self.a_zero_point is None else self.a_zero_point.stride(0),
            "ACTIVATION": self.activation,
        }


@triton.jit
def apply_int8_epilogue(
    total, rows, columns, M, N,
    a_scale_ptr, b_scale_ptr, a_zero_point_ptr, b_sum_ptr, bias_ptr, out_ptr,
    a_scale_stride, b_scale_stride, a_zero_point_stride, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to the tile ``total`` and store it; ``rows`` and ``columns`` are int64."""
    row_mask = rows < M
    column_mask = columns < N
    if a_zero_point_ptr is not None:
        zero_point = tl.load(a_zero_point_ptr + rows * a_zero_point_stride, mask=row_mask, other=0)
        total -= zero_point[:, None] * tl.load(b_sum_ptr + columns, mask=column_mask, other=0)[None, :]
    result = total.to(tl.float32)
    if a_scale_ptr is not None:
        result *= tl.load(a_scale_ptr + rows * a_scale_stride, mask=row_mask, other=0.0)[:, None]
    result *= tl.load(b_scale_ptr + columns * b_scale_stride, mask=column_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    result = activate(result, ACTIVATION)
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


POINTERS = {"a_scale_ptr": "fp32", "b_scale_ptr": "fp32", "a_zero_point_ptr": "i32", "b_sum_ptr": "i32"}
STRIDES = ("a_scale_stride", "b_scale_stride", "a_zero_point_stride")


def epilogue_signature(out: str, *, a_scale: bool, affine: bool, bias: bool) -> tuple[dict[str, str], dict[str, None]]:
    """(types of the arguments that a variant has, the pointers that it lacks as constants), strides among the first."""
    types = POINTERS | {"bias_ptr": out, "out_ptr": out}
    there = {"a_scale_ptr": a_scale, "a_zero_point_ptr": affine, "b_sum_ptr": affine, "bias_ptr": bias}
    signature = {name: f"*{kind}" for name, kind in types.items() if there.get(name, True)}
    lacking = {name: None for name in types if name not in signature}
    return signature | dict.fromkeys(STRIDES, "i32"), lacking
