"""The ``train`` mode of ``QuantLinear``: a floating-point weight whose products run in int8 where that gains."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixft.ops import training_int8_linear
from mixft.ops.registration import is_observed
from mixft.ops.training_int8_linear import Backward, check_backward
from mixft.ops.validation import FLOATS

from .int8_cache import WeightCache, shared_input
from .noise_guard import NoiseGuard, check_min_sqnr

LEAST_ROWS = 32
LEAST_PRODUCTS = 2**23


@dataclass(frozen=True)
class TrainingOptions:
    """How a layer in ``train`` mode trains.

    Attributes:
        backward: what runs in int8 beside the forward: "int8" both gradients, "weight_grad_16bit" that of the input,
            "16bit" neither; see :func:`mixft.ops.training_int8_linear`.
        stochastic: round gradients to int8 at random, so that their mean is kept, with torch's generator.
        shape_gating: whether an input with which int8 would be slower is multiplied in floats; see :func:`gains`.
        min_sqnr: the median signal-to-quantization-noise ratio of features in dB below which the layer, or its
            backward, goes on in floats; see ``mixft.nn.noise_guard``. None measures nothing.

    Raises:
        ValueError: an unknown ``backward``, or a ``min_sqnr`` that is NaN.
        TypeError: a ``min_sqnr`` that is no number.
    """

    backward: Backward = "int8"
    stochastic: bool = False
    shape_gating: bool = True
    min_sqnr: float | None = 10.0

    def __post_init__(self):
        check_backward(self.backward)
        check_min_sqnr(self.min_sqnr)


def gains(rows: int, in_features: int, out_features: int, device: torch.device) -> bool:
    """Whether three int8 products and their quantization take less time than three products of floats.

    Up to 32 rows a product does little more than read the weight, which quantizing it does as well. On a CPU with VNNI
    beside FP32 the border was found at 2^23 multiplications and as many rows, from layers of 128 to 1024 features.
    """
    if rows < LEAST_ROWS:
        return False
    return device.type != "cpu" or rows * in_features * out_features >= LEAST_PRODUCTS


class Int8Training:
    """The products of one layer, and what it remembers between calls: a quantized weight and how well int8 does."""

    def __init__(self, options: TrainingOptions):
        self.options = options
        self.guard = NoiseGuard(options.min_sqnr)
        self.weight_cache = WeightCache()

    @property
    def backward(self) -> Backward:
        """What the backward runs in, the guard's fallback included."""
        return "16bit" if self.guard.fallback else self.options.backward

    def saved_options(self) -> dict:
        """All options."""
        return asdict(self.options)

    def __call__(self, source: Tensor, input: Tensor, parameter: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, differentiable in input, weight and bias.

        Args:
            source: what the layer was given.
            input: ``source`` in the dtype to compute in.
            parameter: the layer's own, [N, K] or [K, N].
            weight: it as [N, K].
            bias: [N] or None.
        """
        self.guard.starts_forward(input)
        options = {"backward": self.backward, "stochastic": self.options.stochastic}
        fits = input.dim() > 0 and input.shape[-1] == weight.shape[1]
        fits = fits and input.dtype in FLOATS and weight.dtype in FLOATS
        if fits and (self.guard.fallback == "layer" or self._gated(input, weight)):
            return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        # What a compiler or transform traces is neither measured nor kept.
        if not fits or is_observed():
            return training_int8_linear(input, weight, bias, **options)
        quantized_x = shared_input.quantized(self, source, input)
        quantized_weight = self.weight_cache.quantized(parameter, weight)
        output = training_int8_linear(
            input, weight, bias, **options, quantized_x=quantized_x, quantized_weight=quantized_weight
        )
        if output.requires_grad and self.guard.ends_pass(output):
            rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])
            self.guard.measure(rows, quantized_x, weight, quantized_weight, output, self.backward)
        return output

    def _gated(self, input: Tensor, weight: Tensor) -> bool:
        rows = math.prod(input.shape[:-1])
        if isinstance(rows, torch.SymInt):
            return False  # a program that torch.export makes for any number of them
        return self.options.shape_gating and not gains(rows, weight.shape[1], weight.shape[0], weight.device)
