"""Which code serves an op for a dtype and a device, in words, as ``mixft doctor`` prints it."""

import importlib.util

import torch

from mixft.cpu.instruction_set import has_bf16_dot
from mixft.cpu.int8_layer import serves
from mixft.cpu.int8_matmul import int_mm_is_fast_and_exact
from mixft.ops.registration import interpreting

INT8_PRODUCTS = (
    "int8_matmul",
    "dynamic_int8_linear",
    "lora_int8_linear",
    "outlier_int8_linear",
    "static_int8_linear",
    "training_int8_linear",
)
# Those that on a CPU are compiled whole, with what surrounds the product.
COMPILED_LAYERS = ("dynamic_int8_linear", "lora_int8_linear", "static_int8_linear", "outlier_int8_linear")
FLOAT_PRODUCTS = ("matmul", "mlp", "weight_only_matmul")


def served_by(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The code that computes ``mixft.ops.<op>`` here: Triton, a CPU routine and its kind of product, or torch's own.

    Returns:
        None where mixft has no code for that op on that GPU.
    """
    if device.type == "cuda":
        return _on_gpu(op, dtype, device)
    if interpreting():
        return "Triton, interpreted"
    if op in INT8_PRODUCTS:
        if int_mm_is_fast_and_exact() and not (op in COMPILED_LAYERS and serves(1)):
            return "CPU, int8 product"
        return "CPU, compiled int8 product" if serves(1) else "CPU, FP32 product"
    if op == "weight_only_matmul" and serves(1):
        return "CPU, compiled product"
    if op in FLOAT_PRODUCTS:
        return "CPU, BF16 product" if dtype == torch.bfloat16 and has_bf16_dot() else "CPU, FP32 product"
    return "CPU"


def _on_gpu(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton, not installed"
    from mixft.kernels.architecture import architecture_of

    try:
        arch = architecture_of(device)
    except RuntimeError:  # none that mixft compiles for
        return None
    if op in ("matmul", "mlp") and (dtype == torch.float32 or not arch.tensor_cores):
        return "torch.matmul"
    if op in (*INT8_PRODUCTS, "weight_only_matmul") and not arch.tensor_cores:
        return None
    return f"Triton, {arch.name}"
