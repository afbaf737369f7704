"""Dropout whose random numbers do not dominate a training step on a CPU."""

import torch.nn.functional as F
from torch import Tensor, nn

from mixft.ops.dropout import dropout


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, on a CPU in one pass, with a counter-based generator and no mask kept for the backward.

    An element is dropped where its 16 random bits are below round(2^16 p), so its probability is within 2^-17 of ``p``,
    and the others are divided by the exact probability of being kept. The seed comes from torch's default generator. On
    other devices, in place, under ``torch.compile`` and where p is 0 or 1, it is torch's own.

    Args:
        p: probability of an element to be zeroed.
        inplace: do it in place.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """

    @classmethod
    def from_dropout(cls, dropout: nn.Dropout) -> "Dropout":
        """The same dropout as ``dropout``, in its training or evaluation state.

        Raises:
            TypeError: ``dropout`` is no ``torch.nn.Dropout``.
        """
        if not isinstance(dropout, nn.Dropout):
            raise TypeError(f"dropout must be a torch.nn.Dropout; it is a {type(dropout).__name__}")
        return cls(dropout.p, dropout.inplace).train(dropout.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.inplace:
            output = dropout(input, self.p)
            if output is not None:
                return output
        return F.dropout(input, self.p, self.training, self.inplace)
