"""Activations by name: the check of one, and the function for layers that apply it outside a kernel."""

import torch
from torch import Tensor

from mixft.cpu import native
from mixft.cpu.activation import ACTIVATIONS, finish_product
from mixft.cpu.activation_backward import activation_backward

from .registration import is_observed
from .validation import FLOATS

NAMES = tuple(name for name in ACTIVATIONS if name != "none")


def check_activation(activation: str | None) -> str:
    """The kernels' name of ``activation``; raise ValueError for one that there is not."""
    if activation is None:
        return "none"
    if activation not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}; it is {activation!r}")
    return activation


class _Compiled(torch.autograd.Function):
    """By the CPU's compiled routines, a pass each way; a second derivative by torch's."""

    @staticmethod
    def forward(ctx, x: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        x = x.resolve_neg().contiguous()
        return finish_product(x, activation, x.dtype, preactivation_dtype=x.dtype)[0]

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            return *torch.autograd.grad(ACTIVATIONS[ctx.activation](x), x, grad_out, create_graph=True), None
        columns = x.shape[-1] if x.dim() else 1
        grad, kept = (tensor.resolve_neg().reshape(-1, columns) for tensor in (grad_out, x))
        return activation_backward(grad, kept, ctx.activation, x.dtype, False)[0].view(x.shape), None


def activate(x: Tensor, activation: str | None) -> Tensor:
    """``activation`` of ``x``, differentiable as often as torch's; ``x`` itself for None.

    Compiled where ``x`` is a plain CPU tensor of FP16, BF16 or FP32 that no compiler or transform sees; elsewhere
    torch's.
    """
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in FLOATS and x.numel() > 0
    if activation is None or not plain or is_observed() or not native.available():
        return ACTIVATIONS[activation or "none"](x)
    return _Compiled.apply(x, activation)
