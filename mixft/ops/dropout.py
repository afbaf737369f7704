"""Dropout of CPU tensors; on other devices torch's own does not take longer than the memory that it passes over."""

import torch
from torch import Tensor

from mixft.cpu.dropout import LANES
from mixft.cpu.dropout import dropout as drop

from .quantize import LARGEST_SEED
from .registration import is_observed
from .validation import FLOATS


class _Dropout(torch.autograd.Function):
    """The gradient is dropped alike; nothing but the seed is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, dropped: int, seed: int) -> Tensor:
        ctx.dropped, ctx.seed = dropped, seed
        return drop(x.resolve_neg().contiguous(), dropped, seed)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return _Dropout.apply(grad_out, ctx.dropped, ctx.seed), None, None


def dropout(x: Tensor, p: float) -> Tensor | None:
    """Dropout of ``x`` with a seed drawn from torch's default generator; None where torch's own is to serve.

    An element is dropped where its 16 random bits are below round(2^16 p), so its probability is within 2^-17 of ``p``,
    and the others are divided by the exact probability of being kept.

    Args:
        x: any tensor; served are plain CPU tensors of FP16, BF16 or FP32, seen by no compiler or transform.
        p: probability; served is all whose rounding is neither 0 nor 1.

    Returns:
        A contiguous tensor like ``x``, differentiable in it; None for all that is not served.
    """
    dropped = round(p * LANES)
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in FLOATS and 0 < dropped < LANES
    # A compiler has a generator of its own, fused into the kernels around it.
    if not plain or is_observed():
        return None
    return _Dropout.apply(x, dropped, int(torch.randint(LARGEST_SEED, (), device="cpu")))
