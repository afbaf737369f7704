"""The dynamic int8 layer with the input's outlier columns in floating point, as in LLM.int8().

Columns of x where a magnitude exceeds the threshold are left out of the int8 product, so that they do not widen the
steps of all others, and multiplied by the dequantized columns of the weight (Dettmers et al., LLM.int8(): 8-bit matrix
multiplication for transformers at scale, 2022).
"""

from torch import Tensor

from .frozen_weight import FrozenWeight, register_gradient
from .int8_input_gradient import FrozenBackward, check_frozen_backward
from .int8_operands import check_frozen_weight, check_layer
from .registration import define_composition, is_traced, server


def _empty(x, weight, weight_scale, bias, threshold):
    return x.new_empty(x.shape[0], weight.shape[0])


@define_composition("outlier_int8_linear", _empty)
def _outlier_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    linear = server(x.device)("dynamic_int8_linear", "dynamic_int8_linear")
    columns = (x.abs().amax(0) > threshold).nonzero().view(-1) if len(x) else x.new_empty(0)
    if columns.numel() == 0:
        return linear(x, weight, weight_scale, bias, "none")
    # FP32 until both parts are added; 16-bit numbers and int8 are exact in it.
    rest = linear(x.float().index_fill(1, columns, 0.0), weight, weight_scale, bias, "none")
    return rest.addmm_(x[:, columns].float(), (weight[:, columns] * weight_scale).t()).to(x.dtype)


register_gradient(_outlier_linear, "exact")


def outlier_int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float,
    backward: FrozenBackward = "exact",
) -> Tensor:
    """:func:`mixft.ops.dynamic_int8_linear` with columns of ``x`` that hold outliers kept in floating point.

    Which columns those are is read off ``x``: on a GPU each call waits for that once, and no graph can capture it.

    Args:
        x: FP16, BF16 or FP32 [..., K].
        weight: int8 [N, K].
        weight_scale: FP32 [N, 1].
        bias: FP16, BF16 or FP32 [N].
        threshold: a column of ``x`` with a magnitude above this is an outlier, an infinity too; LLM.int8() takes 6.
        backward: what the gradient of ``x``, that of the layer without rounding, is computed in; see
            :func:`mixft.ops.dynamic_int8_linear`.

    Returns:
        [..., N] of the dtype of ``x``, differentiable once in ``x`` and ``bias``.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes that do not fit, tensors on several devices, a threshold that is not positive, or an unknown
            ``backward``.
    """
    check_threshold(threshold)
    check_frozen_weight(weight, weight_scale)
    check_frozen_backward(backward)
    rows = check_layer(x, weight, bias)
    operands = rows, weight, weight_scale, bias, float(threshold)
    out = _outlier_linear(*operands) if is_traced() else FrozenWeight.apply(_outlier_linear, backward, *operands)
    return out.view(*x.shape[:-1], weight.shape[0])


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless outliers can be told by ``threshold``."""
    if not threshold > 0:
        raise ValueError(f"the outlier threshold must be positive; it is {threshold!r}")
