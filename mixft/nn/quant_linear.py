"""A linear layer with int8 weights, or one that trains with int8 products."""

from dataclasses import fields
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mixft.ops.activation import activate, check_activation
from mixft.ops.outlier_int8_linear import check_threshold
from mixft.ops.validation import FLOATS, check_dtype

from . import int8_weight
from .conv1d import features, is_conv1d, make_conv1d
from .frozen_training import FrozenOptions, FrozenTraining
from .int8_training import Int8Training, TrainingOptions
from .linear import Linear, check_features
from .noise_guard import NoiseGuard

Mode = Literal["weight_only", "dynamic", "train"]
MODES = get_args(Mode)
TRAINED = {field.name for field in fields(TrainingOptions)}
FROZEN = {field.name for field in fields(FrozenOptions)}


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that a layer cannot be converted to."""
    if mode not in MODES:
        hint = "; mixft.calibrate(model, batches) makes static layers of dynamic ones" if mode == "static" else ""
        raise ValueError(f"mode must be one of {', '.join(MODES)}; it is {mode!r}{hint}")


def check_outlier_threshold(threshold: float | None, mode: str) -> None:
    """Raise ValueError unless ``threshold`` is None or one for a layer of ``mode``."""
    if threshold is None:
        return
    check_threshold(threshold)
    if mode != "dynamic":
        raise ValueError(f"outlier_threshold={threshold!r} needs mode 'dynamic'; mode is {mode!r}")


def training_options(mode: str, training: dict) -> TrainingOptions | FrozenOptions:
    """The options for training of a layer of ``mode``; raises unless they fit it."""
    unknown = training.keys() - TRAINED
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(TRAINED))}")
    if mode == "train":
        return TrainingOptions(**training)
    others = training.keys() - FROZEN
    if others:
        raise ValueError(f"{', '.join(sorted(others))} is for mode 'train'; the mode is {mode!r}")
    return FrozenOptions(**training)


class QuantLinear(nn.Module):
    """``nn.Linear`` in int8.

    ===============  =======================  ============================  =========================================
    mode             weight kept              products                      for
    ===============  =======================  ============================  =========================================
    ``weight_only``  int8 and a scale a row   activations 16 or 32 bits     small batches; adapters on frozen weights
    ``dynamic``      int8 and a scale a row   int8, a scale an input row    inference
    ``static``       int8 and a scale a row   int8, one scale for the input  inference on traffic known beforehand
    ``train``        as given, a parameter    int8 forward and backward     fine-tuning
    ===============  =======================  ============================  =========================================

    In all modes but ``train``, ``weight`` is an int8 buffer [out_features, in_features] and ``weight_scale`` an FP32
    buffer [out_features, 1]; the gradient reaches the input, by default in an int8 product where the forward has one,
    and the bias. A ``static`` layer, which :func:`mixft.calibrate` makes of a ``dynamic`` one, also has
    ``input_scale``, ``input_zero_point`` and ``weight_sum``, the sums of the weight's rows. In ``train`` mode
    ``weight`` is a parameter and ``weight_scale`` is None. Inputs are [..., in_features] of FP16, BF16 or FP32, under
    autocast of its dtype, and the output has the input's dtype. Where oneDNN multiplies, on a CPU with AMX or without
    the compiled routines, it keeps a packed copy of an int8 weight, which is made anew after a change in place; a
    change through ``.data`` goes unnoticed there. ``load_state_dict`` refuses a floating-point weight for an int8 one
    and the reverse, whatever ``strict`` says, and leaves the layer as it was.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a learned bias.
        mode: one of the table.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied to the output.
        device: where to make the tensors.
        dtype: of the parameters; None is torch's default.
        outlier_threshold: in ``dynamic`` mode, a column of the input with a magnitude above this is multiplied in
            floating point (:func:`mixft.ops.outlier_int8_linear`); for models whose activations have outliers. None
            takes all columns in int8.
        transposed: stand in for transformers' ``Conv1D``: in ``train`` mode ``weight`` is [in_features, out_features],
            and ``to_linear`` gives a ``Conv1D``.
        training: the fields of :class:`mixft.nn.int8_training.TrainingOptions` in mode "train", else those of
            :class:`mixft.nn.frozen_training.FrozenOptions`.

    Raises:
        ValueError: an unknown mode or activation, a threshold that is not positive or in another mode, training options
            of another mode, or an input whose last dimension is not ``in_features``.
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
        outlier_threshold: float | None = None,
        transposed: bool = False,
        **training,
    ):
        super().__init__()
        if mode != "static":
            check_mode(mode)
        check_activation(activation)
        check_outlier_threshold(outlier_threshold, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.activation = activation
        self.outlier_threshold = outlier_threshold
        self.transposed = transposed
        self.float_dtype = dtype or torch.get_default_dtype()
        options = training_options(mode, training)
        if mode == "train":
            self.int8_training: Int8Training | FrozenTraining = Int8Training(options)
            shape = (in_features, out_features) if transposed else (out_features, in_features)
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.weight_scale = None
        else:
            self.int8_training = FrozenTraining(options, mode == "weight_only" or outlier_threshold is not None)
            self.weight_requires_grad = True  # of the floating-point weight that to_linear makes
            self.register_buffer("weight", torch.zeros(out_features, in_features, device=device, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_features, 1, device=device, dtype=torch.float32))
        if mode == "static":
            integers = {"device": device, "dtype": torch.int32}
            int8_weight.register_input_range(
                self,
                torch.ones((), device=device, dtype=torch.float32),
                torch.zeros((), **integers),
                torch.zeros(out_features, **integers),
            )
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
    def from_linear(
        cls, linear: nn.Linear, mode: Mode = "dynamic", *, outlier_threshold: float | None = None, **training
    ) -> "QuantLinear":
        """A layer with the weights of ``linear``, on its device, in its training or evaluation state.

        ``linear`` may be a ``Conv1D`` of transformers too.

        In ``train`` mode the parameters are shared, so an optimizer built before goes on working. In the other modes
        the weight is quantized, one symmetric scale a row, and the bias is shared.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` and no ``Conv1D``, or its weight is not FP16, BF16 or FP32.
            ValueError: an unknown mode, a threshold or training options that do not fit it, a weight with NaN or Inf,
                on the meta device, or of a shape that waits for the first input.
        """
        check_mode(mode)
        transposed = is_conv1d(linear)
        if not isinstance(linear, nn.Linear) and not transposed:
            raise TypeError(f"linear must be a torch.nn.Linear; it is a {type(linear).__name__}")
        if is_lazy(linear.weight):
            raise ValueError("linear has no weight yet; call it first, so that it has the shape of its input")
        check_dtype("the weight of linear", linear.weight, FLOATS)
        if linear.weight.is_meta and mode != "train":
            raise ValueError("linear has its weight on the meta device, without values; load one first")
        layer = cls(
            *features(linear),
            linear.bias is not None,
            mode,
            getattr(linear, "activation", None),
            device="meta",
            dtype=linear.weight.dtype,
            outlier_threshold=outlier_threshold,
            transposed=transposed,
            **training,
        )
        if mode == "train":
            layer.weight = linear.weight
        else:
            weight = linear.weight.t() if transposed else linear.weight
            layer.weight, layer.weight_scale = int8_weight.int8_weight_of(weight)
            layer.weight_requires_grad = linear.weight.requires_grad
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The floating-point layer of the same function; parameters are shared.

        An int8 weight is dequantized to the dtype that it came from, and is frozen where the weight was that
        ``from_linear`` took. A layer with an activation gives a :class:`mixft.nn.Linear` with it, one that stands in
        for a ``Conv1D`` a ``Conv1D``, any other a plain ``nn.Linear``.
        """
        weight = self.weight if self.mode == "train" else self._dequantized_parameter()
        if self.transposed:
            return make_conv1d(weight, self.bias).train(self.training)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = weight
        linear.bias = self.bias
        linear.train(self.training)
        return linear if self.activation is None else Linear.from_linear(linear, self.activation)

    @property
    def backward(self) -> str:
        """What the gradients run in, the guard's fallback included: see the options for training."""
        return self.int8_training.backward

    @property
    def guard(self) -> NoiseGuard:
        """What measures how well int8 does in training."""
        return self.int8_training.guard

    def watch_gradient(self, output: Tensor) -> None:
        """Measure the gradient of a frozen layer's ``output`` now and then, where it runs in int8."""
        if output.requires_grad and self.backward == "int8":
            self.int8_training.watch(output, self.weight_scale)

    def training_options(self) -> dict:
        """The options for training: in mode "train" all of them, in the others those that are not the defaults."""
        return self.int8_training.saved_options()

    def dequantized_weight(self) -> Tensor:
        """The weight [out_features, in_features] that an int8 one was made from, as nearly, in ``float_dtype``."""
        if self.mode == "train":
            return self.matrix().detach()
        return (self.weight * self.weight_scale).to(self.float_dtype)

    def _dequantized_parameter(self) -> nn.Parameter:
        weight = self.dequantized_weight()
        return nn.Parameter(weight.t().contiguous() if self.transposed else weight, self.weight_requires_grad)

    def matrix(self) -> Tensor:
        """The weight of a layer in ``train`` mode as [out_features, in_features], differentiable."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor; it is a {type(input).__name__}")
        check_features(input, self.out_features, self.in_features)
        source = input
        # torch knows no autocast for the meta device, and raises when asked.
        if input.is_floating_point() and not input.is_meta and torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if self.mode == "train":
            return activate(self.int8_training(source, input, self.weight, self.matrix(), self.bias), self.activation)
        return int8_weight.forward(self, input)

    def to_static(self, scale: float, zero_point: int) -> None:
        """Make this ``dynamic`` or ``static`` layer ``static``, its input quantized with ``scale`` and ``zero_point``.

        Raises:
            ValueError: a layer of another mode or with an ``outlier_threshold``, a scale that is not positive and
                finite in FP32, or a zero point outside [-128, 127].
        """
        if self.mode not in ("dynamic", "static") or self.outlier_threshold is not None:
            raise ValueError(f"only a dynamic layer without outlier_threshold can become static; this is {self}")
        kept_scale = torch.tensor(scale, dtype=torch.float32, device="cpu")
        if not 0 < kept_scale < float("inf") or not -128 <= zero_point <= 127:
            raise ValueError(
                f"scale must be positive and finite in FP32, zero_point in [-128, 127]; they are {scale!r} and "
                f"{zero_point!r}"
            )
        device = self.weight.device
        int8_weight.register_input_range(
            self,
            kept_scale.to(device),
            torch.tensor(zero_point, dtype=torch.int32, device=device),
            self.weight.sum(1, dtype=torch.int32),
        )
        self.mode = "static"

    def _apply(self, fn, recurse: bool = True):
        # Module.type casts integers too.
        kept = {name: self._buffers[name] for name in int8_weight.BUFFERS if self._buffers.get(name) is not None}
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # torch would cast: a float weight to int8 is all zeros, wider integers wrap, int8 codes make no float weight.
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and not self._fits(given):
            error_msgs.append(self._refusal(prefix.removesuffix("."), given.dtype))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _fits(self, weight: Tensor) -> bool:
        return weight.is_floating_point() if self.mode == "train" else weight.dtype == torch.int8

    def _refusal(self, name: str, found: torch.dtype) -> str:
        """What ``load_state_dict`` says of a weight of the dtype ``found``."""
        if found.is_floating_point:
            hint = "load it before mixft.quantize_(model), or after mixft.dequantize_(model)"
        elif found != torch.int8:
            hint = "mixft writes int8 weights as torch.int8, in any mode but 'train'"
        else:
            hint = "call mixft.quantize_(model, mode) first, with the mode that it was saved in"
        layer = f"layer {name!r}" if name else "this layer"
        return f"the weight of {layer} is {found} in state_dict, and {self.weight.dtype} in mode {self.mode!r}; {hint}"

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", mode={self.mode!r}"
        text += f", backward={self.backward!r}"
        text += ", transposed=True" if self.transposed else ""
        text += "" if self.activation is None else f", activation={self.activation!r}"
        return text if self.outlier_threshold is None else f"{text}, outlier_threshold={self.outlier_threshold}"
