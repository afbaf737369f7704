"""The ops, each registered with ``torch.library`` under ``mixft::``; they accept CPU and GPU tensors alike."""

from .adamw import adamw_
from .grad import grad_stats, unscale_
from .int8_linear import dynamic_int8_linear, int8_linear
from .int8_matmul import int8_matmul, weight_only_matmul
from .matmul import matmul
from .quantize import dequantize, quantize

__all__ = [
    "adamw_",
    "dequantize",
    "dynamic_int8_linear",
    "grad_stats",
    "int8_linear",
    "int8_matmul",
    "matmul",
    "quantize",
    "unscale_",
    "weight_only_matmul",
]
