"""``mixft.nn.Linear``: ``torch.nn.Linear`` served by ``mixft.ops.matmul``, with an optional fused activation."""

import torch
from torch import Tensor

from mixft.ops import matmul
from mixft.ops.activation import check_activation


def in_autocast_dtype(input: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype of the autocast around this call, as they are where there is none.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor; it is a {type(input).__name__}")
    tensors = [input, *parameters]
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def check_features(input: Tensor, out_features: int, in_features: int) -> None:
    """Raise ValueError unless ``input`` is [..., in_features]."""
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and weight {(out_features, in_features)}; the last dimension of the "
            f"input must be in_features, {in_features}"
        )


def check_input(input: Tensor, weight: Tensor) -> None:
    """Raise ValueError or TypeError unless a layer of ``weight`` [out_features, in_features] takes ``input``."""
    check_features(input, *weight.shape)
    if input.dtype != weight.dtype:
        raise TypeError(
            f"input is {input.dtype} and weight is {weight.dtype}; convert one of them, or use torch.autocast"
        )


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
        fuse_wgrad_accumulation: add the weight's gradient to ``weight.main_grad``, an FP32 tensor of the weight's shape
            that the caller makes, and leave ``weight.grad`` None: the product of each backward adds to it in its own
            pass, unrounded. The names are those of Megatron-LM and Transformer Engine. A ``mixft.amp.GradAccumulator``
            made afterwards takes it for the weight's buffer, unscales and checks it and steps with it; by hand a step
            is ``optimizer.main_grads = {weight: weight.main_grad, ...}`` of a mixft optimizer.

    Raises:
        ValueError: an unknown activation, an input whose last dimension is not ``in_features``, or a weight that lacks
            the ``main_grad`` that its gradient is to be added to.
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
        *,
        fuse_wgrad_accumulation: bool = False,
    ):
        check_activation(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, activation: str | None = None) -> "Linear":
        """A layer that shares the parameters of ``linear``: training one trains the other.

        Of a :class:`mixft.nn.Linear` it also has the activation and ``fuse_wgrad_accumulation``.

        Raises:
            TypeError: ``linear`` is not a ``torch.nn.Linear``.
            ValueError: an unknown activation, or ``linear`` has another one.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear")
        options = {}
        if isinstance(linear, Linear):
            own = linear.activation
            if own is not None and activation not in (None, own):
                raise ValueError(f"activation is {activation!r} and linear has {own!r}; pass None or that")
            activation = activation or own
            options["fuse_wgrad_accumulation"] = linear.fuse_wgrad_accumulation
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, activation, device="meta", **options)
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output, and ``residual`` [..., out_features] added to it after the activation, if given.

        The sum has the dtype that torch's addition would give it: FP32 where ``residual`` is FP32.
        """
        input, weight, bias = in_autocast_dtype(input, self.weight, self.bias)
        check_input(input, weight)
        return matmul(
            input,
            weight.t(),
            bias,
            self.activation,
            None if residual is None else torch.promote_types(input.dtype, residual.dtype),
            residual=residual,
            accumulate_into=self._main_grad() if self.fuse_wgrad_accumulation else None,
        )

    def _main_grad(self) -> Tensor | None:
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return None
        buffer = getattr(self.weight, "main_grad", None)
        if buffer is None:
            raise ValueError(
                "fuse_wgrad_accumulation is on and the weight has no main_grad; set weight.main_grad = "
                "torch.zeros_like(weight, dtype=torch.float32)"
            )
        return buffer.t()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
