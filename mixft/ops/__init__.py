"""The ops, on CPU and GPU tensors alike, each registered with ``torch.library`` under ``mixft::`` or made of such."""

from .accumulate import accumulate_
from .adamw import adamw_
from .dequantize import dequantize
from .dynamic_int8_linear import dynamic_int8_linear
from .grad import grad_stats, unscale_
from .grad_scalars import grad_scalars
from .int8_matmul import int8_matmul
from .lion import lion_
from .lora_int8_linear import lora_int8_linear
from .matmul import matmul
from .mlp import mlp
from .outlier_int8_linear import outlier_int8_linear
from .quantize import quantize
from .sgd import sgd_
from .static_int8_linear import static_int8_linear
from .training_int8_linear import training_int8_linear
from .weight_only_matmul import weight_only_matmul

__all__ = [
    "accumulate_",
    "adamw_",
    "dequantize",
    "dynamic_int8_linear",
    "grad_scalars",
    "grad_stats",
    "int8_matmul",
    "lion_",
    "lora_int8_linear",
    "matmul",
    "mlp",
    "outlier_int8_linear",
    "quantize",
    "sgd_",
    "static_int8_linear",
    "training_int8_linear",
    "unscale_",
    "weight_only_matmul",
]
