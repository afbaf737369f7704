"""Activations by name: the check of one, and torch's own function for layers that apply it outside a kernel."""

from torch import Tensor

from mixft.cpu.activation import ACTIVATIONS

NAMES = tuple(name for name in ACTIVATIONS if name != "none")


def check_activation(activation: str | None) -> str:
    """The kernels' name of ``activation``; raise ValueError for one that there is not."""
    if activation is None:
        return "none"
    if activation not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}; it is {activation!r}")
    return activation


def activate(x: Tensor, activation: str | None) -> Tensor:
    """``activation`` of ``x`` by torch, differentiable; ``x`` itself for None."""
    return ACTIVATIONS[activation or "none"](x)
