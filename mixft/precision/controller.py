"""``PrecisionController``: layers that go to FP32 when 16 bits do not do, and back."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mixft.optim.base import MixedPrecisionOptimizer

from .casting import check_model, check_optimizer, parameters_of
from .diagnosis import Diagnosis, Symptom, Thresholds
from .event import PrecisionEvent
from .layout import Layout
from .policy import NAMES
from .record import Rows, StepRecord
from .recovery import Recovery
from .trend import has_moments
from .watch import OutputWatch


class PrecisionController:
    """Raise a 16-bit layer to FP32 when it needs that, and lower it again when it does not.

    ::

        controller = mixft.PrecisionController(model, optimizer, scaler)
        for batch in batches:
            loss = compute_loss(model(batch))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            controller.step(loss)            # the loss as it was, and before the gradients are cleared
            optimizer.zero_grad()
        print(*controller.events, sep="\\n")

    A layer is a module with 16-bit parameters of its own that the optimizer trains. The model is one that a
    :class:`mixft.PrecisionPolicy` was applied to, or simply one in FP16 or BF16. It is raised

    - on a **gradient overflow**: ``overflow_limit`` steps within ``overflow_window`` whose gradients held a NaN or Inf
      while the loss was finite. Backward runs from the loss to the input and carries a NaN along, so the overflow is
      counted for the last module of the forward pass that shows it. One overflow every now and then is how a loss
      scale is found (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740) and raises nothing. Figures:
      ``steps``, ``nonfinite`` (elements).
    - on an **activation overflow**: as many steps whose loss was a NaN or Inf. No loss scale helps here. The outputs
      of all modules are then looked at for ``interval`` steps, and the first one that is not finite is raised, while
      the scale is set back to what it was before. Figures: ``steps``, ``loss_scale`` (where there is a scaler).
    - on a **loss spike**: a loss more than ``spike_deviations`` standard deviations above its running mean. It is
      blamed on the layer whose share of the squared gradient norm grew most against its own mean. Figures: ``loss``,
      ``mean``, ``deviations``, ``growth``.
    - when its **signal-to-noise** ratio, taken from Adam's moments, falls below ``snr_drop`` of its running mean.
      Figures: ``ratio``, ``mean``.

    What is in FP32 and overflows still has its surroundings raised instead: outputs go back to 16 bits there. A raised
    module is lowered

    - when it is **calm**: none of this for ``calm_steps``, twice as many after every further time that it was raised.
      Figures: ``steps``.
    - when **memory** is short: less than ``memory_reserve`` of the device's is free; one module a read, the one that
      has been calm the longest, and only overflows raise meanwhile. Figures: ``free``.

    Raising takes the FP32 master's value, bit for bit; lowering keeps the FP32 value as the master, bit for bit
    (with ``master_weights="split"`` as exact as the split, with "none" rounded). Moments and step counts stay, and so
    do the parameter objects, so learning rate schedulers and references go on working. Nothing waits for the device
    but every ``interval`` steps, when the figures noted on it are read; each step reads the gradients once.

    Clip inside the optimizer (``max_grad_norm``), not with ``torch.nn.utils.clip_grad_norm_``: that spreads one NaN to
    all gradients. Every process decides alone, so this is not for distributed training. A model under
    ``torch.compile`` is compiled anew after a switch, and its activation overflows cannot be placed.

    Args:
        model: a model with 16-bit parameters.
        optimizer: one of mixft's, over parameters of ``model``.
        scaler: the loss scaler in use, a ``torch.amp.GradScaler`` such as :class:`mixft.amp.LossScaler`.
        interval: steps between reads.
        overflow_limit: overflows that are too many.
        overflow_window: within so many steps.
        spike_deviations: None for no cause of this kind. None either in the first ``warmup_steps``.
        snr_drop: between 0 and 1; None for no cause of this kind. Needs Adam's moments.
        calm_steps: None never lowers for calm.
        memory_reserve: between 0 and 1; None never lowers for memory.
        warmup_steps: steps before spikes and signal-to-noise count.

    Attributes:
        events: every switch so far, a list of :class:`mixft.precision.PrecisionEvent`.

    Raises:
        TypeError: ``model`` is no module or has DTensors, ``optimizer`` is not one of mixft's, or ``scaler`` no
            GradScaler.
        ValueError: an argument out of range, ``optimizer`` trains no 16-bit parameter of ``model``, or ``snr_drop``
            with an optimizer that keeps no second moments.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MixedPrecisionOptimizer,
        scaler: torch.amp.GradScaler | None = None,
        *,
        interval: int = 10,
        overflow_limit: int = 3,
        overflow_window: int = 100,
        spike_deviations: float | None = 6.0,
        snr_drop: float | None = 0.25,
        calm_steps: int | None = 500,
        memory_reserve: float | None = 0.05,
        warmup_steps: int = 50,
    ) -> None:
        check_model(model)
        check_optimizer(optimizer)
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler is a {type(scaler).__name__}; it must be a torch.amp.GradScaler, or None")
        steps = {"interval": interval, "overflow_limit": overflow_limit, "overflow_window": overflow_window}
        for name, count in (steps if calm_steps is None else steps | {"calm_steps": calm_steps}).items():
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it must not be negative")
        if spike_deviations is not None and not spike_deviations > 0:
            raise ValueError(f"spike_deviations is {spike_deviations}; it must be positive, or None")
        for name, share in (("snr_drop", snr_drop), ("memory_reserve", memory_reserve)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share}; it must be between 0 and 1, or None")
        if snr_drop is not None and not has_moments(optimizer):
            raise ValueError(
                f"snr_drop needs second moments, which {type(optimizer).__name__} does not keep; pass None"
            )
        self._layout = Layout(model, optimizer)
        layers = self._layout.layers({param for param in parameters_of(optimizer) if param.requires_grad})
        if not layers:
            raise ValueError("optimizer trains no 16-bit parameter of model; apply a PrecisionPolicy to it first")
        self._diagnosis = Diagnosis(
            layers,
            optimizer,
            Thresholds(overflow_limit, overflow_window, spike_deviations, snr_drop, warmup_steps),
        )
        self._record = StepRecord([param for params in layers.values() for param in params], interval)
        self._watch = OutputWatch(self._layout.modules)
        self._scaler = scaler
        self._sound_scale: float | None = None
        self._recovery = Recovery(calm_steps, memory_reserve)
        self._step = 0
        self.events: list[PrecisionEvent] = []

    @property
    def raised(self) -> list[str]:
        """Names of the modules that are in FP32 now because they were raised."""
        return list(self._layout.raised)

    @torch.no_grad()
    def step(self, loss: Tensor) -> list[PrecisionEvent]:
        """Note one step of training; every ``interval`` steps, decide.

        Args:
            loss: the unscaled loss, one element.

        Returns:
            The switches made now.

        Raises:
            TypeError: ``loss`` is no tensor.
            ValueError: ``loss`` has not one element.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss is a {type(loss).__name__}; it must be the loss tensor, before scaling")
        if loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}; it must hold one element")
        self._step += 1
        self._record.add(loss)
        if not self._watch.counting:
            self._watch.stop()
        known = len(self.events)
        if self._record.full:
            rows = self._record.rows()
            self._record.clear()
            self._decide(rows)
        return self.events[known:]

    def _decide(self, rows: Rows) -> None:
        too_little_free = self._recovery.too_little_free(self._record.params[0].device)
        symptoms = self._diagnosis.read(rows, self._step, self._watch.order, self._layout.in_fp32)
        if too_little_free is not None:
            symptoms = [symptom for symptom in symptoms if symptom.cause == "gradient overflow"]
        if not rows.losses.isfinite().all():
            symptoms += self._activation_overflow()
        else:
            self._watch.stop()
            if self._scaler is not None and self._scaler.is_enabled():
                self._sound_scale = self._scaler.get_scale()
        in_fp32 = {symptom.layer for symptom in symptoms if self._layout.in_fp32(symptom.layer)}
        for symptom in symptoms:
            self._raise(symptom, symptom.layer in in_fp32)
        for reason in self._recovery.due(self.raised, self._step, too_little_free):
            self._lower(reason)

    def _activation_overflow(self) -> list[Symptom]:
        lost = self._diagnosis.lost_steps(self._step)
        first = self._watch.first_nonfinite() if self._watch.counting else None
        self._watch.start_counting()
        if first is None or lost < self._diagnosis.thresholds.overflow_limit:
            return []
        self._diagnosis.lost = []
        figures = {"steps": lost}
        if self._sound_scale is not None:
            # The steps that were lost took the scale down, for nothing.
            self._scaler.update(self._sound_scale)
            figures["loss_scale"] = self._sound_scale
        return [Symptom("activation overflow", first, figures)]

    def _raise(self, symptom: Symptom, was_in_fp32: bool) -> None:
        name: str | None = symptom.layer
        if self._layout.in_fp32(name):
            # Raised a moment ago, by another symptom, it has been served.
            name = self._layout.around(name, self._watch.order) if was_in_fp32 else None
        if name is None:
            return
        self._layout.raise_(name)
        self._recovery.note_raised(name, self._step)
        low = NAMES[self._layout.low_dtype(name)]
        self.events.append(PrecisionEvent(self._step, name, symptom.cause, low, "fp32", symptom.figures))

    def _lower(self, reason: Symptom) -> None:
        self._layout.lower(reason.layer)
        low = NAMES[self._layout.low_dtype(reason.layer)]
        self.events.append(PrecisionEvent(self._step, reason.layer, reason.cause, "fp32", low, reason.figures))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decisions depend on, the events included; waits for the device."""
        return {
            "step": self._step,
            "raised": self.raised,
            **self._recovery.state_dict(),
            "sound_scale": self._sound_scale,
            "order": list(self._watch.order),
            "counting": self._watch.counting,
            "rows": vars(self._record.rows()),
            "diagnosis": self._diagnosis.state_dict(),
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, on a model and an optimizer made as those were.

        Raised modules are raised at once, so call this **before** the state of model and optimizer is loaded: their
        FP32 values then find FP32 parameters.

        Raises:
            ValueError: a raised module is not in the model, or more steps are noted than ``interval``.
        """
        unknown = [name for name in state_dict["raised"] if name not in self._layout.modules]
        if unknown:
            raise ValueError(
                f"the loaded state has {unknown[0]!r} raised, which the model lacks; build it as the saved one was"
            )
        rows = Rows(**state_dict["rows"])
        self._record.load(rows)
        self._layout.set_raised(state_dict["raised"])
        self._step = state_dict["step"]
        self._recovery.load_state_dict(state_dict)
        self._sound_scale = state_dict["sound_scale"]
        self._watch.order = {name: place for place, name in enumerate(state_dict["order"])}
        self._watch.stop()
        if state_dict["counting"]:
            self._watch.start_counting()
        self._diagnosis.load_state_dict(state_dict["diagnosis"])
        self.events = [PrecisionEvent(**event) for event in state_dict["events"]]
