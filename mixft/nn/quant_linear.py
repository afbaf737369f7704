"""A linear layer with int8 weights, or one that trains with int8 products."""

from typing import Literal

import torch
from torch import Tensor, nn

from mixft.ops.activation import activate, check_activation

from . import int8_weight
from .int8_training import Int8Training, TrainingOptions
from .linear import Linear

Mode = Literal["weight_only", "dynamic", "train"]
MODES = ("weight_only", "dynamic", "train")


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that there is not."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; it is {mode!r}")


def check_training(mode: str, training: dict) -> None:
    """Raise unless the options for training fit the mode."""
    if training and mode != "train":
        raise ValueError(f"{', '.join(training)} is for mode 'train'; the mode is {mode!r}")


class QuantLinear(nn.Module):
    """``nn.Linear`` in int8.

    ===============  =======================  ============================  =========================================
    mode             weight kept              products                      for
    ===============  =======================  ============================  =========================================
    ``weight_only``  int8 and a scale a row   activations 16 or 32 bits     small batches; adapters on frozen weights
    ``dynamic``      int8 and a scale a row   int8, a scale an input row    inference
    ``train``        as given, a parameter    int8 forward and backward     fine-tuning
    ===============  =======================  ============================  =========================================

    In the first two modes ``weight`` is an int8 buffer [out_features, in_features] and ``weight_scale`` an FP32 buffer
    [out_features, 1]; the gradient reaches the input and the bias. In ``train`` mode ``weight`` is a parameter and
    ``weight_scale`` is None. Inputs are [..., in_features] of FP16, BF16 or FP32, under autocast of its dtype, and the
    output has the input's dtype.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        mode: one of the table.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied to the output.
        device: where to make the tensors.
        dtype: of the parameters; None is torch's default.
        training: the fields of :class:`mixft.nn.int8_training.TrainingOptions`, for mode "train" alone.

    Raises:
        ValueError: an unknown mode or activation, training options in another mode, or an input whose last dimension
            is not ``in_features``.
        TypeError: an input that is no FP16, BF16 or FP32 tensor, or an option that there is not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mode: Mode = "dynamic",
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **training,
    ):
        super().__init__()
        check_mode(mode)
        check_activation(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.activation = activation
        self.float_dtype = dtype or torch.get_default_dtype()
        check_training(mode, training)
        if mode == "train":
            self.int8_training = Int8Training(TrainingOptions(**training))
            self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
            self.weight_scale = None
        else:
            self.register_buffer("weight", torch.zeros(out_features, in_features, device=device, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_features, 1, device=device, dtype=torch.float32))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw parameters as ``nn.Linear`` does; an int8 weight is zero until one is loaded."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        if self.mode == "train":
            nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mode: Mode = "dynamic", **training) -> "QuantLinear":
        """A layer with the weights of ``linear``, on its device, in its training or evaluation state.

        In ``train`` mode the parameters are shared, so an optimizer built before goes on working. In the other modes
        the weight is quantized, one symmetric scale a row, and the bias is shared.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
            ValueError: an unknown mode, training options in another mode than "train", or a weight with NaN or Inf.
        """
        check_mode(mode)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear; it is a {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            mode,
            getattr(linear, "activation", None),
            device="meta",
            dtype=linear.weight.dtype,
            **training,
        )
        if mode == "train":
            layer.weight = linear.weight
        else:
            layer.weight, layer.weight_scale = int8_weight.int8_weight_of(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The floating-point layer of the same function; parameters are shared.

        An int8 weight is dequantized to the dtype that it came from. A layer with an activation gives a
        :class:`mixft.nn.Linear` with it, any other a plain ``nn.Linear``.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = self.weight if self.mode == "train" else nn.Parameter(self.dequantized_weight())
        linear.bias = self.bias
        linear.train(self.training)
        return linear if self.activation is None else Linear.from_linear(linear, self.activation)

    def dequantized_weight(self) -> Tensor:
        """The weight [out_features, in_features] that an int8 one was made from, as nearly, in ``float_dtype``."""
        if self.mode == "train":
            return self.weight.detach()
        return (self.weight * self.weight_scale).to(self.float_dtype)

    def forward(self, input: Tensor) -> Tensor:
        source = input
        if torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self.mode == "train":
            return activate(self.int8_training(source, input, self.weight, self.bias), self.activation)
        return int8_weight.forward(self.mode, input, self.weight, self.weight_scale, self.bias, self.activation)

    def _apply(self, fn, recurse: bool = True):
        # half() and to(dtype) convert floating buffers; a scale in 16 bits would change the weights.
        scale = self.weight_scale
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        super()._apply(fn, recurse)
        if scale is not None and self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", mode={self.mode!r}"
        if self.mode == "train":
            text += f", backward={self.int8_training.backward!r}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
