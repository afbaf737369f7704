"""Drop-in layers: ``Linear`` and ``MLP`` in 16-bit floats, ``QuantLinear`` in int8, ``Dropout`` and ``GELU``."""

import importlib

from .dropout import Dropout
from .gelu import GELU
from .linear import Linear
from .mlp import MLP

__all__ = ["GELU", "MLP", "Dropout", "Linear", "QuantLinear"]


def __getattr__(name: str):
    if name == "QuantLinear":
        value = importlib.import_module("mixft.nn.quant_linear").QuantLinear
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mixft.nn' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
