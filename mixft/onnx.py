"""ONNX: mixft's ops in the standard operators, so that its models run wherever ONNX does::

    torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=mixft.onnx.translation_table())

The int8 weight is stored as it is, a byte an element. A ``dynamic`` layer becomes, with s [M] of the rows of x [M, K]::

    s = max|x| / 127    q = QuantizeLinear(x, s)    y = MatMulInteger(q, weight) * weight_scale * s + bias    in FP32

and a ``weight_only`` one DequantizeLinear(weight) and MatMul. QuantizeLinear divides by s where mixft multiplies by its
rounded inverse, so a value within 2^-15 of a tie may be rounded to the other neighbour; the integers are the same
otherwise. Results for rows with NaN or Inf are the runtime's.
"""

import math
from collections.abc import Callable

import torch

__all__ = ["translation_table"]


def translation_table() -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of ``torch.onnx.export(..., dynamo=True)`` for inference with mixft's layers.

    Returns:
        {op: its translation} for ``QuantLinear`` in all modes but ``train``, ``mixft.nn.Linear``, ``mixft.ops.matmul``
        and ``mixft.ops.int8_matmul``; operator set 18 or newer. Outlier columns become a product of full size in FP32.

    Raises:
        ImportError: onnxscript, which torch's exporter needs too, is not installed; or torch is older than 2.7, whose
            exporter makes models of this table that do not load.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise ImportError(f"mixft.onnx needs the exporter of torch 2.7 or newer; this is torch {torch.__version__}")
    try:
        import onnxscript
    except ImportError as error:
        raise ImportError(
            "mixft.onnx needs onnxscript, which is not installed; pip install '.[onnx]' in mixft's checkout",
            name="onnxscript",
        ) from error

    # This also registers the ops that the table translates.
    from mixft.ops.quantize import SMALLEST_SCALE

    op = onnxscript.opset18
    float32 = onnxscript.FLOAT.dtype

    def activated(x, name):
        if name == "relu":
            return op.Relu(x)
        if name == "silu":
            return op.Mul(x, op.Sigmoid(x))
        if name == "gelu":
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))
        if name == "gelu_tanh":
            inner = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(inner, math.sqrt(2 / math.pi))), 1.0))
        return x

    def finished(product, bias, activation):
        if bias is not None:
            product = op.Add(product, op.Cast(bias, to=float32))
        return activated(product, activation)

    def scaled(product, a_scale, b_scale):
        return op.Mul(op.Mul(op.Cast(product, to=float32), op.Transpose(b_scale, perm=[1, 0])), a_scale)

    def integer_product(a, b, a_scale, b_scale, *zero_point):
        return scaled(op.MatMulInteger(a, op.Transpose(b, perm=[1, 0]), *zero_point), a_scale, b_scale)

    def dynamic_product(floats, weight, weight_scale):
        largest = op.ReduceMax(op.Abs(floats), [1], keepdims=1)
        scale = op.Max(op.Div(largest, 127.0), SMALLEST_SCALE)
        by_row = op.Squeeze(scale, [1])
        zeros = op.Cast(op.Mul(by_row, 0.0), to=onnxscript.INT8.dtype)
        return integer_product(op.QuantizeLinear(floats, by_row, zeros, axis=0), weight, scale, weight_scale)

    def float_product(a, weight, weight_scale):
        floats = op.DequantizeLinear(weight, op.Squeeze(weight_scale, [1]), axis=0)
        return op.MatMul(a, op.Transpose(floats, perm=[1, 0]))

    def int8_matmul(a, b, a_scale, b_scale, bias, activation, out_dtype, a_zero_point=None, b_sum=None):
        product = op.MatMulInteger(a, op.Transpose(b, perm=[1, 0]))
        if a_zero_point is not None:
            product = op.Sub(product, op.Mul(a_zero_point, b_sum))
        return op.Cast(finished(scaled(product, a_scale, b_scale), bias, activation), to=out_dtype)

    def dynamic_int8_linear(x, weight, weight_scale, bias, activation):
        product = dynamic_product(op.Cast(x, to=float32), weight, weight_scale)
        return op.CastLike(finished(product, bias, activation), x)

    def static_int8_linear(x, weight, weight_scale, bias, activation, input_scale, input_zero_point, weight_sum):
        scale = op.Squeeze(input_scale)
        zero_point = op.Cast(op.Squeeze(input_zero_point), to=onnxscript.INT8.dtype)
        values = op.QuantizeLinear(op.Cast(x, to=float32), scale, zero_point)
        product = integer_product(values, weight, scale, weight_scale, zero_point)
        return op.CastLike(finished(product, bias, activation), x)

    def outlier_int8_linear(x, weight, weight_scale, bias, threshold):
        floats = op.Cast(x, to=float32)
        outlier = op.Greater(op.ReduceMax(op.Abs(floats), [0], keepdims=1), threshold)
        product = op.Add(
            dynamic_product(op.Where(outlier, 0.0, floats), weight, weight_scale),
            float_product(op.Where(outlier, floats, 0.0), weight, weight_scale),
        )
        return op.CastLike(finished(product, bias, "none"), x)

    def weight_only_matmul(a, b, b_scale, bias, activation, out_dtype):
        product = float_product(op.Cast(a, to=float32), b, b_scale)
        return op.Cast(finished(product, bias, activation), to=out_dtype)

    def matmul_forward(a, b, bias, activation, out_dtype, keep_preactivation, residual=None):
        product = finished(op.MatMul(op.Cast(a, to=float32), op.Cast(b, to=float32)), bias, "none")
        result = activated(product, activation)
        if residual is not None:
            result = op.Add(result, op.Cast(residual, to=float32))
        return op.Cast(result, to=out_dtype), op.CastLike(product, a)

    def quantize(x, symmetric, seed=None, factor=None, propagate=False):
        raise NotImplementedError(
            "mixft.ops.quantize has no translation; it is part of a QuantLinear of mode 'train', of which "
            "mixft.quantize_(model, 'dynamic') makes one for inference"
        )

    return {
        torch.ops.mixft.quantize.default: quantize,
        torch.ops.mixft.matmul_forward.default: matmul_forward,
        torch.ops.mixft.int8_matmul.default: int8_matmul,
        torch.ops.mixft.dynamic_int8_linear.default: dynamic_int8_linear,
        torch.ops.mixft.static_int8_linear.default: static_int8_linear,
        torch.ops.mixft.outlier_int8_linear.default: outlier_int8_linear,
        torch.ops.mixft.weight_only_matmul.default: weight_only_matmul,
    }
