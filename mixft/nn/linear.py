"""``mixft.nn.Linear``: ``torch.nn.Linear`` served by ``mixft.ops.matmul``, with an optional fused activation."""

import torch
from torch import Tensor

from mixft.ops import matmul
from mixft.ops.activation import check_activation


class Linear(torch.nn.Linear):
    """``activation(input @ weight.t() + bias)``, summed in FP32 and rounded once.

    A ``torch.nn.Linear`` in every other respect: the same parameters, initial values and state dict. Under
    ``torch.autocast`` it computes in autocast's dtype.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        activation: ``None``, ``"relu"``, ``"gelu"`` (the erf form), ``"gelu_tanh"`` or ``"silu"``.
        device: device of the parameters.
        dtype: dtype of the parameters: FP16, BF16 or FP32.

    Raises:
        ValueError: an unknown activation, or an input whose last dimension is not ``in_features``.
        TypeError: an input whose dtype is not the weight's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_activation(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, activation: str | None = None) -> "Linear":
        """A layer that shares the parameters of ``linear``: training one trains the other.

        Raises:
            TypeError: ``linear`` is not a ``torch.nn.Linear``.
            ValueError: an unknown activation.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, activation, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        device_type = input.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; the last dimension of the "
                f"input must be in_features, {weight.shape[1]}"
            )
        if input.dtype != weight.dtype:
            raise TypeError(
                f"input is {input.dtype} and weight is {weight.dtype}; convert one of them, or use torch.autocast"
            )
        return matmul(input, weight.t(), bias, self.activation)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
