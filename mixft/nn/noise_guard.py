"""How well int8 holds what one layer multiplies, measured now and then while it trains, and when floats take over.

The measure of a feature is its signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - Q(x))^2) over rows; of
a tensor it is the median of its features. The ratio of the whole tensor would not do: where an outlier sets the scale
of a row, the other features are lost, but the outlier makes up nearly all of the norm, so that the ratio stays high.
And a lost feature matters however small it is, because the optimizer divides each weight's gradient by its own size.

The first forward after a backward acts on the figures. A forward inside a backward, as checkpointing runs it, does not:
it has to compute what the first one did.
"""

import warnings
from math import isnan, nan
from numbers import Real

import torch
from torch import Tensor

from mixft.ops.capture import capturing
from mixft.ops.host_copy import HostCopy
from mixft.ops.int8_operands import quantized_rows
from mixft.ops.registration import is_observed

MEASURE_EVERY = 100  # training passes
GPU_LAG = 10  # passes after which a figure is read on a GPU, which has sent it by then; fixed, so that runs agree
SAMPLED_ROWS = 512


def feature_sqnr(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Median over columns of the signal-to-quantization-noise ratio in dB, 0-d on x's device.

    Args:
        x: floating [M, K].
        values: int8 [M, K].
        scale: FP32 [M, 1].

    Returns:
        NaN where no column has a finite ratio; columns of zeros do not count.
    """
    if not x.shape[1]:
        return x.new_full((), nan, dtype=torch.float32)
    x = x.float()
    noise, _ = ((x - values * scale).square().sum(0) / x.square().sum(0)).sort()
    # torch's nanmedian would wait for a GPU. NaN comes last in order.
    middle = ((~noise.isnan()).sum().clamp(min=1) - 1) // 2
    # A column without noise, of zeros and a few exact values, is as good as FP32's own rounding.
    return -10 * noise.gather(0, middle.view(1))[0].clamp(min=2.0**-48).log10()


def check_min_sqnr(decibels: float | None) -> None:
    """Raise TypeError for what is neither None nor a number, ValueError for NaN."""
    if decibels is not None and not isinstance(decibels, Real):
        raise TypeError(f"min_sqnr is {decibels!r}; it must be a number of dB, or None")
    if decibels is not None and isnan(decibels):
        raise ValueError("min_sqnr is NaN; it must be a number of dB, or None")


class NoiseGuard:
    """Measures the operands of one layer every ``MEASURE_EVERY`` training passes, and says what is to run in floats.

    Attributes:
        name: of the layer in messages; set by ``quantize_``.
        passes: training passes so far.
        sqnr: the last figures in dB, by "input", "weight" and "gradient"; the gradient's is the lower of its roundings
            for the two products.
        fallback: "" while all runs as asked, "gradients" where the backward runs in floats, "layer" where all does.
        since: the pass after which it does.
    """

    def __init__(self, minimum: float | None) -> None:
        self.minimum = minimum
        self.name = ""
        self.passes = 0
        self.sqnr: dict[str, float] = {}
        self.fallback = ""
        self.since: int | None = None
        self.measured: dict[str, Tensor] = {}
        self.on_its_way: tuple[list[str], HostCopy] | None = None
        self.read_at = 0
        self.backward_ran = False  # since the last forward, as far as figures wait to be read

    def __getstate__(self) -> dict:
        return {**self.__dict__, "measured": {}, "on_its_way": None}

    def starts_forward(self, input: Tensor) -> None:
        """Act on figures that are due, before the layer computes anything from ``input``."""
        if is_observed() or not self._waits() or torch._C._current_graph_task_id() != -1 or capturing(input.device):
            return
        ran, self.backward_ran = self.backward_ran, False
        if not ran:
            return
        if self.on_its_way is None:
            self.on_its_way = list(self.measured), HostCopy(torch.stack(list(self.measured.values())))
            self.measured = {}
        if self.passes + 1 >= self.read_at:
            self._read(*self.on_its_way)
            self.on_its_way = None

    def _waits(self) -> bool:
        """Whether a figure waits to be read."""
        return bool(self.measured) or self.on_its_way is not None

    def ends_pass(self, output: Tensor) -> bool:
        """Count one training pass, which gave ``output``, and tell whether it is to be measured; what a CUDA graph
        replays is not."""
        if capturing(output.device):
            return False
        self.passes += 1
        measures = self.minimum is not None and self.fallback != "layer" and self.passes % MEASURE_EVERY == 1
        if measures or self._waits():
            output.register_hook(self._note_backward)
        return measures

    def _note_backward(self, _: Tensor) -> None:
        self.backward_ran = True

    @torch.no_grad()
    def measure(
        self,
        x: Tensor,
        quantized_x: tuple[Tensor, Tensor],
        weight: Tensor,
        quantized_weight: tuple[Tensor, Tensor],
        output: Tensor,
        backward: str,
    ) -> None:
        """Measure the input and the weight now, and the gradient of ``output`` when it comes.

        Args:
            x: [M, K] as it is quantized.
            quantized_x: its values and scale.
            weight: [N, K].
            quantized_weight: its values and scale.
            output: [..., N], of a graph.
            backward: what its backward runs in.
        """
        self.read_at = self.passes + (GPU_LAG if x.is_cuda else 1)
        for kind, tensor, (values, scale) in (("input", x, quantized_x), ("weight", weight, quantized_weight)):
            sample = slice(None, None, max(1, len(tensor) // SAMPLED_ROWS))
            self.measured[kind] = feature_sqnr(tensor[sample], values[sample], scale[sample])
        if backward != "16bit":
            self.measure_gradient(output, quantized_weight[1], quantized_x[1] if backward == "int8" else None)

    def measure_gradient(self, output: Tensor, weight_scale: Tensor, x_scale: Tensor | None = None) -> None:
        """Measure the gradient of ``output`` [..., N] when it comes, with ``x_scale`` [M, 1] also for the weight's."""
        self.read_at = self.passes + (GPU_LAG if output.is_cuda else 1)
        output.register_hook(lambda gradient: self._measure_gradient(gradient, x_scale, weight_scale))

    @torch.no_grad()
    def _measure_gradient(self, gradient: Tensor, x_scale: Tensor | None, weight_scale: Tensor) -> None:
        rows = gradient.reshape(gradient.shape[:-1].numel(), gradient.shape[-1])
        sample = slice(None, None, max(1, len(rows) // SAMPLED_ROWS))
        rows = rows[sample].float()
        for_input = rows * weight_scale.view(-1)
        ratio = feature_sqnr(for_input, *quantized_rows(for_input))
        if x_scale is not None:
            for_weight = rows * x_scale[sample]
            values, scale = quantized_rows(for_weight.t())
            ratio = torch.minimum(ratio, feature_sqnr(for_weight, values.t(), scale.t()))
        self.measured["gradient"] = ratio

    def _read(self, kinds: list[str], ratios: HostCopy) -> None:
        figures = dict(zip(kinds, ratios.tolist(), strict=True))
        self.sqnr |= {kind: ratio for kind, ratio in figures.items() if ratio == ratio}
        low = {kind: ratio for kind, ratio in self.sqnr.items() if ratio < self.minimum}
        fallback = "layer" if low.keys() - {"gradient"} else "gradients" if low else self.fallback
        if fallback == self.fallback:
            return
        self.fallback, self.since = fallback, self.passes
        reason = ", ".join(f"{kind} {ratio:.1f} dB" for kind, ratio in low.items())
        what = "products" if fallback == "layer" else "gradients"
        layer = f"layer {self.name!r}" if self.name else "a QuantLinear"
        warnings.warn(
            f"{layer}: signal to quantization noise below {self.minimum:g} dB ({reason}); its {what} run in floats "
            f"from training pass {self.passes + 1} on",
            stacklevel=2,
        )
