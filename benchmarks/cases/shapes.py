"""Shapes of the models that the cases take their sizes from, and names for dtypes."""

import torch
from torch import Tensor

# all-MiniLM-L6-v2, a BERT of 22.7M parameters: the tensors that a fine-tuning step updates.
HIDDEN, INTERMEDIATE, LAYERS = 384, 1536, 6
_EMBEDDINGS = [(30522, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,)]
_LAYER = [
    *[(HIDDEN, HIDDEN), (HIDDEN,)] * 4,
    *[(HIDDEN,)] * 4,
    (INTERMEDIATE, HIDDEN),
    (INTERMEDIATE,),
    (HIDDEN, INTERMEDIATE),
    (HIDDEN,),
]
_HEAD = [(HIDDEN, HIDDEN), (HIDDEN,), (2, HIDDEN), (2,)]
BERT = (*_EMBEDDINGS, *_LAYER * LAYERS, *_HEAD)
# Large enough to touch every tensor of a model at many places, prime so that no row length divides it.
STRIDE = 97
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8"}


def sample(tensors) -> list[Tensor]:
    """Views on some elements of each tensor, spread over all of it."""
    return [tensor.detach().view(-1)[::STRIDE] for tensor in tensors]


def elements(shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(torch.Size(shape).numel() for shape in shapes)
