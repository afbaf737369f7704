"""A linear layer with frozen int8 weights, whose input has one scale and zero point, found beforehand."""

import torch
from torch import Tensor

from .frozen_weight import call_frozen, register_gradient
from .int8_input_gradient import FrozenBackward
from .int8_matmul import MOST_AFFINE_TERMS, check_row_sums
from .int8_operands import check_frozen_weight, check_layer
from .registration import define_op
from .validation import check_dtype, check_same_device


@define_op("static_int8_linear", name="static_int8_linear")
def _static_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight_sum: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


register_gradient(_static_linear, "int8")


def static_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight_sum: Tensor | None = None,
    backward: FrozenBackward = "int8",
) -> Tensor:
    """``act(F.linear(Q(x), weight * weight_scale, bias))`` with one affine int8 quantization Q for the whole input.

    Q(x) = s * (clamp(round(x / s + z), -128, 127) - z); NaN counts as zero. (Jacob et al., Quantization and training of
    neural networks for efficient integer-arithmetic-only inference, 2018.)

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        input_scale: FP32, one positive element, s.
        input_zero_point: int32 in [-128, 127], one element, z.
        weight_sum: int32 [N], ``weight.sum(1)``; computed here when not given, which reads the weight once more.
        backward: what the gradient of ``x``, that of the layer without Q, is computed in; see
            :func:`mixft.ops.dynamic_int8_linear`.

    Returns:
        [..., N] of the dtype of ``x``, differentiable once in ``x`` and ``bias``.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, K above 65,793, an unknown activation or ``backward``, tensors on several
            devices, or an activation while a gradient is wanted.
    """
    check_frozen_weight(weight, weight_scale)
    rows = check_layer(x, weight, bias)
    check_dtype("input_scale", input_scale, (torch.float32,))
    check_dtype("input_zero_point", input_zero_point, (torch.int32,))
    for name, value in (("input_scale", input_scale), ("input_zero_point", input_zero_point)):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element; it has shape {tuple(value.shape)}")
    if weight.shape[1] > MOST_AFFINE_TERMS:
        raise ValueError(
            f"K must be at most {MOST_AFFINE_TERMS}, or its sum could exceed int32; it is {weight.shape[1]}"
        )
    if weight_sum is None:
        weight_sum = weight.sum(1, dtype=torch.int32)
    weight_sum = check_row_sums("weight_sum", weight_sum, weight)
    check_same_device(x=x, input_scale=input_scale, input_zero_point=input_zero_point, weight_sum=weight_sum)
    more = (input_scale, input_zero_point, weight_sum)
    return call_frozen(_static_linear, x, rows, weight, weight_scale, bias, activation, *more, backward=backward)
