"""Dropout whose random numbers do not dominate a training step on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 2**16


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, on a CPU with one 64-bit random number for four elements instead of one for each.

    An element is dropped where its 16 random bits are below round(2^16 p), so its probability is within 2^-17 of ``p``,
    and the others are divided by the exact probability of being kept. Numbers come from torch's default generator. On
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
        dropped = round(self.p * LANES)
        ours = self.training and not self.inplace and input.device.type == "cpu" and 0 < dropped < LANES
        # The compiler has a generator of its own, fused into the kernels around it.
        if not ours or torch.compiler.is_compiling():
            return F.dropout(input, self.p, self.training, self.inplace)
        count = input.numel()
        bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[:count].view(input.shape) >= dropped - LANES // 2
        return input * kept.to(input.dtype).mul_(LANES / (LANES - dropped))
