"""Static activation scales: the range of each int8 layer's input, seen on batches of the traffic to serve."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from mixft.ops.quantize import SMALLEST_SCALE

from .quant_linear import QuantLinear

# An affine input is worth its zero point where its step is at most this part of the symmetric one.
AFFINE_BELOW = 0.75


@dataclass(frozen=True)
class InputRange:
    """What calibration found of one layer's input.

    Attributes:
        low: the smallest value seen, or 0.
        high: the largest value seen, or 0.
        scale: the step of the quantization.
        zero_point: the integer that stands for 0; 0 itself where the quantization is symmetric.
        affine: which of the two was chosen.
    """

    low: float
    high: float
    scale: float
    zero_point: int
    affine: bool


def calibrate(model: nn.Module, batches: Iterable) -> dict[str, InputRange]:
    """Give the ``dynamic`` layers of ``model`` static scales for their inputs, from the ranges seen on ``batches``.

    Each batch goes through the model in evaluation mode without gradients. A layer's input then has one scale for good:
    no reduction at every call, values beyond the range clamped. The quantization is affine, (high - low) / 255 a step,
    where that is at most three quarters of the symmetric step max(-low, high) / 127, as it is for what comes out of
    ReLU, GELU, SiLU or softmax, and symmetric elsewhere. Layers with an ``outlier_threshold`` and layers that no batch
    reached stay dynamic; calibrating again replaces the scales of static layers.

    Args:
        model: with ``dynamic`` or ``static`` :class:`mixft.nn.QuantLinear` layers; their mode changes in place.
        batches: what the model is called with: a mapping as keyword arguments, a tuple or list as positional ones,
            anything else as the only argument. A few hundred inputs like those to serve suffice.

    Returns:
        The range found, by the name of each layer that is now static.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no such layer, no batch, an input with NaN or Inf (the layer is named), or no layer reached. The
            model is then as it was, as it is when the model itself raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if _can_be_static(module)}
    if not layers:
        raise ValueError("model has no dynamic QuantLinear layers; call mixft.quantize_(model, 'dynamic') first")
    extremes = _extremes(model, layers, batches)
    if not extremes:
        raise ValueError(
            f"no batch reached an int8 layer of the model ({', '.join(layers)}); give batches that are not empty and "
            "that the forward takes through them"
        )
    ranges = {name: input_range(*extremes[name]) for name in layers if name in extremes}
    for name, found in ranges.items():
        layers[name].to_static(found.scale, found.zero_point)
    return ranges


def input_range(low: float, high: float) -> InputRange:
    """The quantization of values from ``low`` to ``high``, affine or symmetric as :func:`calibrate` says."""
    low, high = min(low, 0.0), max(high, 0.0)
    symmetric, affine = max(-low, high) / 127, high / 255 - low / 255
    if affine > AFFINE_BELOW * symmetric or affine < SMALLEST_SCALE:
        return InputRange(low, high, max(symmetric, SMALLEST_SCALE), 0, False)
    return InputRange(low, high, affine, round(-128 - low / affine), True)


def _can_be_static(module: nn.Module) -> bool:
    usual = isinstance(module, QuantLinear) and module.outlier_threshold is None
    return usual and module.mode in ("dynamic", "static")


@torch.no_grad()
def _extremes(model: nn.Module, layers: dict[str, QuantLinear], batches: Iterable) -> dict[str, tuple[float, float]]:
    """(lowest, highest) input of each layer that the batches reach; the model runs as it is and is left so."""
    seen: dict[str, Tensor] = {}
    training = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(partial(_note, seen, name), prepend=True, with_kwargs=True)
        for name, layer in layers.items()
    ]
    ran = False
    try:
        model.eval()
        for batch in batches:
            ran = True
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not ran:
        raise ValueError("batches is empty; give the inputs of some calls of the model")
    found = {name: (-negated, high) for name, (negated, high) in ((n, pair.tolist()) for n, pair in seen.items())}
    for name, (low, high) in found.items():
        if not (isfinite(low) and isfinite(high)):
            raise ValueError(f"the input of layer {name!r} holds NaN or Inf on the batches; leave those batches out")
    return found


def _note(seen: dict[str, Tensor], name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Widen the range of ``name``, kept on the device as (-low, high)."""
    input = args[0] if args else kwargs["input"]
    if input.numel() == 0:
        return
    low, high = torch.aminmax(input.float())
    pair = torch.stack([-low, high])
    seen[name] = torch.maximum(seen[name], pair) if name in seen else pair
