"""Training through a frozen int8 weight: what the gradient of the input is computed in, and when floats take over."""

from dataclasses import asdict, dataclass

from torch import Tensor

from mixft.ops.int8_input_gradient import FrozenBackward, check_frozen_backward
from mixft.ops.registration import is_observed

from .noise_guard import NoiseGuard, check_min_sqnr


@dataclass(frozen=True)
class FrozenOptions:
    """How a gradient passes a layer whose weight is kept in int8.

    Attributes:
        backward: "int8", "16bit" or "exact", see :func:`mixft.ops.dynamic_int8_linear`. None is "int8" where the
            forward multiplies in int8 alone, and "exact" where it takes floats: in mode "weight_only", and under an
            ``outlier_threshold``.
        min_sqnr: the median signal-to-quantization-noise ratio of the gradient's features in dB below which "int8"
            goes on as "16bit"; see ``mixft.nn.noise_guard``. None measures nothing.

    Raises:
        ValueError: an unknown ``backward``, or a ``min_sqnr`` that is NaN.
        TypeError: a ``min_sqnr`` that is no number.
    """

    backward: FrozenBackward | None = None
    min_sqnr: float | None = 10.0

    def __post_init__(self):
        if self.backward is not None:
            check_frozen_backward(self.backward)
        check_min_sqnr(self.min_sqnr)


class FrozenTraining:
    """What one layer was asked to do in its backward, and how well int8 does.

    Args:
        options: as given for the layer.
        floats: whether its forward takes floats.
    """

    def __init__(self, options: FrozenOptions, floats: bool):
        self.options = options
        self.guard = NoiseGuard(options.min_sqnr)
        self._unasked: FrozenBackward = "exact" if floats else "int8"

    @property
    def backward(self) -> FrozenBackward:
        """What the gradient is computed in, the guard's fallback included."""
        asked = self.options.backward or self._unasked
        return "16bit" if asked == "int8" and self.guard.fallback else asked

    def saved_options(self) -> dict:
        """The options that are not the defaults."""
        default = asdict(FrozenOptions())
        return {name: value for name, value in asdict(self.options).items() if value != default[name]}

    def watch(self, output: Tensor, weight_scale: Tensor) -> None:
        """Count a training pass that nothing traces, and measure the gradient of ``output`` [..., N] now and then."""
        if not is_observed() and self.guard.ends_pass(output):
            self.guard.measure_gradient(output, weight_scale)
