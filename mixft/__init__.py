"""mixft: kernels and a thin API for mixed-precision fine-tuning.

Submodules load at first use, so that ``import mixft`` runs no CUDA query, needs no Triton and compiles nothing.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("amp", "nn", "onnx", "ops", "optim", "precision")
_ATTRIBUTES = {
    "quantize_": "mixft.nn.quantization",
    "dequantize_": "mixft.nn.quantization",
    "model_report": "mixft.nn.model_report",
    "calibrate": "mixft.nn.calibration",
    "save_quantized": "mixft.nn.checkpoint",
    "load_quantized": "mixft.nn.checkpoint",
    "PrecisionPolicy": "mixft.precision",
    "PrecisionController": "mixft.precision",
}

# What needs transformers, so that it is no part of ``from mixft import *``.
_WITH_TRANSFORMERS = {"Int8Config": "mixft.huggingface"}

__all__ = [*_SUBMODULES, *_ATTRIBUTES, "__version__"]


def __getattr__(name: str):
    if name in (*_SUBMODULES, "huggingface"):
        return importlib.import_module(f"mixft.{name}")
    module = _ATTRIBUTES.get(name) or _WITH_TRANSFORMERS.get(name)
    if module:
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mixft' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_WITH_TRANSFORMERS, "huggingface"})
