"""What quantization did to the linear layers of a model, in bytes and in error."""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: the module's qualified name.
        reason: why the layer was left as it was; empty for a layer that was quantized.
        bytes_before: of its parameters.
        bytes_after: of its parameters and buffers.
        error: ||Q(w) - w|| / ||w|| of its weight, 0 for a layer that was left.
    """

    name: str
    reason: str
    bytes_before: int
    bytes_after: int
    error: float

    @property
    def quantized(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`mixft.quantize_` did; ``print`` shows it as a table."""

    mode: str
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.quantized]

    @property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.quantized]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=4)
        lines = [f"{'layer':{width}}  {'bytes before':>12}  {'after':>12}  weight error"]
        for layer in self.layers:
            last = f"{layer.error:.2%}" if layer.quantized else f"left: {layer.reason}"
            lines.append(f"{layer.name:{width}}  {layer.bytes_before:12,}  {layer.bytes_after:12,}  {last}")
        before = sum(layer.bytes_before for layer in self.layers)
        after = sum(layer.bytes_after for layer in self.layers)
        count = f"{len(self.quantized)} of {len(self.layers)} layers in mode {self.mode!r}"
        lines.append(f"{count}: {before:,} -> {after:,} bytes")
        return "\n".join(lines)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """||found - exact|| / ||exact||, 0 for an ``exact`` of zeros; summed in FP64, as squares may leave FP32's range."""
    error, norm = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (found - exact, exact))
    return (error / norm).item() if norm > 0 else 0.0


def bytes_of(module: nn.Module) -> int:
    """Bytes of the module's own parameters and buffers, none of those that wait for an input to have a shape."""
    return sum(tensor.nbytes for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
