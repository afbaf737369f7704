"""A linear layer with frozen int8 weights, whose input is quantized in every call; differentiable in its input."""

from torch import Tensor

from .frozen_weight import call_frozen, register_gradient
from .int8_input_gradient import FrozenBackward
from .int8_operands import check_frozen_weight, check_layer
from .registration import define_op


@define_op("dynamic_int8_linear", name="dynamic_int8_linear")
def _dynamic_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


register_gradient(_dynamic_linear, "int8")


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backward: FrozenBackward = "int8",
) -> Tensor:
    """``act(F.linear(Q(x), weight * weight_scale, bias))`` with Q the symmetric int8 quantization of each row.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        backward: what the gradient of ``x``, that of the layer without Q (straight-through), is computed in. "int8": as
            the forward, one product of bytes, with the rows of the result's gradient quantized; about 40 dB of signal
            to noise for normal numbers. "16bit": floats of the dtype of ``x`` where that has 16 bits, else BF16, on a
            CPU without BF16 instructions FP32. "exact": floats of the dtype of ``x``.

    Returns:
        [..., N] of the dtype of ``x``, differentiable once in ``x`` and ``bias``.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, an unknown activation or ``backward``, tensors on several devices, or an
            activation while a gradient is wanted.
    """
    check_frozen_weight(weight, weight_scale)
    rows = check_layer(x, weight, bias)
    return call_frozen(_dynamic_linear, x, rows, weight, weight_scale, bias, activation, backward=backward)
