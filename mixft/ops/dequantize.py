"""``mixft.ops.dequantize``: floats from the int8 values, scales and zero points of ``mixft.ops.quantize``."""

import torch
from torch import Tensor

from .quantize import check_shape, grouped_shapes
from .registration import define_op, without_dispatch
from .validation import check_dtype, check_out_dtype, check_same_device


@define_op("dequantize", name="dequantize")
def _dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device)


def _save_values(ctx, inputs, output):
    values, _, zero_point, _ = inputs
    ctx.save_for_backward(values, zero_point)


def _scale_gradient(ctx, grad):
    values, zero_point = ctx.saved_tensors
    steps = values.float() if zero_point is None else values.float() - zero_point
    return None, (grad * steps).sum(1, keepdim=True), None, None


_dequantize.register_autograd(_scale_gradient, setup_context=_save_values)


def dequantize(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    dim: int | None = -1,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(values - zero_point) scale``, computed in FP32; the inverse of ``quantize`` with the same ``dim`` and groups.

    Differentiable in ``scale``.

    Args:
        values: int8, any shape and strides.
        scale: FP32, of the shape that ``quantize`` gives.
        zero_point: int32 of scale's shape, or None for zero.
        dim: as in ``quantize``.
        group_size: as in ``quantize``.
        dtype: of the result: torch.float16, torch.bfloat16 or torch.float32.

    Returns:
        A contiguous tensor of values' shape.

    Raises:
        TypeError: an argument of another dtype.
        IndexError: ``values`` has no dimension ``dim``.
        ValueError: ``group_size`` does not divide the dimension or comes with ``dim=None``; scale or zero point of
            another shape; tensors on several devices.
    """
    check_dtype("values", values, (torch.int8,))
    check_dtype("scale", scale, (torch.float32,))
    check_out_dtype(dtype, "dtype")
    grouped, scale_shape = grouped_shapes(values, dim, group_size)
    check_shape("scale", scale, scale_shape)
    if zero_point is not None:
        check_dtype("zero_point", zero_point, (torch.int32,))
        check_shape("zero_point", zero_point, scale_shape)
        zero_point = zero_point.reshape(grouped[0], 1, grouped[2]).contiguous()
    check_same_device(values=values, scale=scale, zero_point=zero_point)
    scale = scale.reshape(grouped[0], 1, grouped[2]).contiguous()
    has_gradient = torch.is_grad_enabled() and scale.requires_grad
    serve = _dequantize if has_gradient else without_dispatch(_dequantize, scale, values, zero_point)
    return serve(values.reshape(grouped), scale, zero_point, dtype).view(values.shape)
