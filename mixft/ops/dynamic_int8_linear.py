"""A linear layer with frozen int8 weights, whose input is quantized in every call; differentiable in its input."""

from torch import Tensor

from .int8_matmul import call_frozen, differentiate_frozen, save_frozen
from .int8_operands import check_frozen_weight, check_layer
from .registration import define_op


@define_op("dynamic_int8_linear", name="dynamic_int8_linear")
def _dynamic_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_dynamic_linear.register_autograd(differentiate_frozen, setup_context=save_frozen)


def dynamic_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(F.linear(Q(x), weight * weight_scale, bias))`` with Q the symmetric int8 quantization of each row.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Returns:
        [..., N] of the dtype of ``x``. The gradient of ``x`` is that of the layer without Q (straight-through).

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, an unknown activation, tensors on several devices, or an activation while
            a gradient is wanted.
    """
    check_frozen_weight(weight, weight_scale)
    rows = check_layer(x, weight, bias)
    return call_frozen(_dynamic_linear, x, rows, weight, weight_scale, bias, activation)
