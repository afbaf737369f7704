"""In which precision each linear layer of a model computes, and how well int8 holds what it multiplies."""

from dataclasses import dataclass, field

from torch import nn

from .quant_linear import QuantLinear
from .quantization import is_linear
from .quantization_report import bytes_of

KINDS = ("input", "weight", "gradient")


@dataclass(frozen=True)
class LayerPrecision:
    """One linear layer as it is now.

    Attributes:
        name: the module's qualified name.
        mode: of its :class:`mixft.nn.QuantLinear`, or "float".
        backward: what the gradients run in: "int8", "weight_grad_16bit", "16bit" or "exact" of a QuantLinear, where
            "16bit" may be the guard's doing; "float" of any other.
        sqnr: last signal-to-quantization-noise ratios in dB by "input", "weight" and "gradient", as far as measured.
        fallback: "" while all runs as asked, "gradients" or "layer" where those run in floats for their noise.
        fallback_since: the training pass of the layer after which it does, None for none.
        bytes: of its parameters and buffers.
    """

    name: str
    mode: str
    backward: str
    sqnr: dict[str, float]
    fallback: str
    fallback_since: int | None
    bytes: int


@dataclass(frozen=True)
class ModelReport:
    """What :func:`model_report` found; ``print`` shows it as a table."""

    layers: list[LayerPrecision] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[LayerPrecision]:
        return [layer for layer in self.layers if layer.fallback]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        heads = "".join(f"  {kind:>8}" for kind in KINDS)
        lines = [f"{'layer':{width}}  {'mode':11}  {'backward':17}{heads}  {'bytes':>12}  floats since"]
        for layer in self.layers:
            ratios = [f"{layer.sqnr[kind]:.1f} dB" if kind in layer.sqnr else "-" for kind in KINDS]
            figures = "".join(f"  {ratio:>8}" for ratio in ratios) + f"  {layer.bytes:12,}"
            since = f"pass {layer.fallback_since}, {layer.fallback}" if layer.fallback else "-"
            lines.append(f"{layer.name:{width}}  {layer.mode:11}  {layer.backward:17}{figures}  {since}")
        total = sum(layer.bytes for layer in self.layers)
        lines.append(f"{len(self.layers)} linear layers, {total:,} bytes, {len(self.fallbacks)} in floats for noise")
        return "\n".join(lines)


def model_report(model: nn.Module) -> ModelReport:
    """Every linear layer of ``model``: its mode, bytes, and for int8 training its noise and what fell back to floats.

    Ratios are those that layers with int8 gradients measured last, every hundredth training pass outside of
    ``torch.compile``; asking reads no device.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}")
    return ModelReport([_describe(name, module) for name, module in model.named_modules() if is_linear(module)])


def _describe(name: str, module: nn.Module) -> LayerPrecision:
    size = bytes_of(module)
    if not isinstance(module, QuantLinear):
        return LayerPrecision(name, "float", "float", {}, "", None, size)
    guard = module.guard
    return LayerPrecision(name, module.mode, module.backward, dict(guard.sqnr), guard.fallback, guard.since, size)
