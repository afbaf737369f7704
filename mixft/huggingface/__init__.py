"""mixft in Hugging Face's libraries: the import registers mixft with transformers, and with PEFT where it is installed.

With transformers, :class:`Int8Config` becomes a ``quantization_config`` of ``from_pretrained``, and the folders that
``save_pretrained`` then writes load again with a plain ``from_pretrained``, in every process that imports this module.
"""

import importlib
import importlib.util

OLDEST_TRANSFORMERS = (5, 12)

if importlib.util.find_spec("transformers") is None:
    raise ImportError(
        "mixft.huggingface needs transformers, which is not installed; pip install '.[huggingface]' in mixft's "
        "checkout",
        name="transformers",
    )

import transformers  # noqa: E402

if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
    raise ImportError(
        f"mixft.huggingface needs transformers 5.12 or newer; {transformers.__version__} is installed",
        name="transformers",
    )

from .config import Int8Config  # noqa: E402
from .quantizer import Int8Quantizer, mark_quantized  # noqa: E402

__all__ = ["Int8Config", "Int8Quantizer", "NumericsCallback", "mark_quantized"]

if importlib.util.find_spec("peft") is not None:
    from .lora import LoraQuantLinear

    __all__ += ["LoraQuantLinear"]


def __getattr__(name: str):
    if name == "NumericsCallback":
        # The Trainer that it needs takes seconds to import.
        value = importlib.import_module("mixft.huggingface.callback").NumericsCallback
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mixft.huggingface' has no attribute {name!r}")
