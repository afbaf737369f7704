"""The ops, each registered with ``torch.library`` under ``mixft::``; they accept CPU and GPU tensors alike."""

from .adamw import adamw_
from .grad import grad_stats, unscale_
from .grad_scalars import GradScalars, grad_scalars
from .int8_linear import dynamic_int8_linear, int8_linear
from .int8_matmul import int8_matmul, weight_only_matmul
from .lion import lion_
from .matmul import matmul
from .optimizer_state import dequantize_state, join_master, quantize_state, split_master
from .quantize import dequantize, quantize
from .sgd import sgd_

__all__ = [
    "GradScalars",
    "adamw_",
    "dequantize",
    "dequantize_state",
    "dynamic_int8_linear",
    "grad_scalars",
    "grad_stats",
    "int8_linear",
    "int8_matmul",
    "join_master",
    "lion_",
    "matmul",
    "quantize",
    "quantize_state",
    "sgd_",
    "split_master",
    "unscale_",
    "weight_only_matmul",
]
