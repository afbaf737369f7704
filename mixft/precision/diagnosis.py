"""What is wrong with a layer, read off the losses and gradients of some steps."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixft.optim.base import MixedPrecisionOptimizer

from .record import Rows
from .trend import DECAY, READ_DECAY, LossTrend, MeanTrend, signal_to_noise

# Reads after which a layer's usual signal-to-noise ratio is known.
LEAST_READS = 5


@dataclass(frozen=True)
class Symptom:
    """A reason to raise a layer, or to lower it; the fields are those of :class:`mixft.precision.PrecisionEvent`."""

    cause: str
    layer: str
    figures: dict[str, float]


@dataclass
class Thresholds:
    """The arguments of the same names of :class:`mixft.PrecisionController`."""

    overflow_limit: int
    overflow_window: int
    spike_deviations: float | None
    snr_drop: float | None
    warmup_steps: int


@dataclass
class Diagnosis:
    """The symptoms of a run, and what of its past they depend on.

    Attributes:
        layers: the parameters of every layer by its name; the columns of the rows are theirs, in order.
        optimizer: whose moments tell the signal-to-noise ratio.
        thresholds: when something counts.
        overflows: by layer, the steps at which its gradients overflowed first, and how many elements.
        lost: steps with a NaN or Inf for a loss.
    """

    layers: dict[str, list[Tensor]]
    optimizer: MixedPrecisionOptimizer
    thresholds: Thresholds
    overflows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    loss: LossTrend = field(default_factory=LossTrend)
    shares: MeanTrend = field(default_factory=lambda: MeanTrend(DECAY))
    ratios: MeanTrend = field(default_factory=lambda: MeanTrend(READ_DECAY))

    def read(self, rows: Rows, last_step: int, order: dict[str, int], in_fp32: Callable[[str], bool]) -> list[Symptom]:
        """Take in the steps up to ``last_step`` and say what they show, but for activation overflows.

        Args:
            rows: the steps.
            last_step: number of the last of them.
            order: of the modules in the forward pass; a module that is not in it counts as first.
            in_fp32: whether a layer is in FP32; only overflows are told of such a one.
        """
        names = list(self.layers)
        squares, nonfinite = self._by_layer(rows.squares.double()), self._by_layer(rows.nonfinite)
        spikes = []
        first_step = last_step - len(rows.losses) + 1
        for step, loss, powers, counts in zip(
            range(first_step, last_step + 1), rows.losses.tolist(), squares, nonfinite.tolist(), strict=True
        ):
            if not math.isfinite(loss):
                self.lost.append(step)
                continue
            bad = [name for name, count in zip(names, counts, strict=True) if count]
            if bad:
                origin = max(bad, key=lambda name: order.get(name, -1))
                self.overflows.setdefault(origin, []).append((step, counts[names.index(origin)]))
            elif 0 < powers.sum() < math.inf:
                spikes += self._spike(step, loss, powers / powers.sum(), in_fp32)
            self.loss.add(loss)
        return [*self._gradient_overflows(last_step), *spikes, *self._noise(last_step, in_fp32)]

    def lost_steps(self, last_step: int) -> int:
        """How many of the last ``overflow_window`` steps had a NaN or Inf for a loss."""
        self.lost = [step for step in self.lost if step > last_step - self.thresholds.overflow_window]
        return len(self.lost)

    def _by_layer(self, columns: Tensor) -> Tensor:
        sizes = [len(params) for params in self.layers.values()]
        return torch.stack([part.sum(1) for part in columns.split(sizes, dim=1)], dim=1)

    def _gradient_overflows(self, last_step: int) -> list[Symptom]:
        found = []
        for name in list(self.overflows):
            recent = [
                (step, count)
                for step, count in self.overflows[name]
                if step > last_step - self.thresholds.overflow_window
            ]
            if len(recent) >= self.thresholds.overflow_limit:
                figures = {"steps": len(recent), "nonfinite": sum(count for _, count in recent)}
                found.append(Symptom("gradient overflow", name, figures))
                recent = []
            self.overflows[name] = recent
        return found

    def _spike(self, step: int, loss: float, shares: Tensor, in_fp32: Callable[[str], bool]) -> list[Symptom]:
        growth = self.shares.growth(shares).tolist()
        self.shares.add(shares)
        limit, deviations = self.thresholds.spike_deviations, self.loss.deviations(loss)
        if limit is None or step <= self.thresholds.warmup_steps or deviations <= limit:
            return []
        candidates = {name: grown for name, grown in zip(self.layers, growth, strict=True) if not in_fp32(name)}
        if not candidates:
            return []
        name = max(candidates, key=candidates.get)
        figures = {"loss": loss, "mean": self.loss.mean, "deviations": deviations, "growth": candidates[name]}
        return [Symptom("loss spike", name, figures)]

    def _noise(self, last_step: int, in_fp32: Callable[[str], bool]) -> list[Symptom]:
        drop = self.thresholds.snr_drop
        if drop is None:
            return []
        ratios = signal_to_noise(self.optimizer, list(self.layers.values()))
        growth, means, reads = self.ratios.growth(ratios), self.ratios.mean, self.ratios.count
        self.ratios.add(ratios)
        if reads < LEAST_READS or last_step <= self.thresholds.warmup_steps:
            return []
        return [
            Symptom("signal-to-noise", name, {"ratio": ratio, "mean": mean})
            for name, ratio, mean, grown in zip(
                self.layers, ratios.tolist(), means.tolist(), growth.tolist(), strict=True
            )
            if grown < drop and not in_fp32(name)
        ]

    def state_dict(self) -> dict[str, Any]:
        trends = {"loss": asdict(self.loss), "shares": asdict(self.shares), "ratios": asdict(self.ratios)}
        return {
            "overflows": {name: list(seen) for name, seen in self.overflows.items()},
            "lost": list(self.lost),
            **trends,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.overflows = {name: [tuple(pair) for pair in seen] for name, seen in state["overflows"].items()}
        self.lost = list(state["lost"])
        self.loss = LossTrend(**state["loss"])
        self.shares, self.ratios = MeanTrend(**state["shares"]), MeanTrend(**state["ratios"])
