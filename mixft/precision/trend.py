"""Running means that tell a sudden change from a slow one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixft.ops.optimizer_state import dequantize_state
from mixft.optim.base import MixedPrecisionOptimizer

DECAY = 0.98  # of the means over steps: they forget within some fifty
READ_DECAY = 0.9  # of the means over reads
# A loss that hardly varies would otherwise spike at every breath.
LEAST_DEVIATION = 0.05


@dataclass
class LossTrend:
    """Exponentially weighted mean and variance of the losses (Finch 2009, "Incremental calculation of weighted mean
    and variance", section 9).

    Attributes:
        count: losses taken in.
        mean: their mean.
        variance: their variance.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def deviations(self, loss: float) -> float:
        """How many standard deviations ``loss`` lies above the mean; a deviation is at least 5% of the mean."""
        deviation = max(math.sqrt(self.variance), LEAST_DEVIATION * abs(self.mean))
        return (loss - self.mean) / deviation if deviation > 0 else 0.0

    def add(self, loss: float) -> None:
        self.count += 1
        # An ordinary mean to begin with, so that the first loss does not outweigh the next ones.
        weight = max(1 - DECAY, 1 / self.count)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)


@dataclass
class MeanTrend:
    """Exponentially weighted means of one figure a layer; FP64 [layers], on the host."""

    decay: float
    count: int = 0
    mean: Tensor | None = None

    def growth(self, values: Tensor) -> Tensor:
        """``values`` over their means; 1 where there is none yet, or it is zero."""
        if self.mean is None:
            return torch.ones_like(values)
        return torch.where(self.mean > 0, values / self.mean, 1.0)

    def add(self, values: Tensor) -> None:
        self.count += 1
        weight = max(1 - self.decay, 1 / self.count)
        self.mean = values.clone() if self.mean is None else self.mean + weight * (values - self.mean)


def has_moments(optimizer: MixedPrecisionOptimizer) -> bool:
    """Whether ``optimizer`` keeps first and second moments, as Adam does."""
    return all("exp_avg_sq" in optimizer.state_names(group) for group in optimizer.param_groups)


@torch.no_grad()
def signal_to_noise(optimizer: MixedPrecisionOptimizer, layers: list[list[Tensor]]) -> Tensor:
    """Of every layer ``|m|^2 / (sum(v) - |m|^2)`` with Adam's bias-corrected moments m of g and v of g^2.

    The signal is the square of the mean gradient, the noise its variance (the ratio of both is the signal-to-noise
    ratio of Kingma and Ba 2015, section 2.1, and, of single parameters, that of Liu et al. 2020,
    https://arxiv.org/abs/2001.07384). Gradients that are nothing but noise give about (1 - beta1) / (2 beta1).

    Returns:
        FP64 [layers] on the host; 0 for a layer that has not been stepped yet. Waits for the device.
    """
    betas = {param: group["betas"] for group in optimizer.param_groups for param in group["params"]}
    sums = []
    for params in layers:
        signal = power = torch.zeros(())
        for param in params:
            state = optimizer.state.get(param, {})
            if "exp_avg" not in state:
                continue
            beta1, beta2 = betas[param]
            first, second, step = _moment(state, "exp_avg"), _moment(state, "exp_avg_sq"), state["step"]
            signal = signal.to(first.device) + first.square().sum() / (1 - beta1**step) ** 2
            power = power.to(first.device) + second.sum() / (1 - beta2**step)
        sums.append(torch.stack([signal, power]).cpu())
    signal, power = torch.stack(sums).double().unbind(1)
    return signal / (power - signal).clamp_min(torch.finfo(torch.float32).tiny)


def _moment(state: dict[str, Tensor], name: str) -> Tensor:
    scales = state.get(f"{name}_scale")
    return state[name].float() if scales is None else dequantize_state(state[name], scales)
