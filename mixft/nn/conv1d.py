"""The linear layer of GPT-2 and its like in transformers, ``Conv1D``, whose weight is [in_features, out_features]."""

import importlib
import sys

import torch
from torch import nn

MODULE = "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """True for a ``transformers.Conv1D`` itself; transformers is not imported, since such a model has imported it."""
    library = sys.modules.get(MODULE)
    return library is not None and type(module) is library.Conv1D


def features(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer of any kind."""
    return tuple(module.weight.shape) if is_conv1d(module) else (module.in_features, module.out_features)


def make_conv1d(weight: nn.Parameter, bias: nn.Parameter) -> nn.Module:
    """A ``Conv1D`` of these parameters, [in_features, out_features] and [out_features]."""
    in_features, out_features = weight.shape
    with torch.device("meta"):
        layer = importlib.import_module(MODULE).Conv1D(out_features, in_features)
    layer.weight, layer.bias = weight, bias
    return layer
