"""The gradient of a layer's input through its frozen int8 weight, by the products that the caller chose."""

from typing import Literal, get_args

from torch import Tensor

from .registration import define_composition, define_op, server, take_rows_together, without_dispatch
from .training_int8_linear import float_dtype

FrozenBackward = Literal["int8", "16bit", "exact"]
# Not asked for in a function, which torch 2.6 could not compile.
FROZEN_BACKWARDS = get_args(FrozenBackward)


@take_rows_together
@define_op("int8_input_gradient", name="int8_input_gradient")
def _int8_input_gradient(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def check_frozen_backward(backward: str) -> None:
    """Raise ValueError for a backward that a layer with a frozen weight does not have."""
    if backward not in FROZEN_BACKWARDS:
        choices = ", ".join(FROZEN_BACKWARDS)
        raise ValueError(f"backward must be one of {choices} with a frozen int8 weight; it is {backward!r}")


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    backward: str,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """``grad @ (weight * weight_scale) + left @ right`` of the dtype of ``grad``; no 16-bit copy of the weight is kept.

    Args:
        grad: FP16, BF16 or FP32 [M, N].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        backward: "int8" quantizes the rows of ``grad * weight_scale`` for one product of bytes; "16bit" rounds them to
            the floats of :func:`mixft.ops.training_int8_linear`; "exact" to no others than those of ``grad``.
        left: [M, R] of the dtype of ``grad``, or None.
        right: [R, K] of the dtype of ``grad``, or None.
    """
    if backward == "int8":
        return without_dispatch(_int8_input_gradient, grad, weight, weight_scale)(
            grad, weight, weight_scale, left, right
        )
    serve = without_dispatch(_float_gradient, grad, weight, weight_scale)
    out = serve(grad, weight, weight_scale, backward == "exact")
    return out if left is None else out.addmm_(left, right)


def _empty(grad, weight, weight_scale, exact):
    return grad.new_empty(grad.shape[0], weight.shape[1])


@take_rows_together
@define_composition("float_input_gradient", _empty)
def _float_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, exact: bool) -> Tensor:
    """The rows of the transposed weight have no scale of their own, so the scale goes into ``grad``: as its ratio to
    the largest, since gradients times scales of 1e-3 would vanish in FP16, and the largest in FP32 after."""
    if weight_scale.numel() == 0:
        return grad.new_zeros((grad.shape[0], weight.shape[1]))
    largest = weight_scale.amax().clamp(min=2.0**-126)
    scaled = (grad * (weight_scale.view(-1) / largest)).to(grad.dtype if exact else float_dtype(grad))
    product = server(grad.device)("int8_matmul", "weight_only_matmul")
    return product(scaled, weight.t(), largest.expand(weight.shape[1], 1), None, "none", grad.dtype)
