"""``LossScaler``: ``torch.amp.GradScaler`` for pure-FP16 training, which says where gradients overflowed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from mixft.ops.capture import capturing

from .floor_watch import FloorWatch
from .gradients import find_overflows, has_gradient, unscale_gradients
from .main_grads import MainGrads
from .overflow import OverflowStep
from .overflow_log import OverflowLog
from .scale_rule import Counters, ScaleRule, check_backoff_factor, check_count, check_growth_factor, check_scales

if TYPE_CHECKING:
    from .grad_accumulator import GradAccumulator

# What GradScaler saves.
ENTRIES = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


class LossScaler(torch.amp.GradScaler):
    """Scale the loss so that FP16 gradients neither overflow nor vanish, and skip the steps where one did overflow.

    A step in which every gradient is finite is taken; ``growth_interval`` of them in a row multiply the scale by
    ``growth_factor``. A NaN or Inf skips the step, changes nothing, and multiplies the scale by ``backoff_factor``
    (Micikevicius et al., Mixed precision training, 2018, section 3.2, with the dynamic rule of their appendix).

    It is a ``GradScaler``, so that whatever asks for one accepts it, with the same methods, the same order of calls and
    the same errors for a wrong order. What differs:

    - ``unscale_`` accepts FP16 gradients.
    - With an optimizer that does the unscaling itself, as mixft's, ``step`` only reads the gradients to find overflows,
      and leaves even that to an optimizer that clips and so reads them anyway; neither ``step`` nor ``update`` waits
      for the device. With any other optimizer ``step`` waits once, as GradScaler's does.
    - ``overflow_report`` names the parameters that overflowed. The check that runs anyway counts the NaN and Inf
      elements of every gradient; of sparse gradients those of their values, and none of tensor subclasses.
    - The scale stays within ``min_scale`` and ``max_scale``, whether it grows, backs off, is set or is loaded; one
      RuntimeWarning, which names parameter and layer, says that it has been at ``min_scale`` for ``patience``
      iterations since a gradient overflowed there. (Not where the step is replayed as a CUDA graph.)
    - ``hysteresis`` overflows go by before the scale backs off, and then every one backs off until the allowance is
      restored: when the scale grows, or with ``consecutive_hysteresis`` at every finite step. These are the rules of
      Megatron-LM's and DeepSpeed's scalers.
    - ``dynamic=False`` keeps the scale as it is; steps that overflow are still skipped.
    - With an optimizer of mixft's, ``scale``, ``step`` and ``update`` can be captured in a CUDA graph, once one step
      before has made what they keep on the device; RuntimeError where that has not been.
    - With an optimizer of mixft's that has ``sharded_over``, and with any whose parameters are DTensors, an overflow in
      one process's shards skips the step and backs off in all; reports name what overflowed in the shards of the
      process that is asked. Of any other optimizer every process checks what gradients it has, alone, as GradScaler
      does: nothing here is a ``ShardedGradScaler``.

    Args:
        init_scale: the first scale. A loss in FP16 itself needs one below 65504, FP16's largest number, which the
            default exceeds: its first step backs off.
        growth_factor: above 1. It and the next two have no effect with ``dynamic=False``, beyond being saved.
        backoff_factor: between 0 and 1.
        growth_interval: finite steps in a row before the scale grows.
        dynamic: False for a scale that never changes by itself.
        min_scale: the least scale, above 0.
        max_scale: the greatest scale.
        hysteresis: which overflow is the first to back off; 1 is GradScaler's rule.
        consecutive_hysteresis: whether only overflows in a row count towards it.
        patience: iterations at ``min_scale`` before the warning.
        enabled: False makes ``step`` call ``optimizer.step`` and everything else do nothing.
        device: device type of the losses, "cuda" or "cpu"; None is "cuda" where there is one.

    Raises:
        TypeError: a factor, interval, scale or count is no number.
        ValueError: a factor, interval or bound outside of the above, or ``init_scale`` outside of the bounds.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        *,
        dynamic: bool = True,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        patience: int = 20,
        enabled: bool = True,
        device: str | None = None,
    ) -> None:
        check_growth_factor(growth_factor)
        check_backoff_factor(backoff_factor)
        for name, count in (("growth_interval", growth_interval), ("hysteresis", hysteresis), ("patience", patience)):
            check_count(name, count)
        check_scales(min_scale, init_scale, max_scale)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(
            device,
            init_scale=float(init_scale),
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            enabled=enabled,
        )
        self._dynamic = dynamic
        self._rule = ScaleRule(float(min_scale), float(max_scale), hysteresis, consecutive_hysteresis)
        self._floor_watch = FloorWatch(patience, self._rule.min_scale)
        self._counters = Counters.fresh(hysteresis)
        self._overflows = OverflowLog()
        self.scaled_sums: WeakSet[MainGrads] = WeakSet()

    @property
    def overflow_steps(self) -> int:
        """Optimizer steps skipped so far; reading it waits for the device."""
        return self._counters.values()["overflow_steps"]

    def overflow_report(self) -> list[tuple[str, int]]:
        """Which parameters overflowed in the last iteration that skipped a step; waits for the device.

        Returns:
            (name, number of NaN and Inf elements in the gradient) of every parameter that had some, in the optimizer's
            order; empty when no step was skipped. Names are those of an optimizer made of
            ``model.named_parameters()``, else such as "group 0, parameter 3 (4, 4)".
        """
        history = self.overflow_history()
        return history[-1].parameters if history else []

    def overflow_history(self) -> list[OverflowStep]:
        """The last 16 iterations that skipped a step, oldest first; waits for the device.

        Returns:
            Of each (iteration, parameters): its number, the first being 1, and what :meth:`overflow_report` would
            have said after it. An optimizer that is gone takes its steps along.
        """
        return self._overflows.history()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by the scale, and look for NaN and Inf; :meth:`step` does so itself.

        Raises:
            RuntimeError: a second call for ``optimizer`` since the last ``update``, or one after ``step``; or it has a
                GradAccumulator, whose sums are unscaled already.
            AssertionError: no loss was scaled.
        """
        if self._enabled and self._accumulator_of(optimizer) is not None:
            raise RuntimeError(
                "the optimizer has a GradAccumulator, whose sums are unscaled already; leave this call out, and clip "
                "with max_grad_norm of mixft's optimizers or the accumulator's clip_grad_norm_"
            )
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step ``optimizer`` unless one of its gradients is NaN or Inf; unscale them first where that was not done.

        Args:
            optimizer: an optimizer whose gradients come from a scaled loss.
            args, kwargs: passed on to ``optimizer.step``; a closure is refused.

        Returns:
            What ``optimizer.step`` returns; None when it was not called.

        Raises:
            RuntimeError: a second call for ``optimizer`` since the last ``update``, or a closure.
            AssertionError: no loss was scaled, or ``optimizer`` has no gradients.
            ValueError: ``optimizer`` has a GradAccumulator that was made for another scaler.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if any(map(callable, args)):
            raise RuntimeError(
                "a closure cannot be used with an enabled LossScaler: it would scale no loss; run the backward of the "
                "scaled loss before step"
            )
        accumulator = self._accumulator_of(optimizer)
        if accumulator is not None:
            self._check_scale_growth_tracker("step")
            if self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                # Its buffers hold no scale any more.
                super().unscale_(optimizer)
        try:
            result = super().step(optimizer, *args, **kwargs)
        except BaseException:
            # Left there, they would scale and skip the steps after.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise
        self._note_step(optimizer)
        if accumulator is not None:
            accumulator.reset()
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adapt the scale to the steps since the last call; call it once an iteration, after every ``step``.

        Args:
            new_scale: a scale to set instead, brought within ``min_scale`` and ``max_scale``: a number, or a
                one-element tensor on the scaler's device type.

        Raises:
            AssertionError: no loss was scaled, no step taken, or ``new_scale`` is an unfit tensor.
        """
        if not self._enabled:
            return
        self._check_scale_growth_tracker("update")
        with self._scale_changing():
            self._update_scale(new_scale)
        self._counters["iteration"].add_(1)
        if self._dynamic:
            self._floor_watch.look(self._counters["floor_steps"], self._overflows.rings)

    def _update_scale(self, new_scale: float | Tensor | None) -> None:
        if new_scale is not None:
            if isinstance(new_scale, int):
                new_scale = float(new_scale)
            elif isinstance(new_scale, Tensor) and new_scale.numel() == 1:
                new_scale = new_scale.reshape(())
            super().update(new_scale)
            self._rule.confine(self._scale)
        else:
            found = [value for state in self._per_optimizer_states.values() for value in self._found_of(state)]
            if not found:
                raise AssertionError("No inf checks were recorded prior to update.")
            if self._dynamic:
                factors = self._growth_factor, self._backoff_factor, self._growth_interval
                self._rule.adapt(self._scale, self._growth_tracker, self._counters, _any(found), *factors)
            self._per_optimizer_states.clear()

    @contextmanager
    def _scale_changing(self) -> Iterator[None]:
        """Within, the scale may change: sums that hold it are brought to the new one afterwards."""
        holding = [sums for sums in self.scaled_sums if sums.summed and not sums.settled]
        before = self._scale.clone() if holding else None
        yield
        for sums in holding:
            sums.rescale_(self._scale / before)

    def inverse_scale(self) -> Tensor | None:
        """1 / scale, 0-d FP32 on the scale's device, without waiting for it; None where the scaler is not enabled.

        Raises:
            AssertionError: no loss was scaled.
        """
        if not self._enabled:
            return None
        scale, _ = self._check_scale_growth_tracker("inverse_scale")
        # As GradScaler.unscale_ computes it.
        return scale.double().reciprocal().float()

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the growth factor; TypeError unless it is a number, ValueError unless it is above 1."""
        check_growth_factor(new_factor)
        super().set_growth_factor(new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the backoff factor; TypeError unless it is a number, ValueError unless it is between 0 and 1."""
        check_backoff_factor(new_factor)
        super().set_backoff_factor(new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the growth interval; TypeError unless it is a number, ValueError unless it is at least 1."""
        check_count("growth_interval", new_interval)
        super().set_growth_interval(new_interval)

    def state_dict(self) -> dict[str, Any]:
        """GradScaler's entries, which a GradScaler can load, and this class's own; empty when not enabled."""
        if not self._enabled:
            return {}
        own = self._options() | self._counters.values()
        return super().state_dict() | own | {"overflow_history": list(map(tuple, self.overflow_history()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, here or in a GradScaler; entries that only this class has may be missing.

        Raises:
            RuntimeError: ``state_dict`` is empty, as a disabled scaler's is.
            ValueError: it lacks an entry that a GradScaler's has; nothing is changed.
        """
        if not self._enabled:
            return
        missing = [name for name in ENTRIES if name not in state_dict]
        if state_dict and missing:
            raise ValueError(f"state_dict lacks {', '.join(missing)}; it must be what a scaler's state_dict() gave")
        own = {name: state_dict.get(name, value) for name, value in self._options().items()}
        if state_dict:
            scale = min(max(state_dict["scale"], own["min_scale"]), own["max_scale"])
            state_dict = state_dict | {"scale": scale}
        with self._scale_changing():
            super().load_state_dict(state_dict)
        self._dynamic = own.pop("dynamic")
        self._floor_watch = FloorWatch(own.pop("patience"), own["min_scale"])
        self._rule = ScaleRule(**own)
        fresh = Counters.fresh(self._rule.hysteresis).initial
        self._counters.load({name: state_dict.get(name, value) for name, value in fresh.items()})
        self._overflows = OverflowLog(OverflowStep(*step) for step in state_dict.get("overflow_history", []))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_counters": Counters(self._counters.values()), "scaled_sums": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"scaled_sums": WeakSet()})

    def _options(self) -> dict[str, Any]:
        return {"dynamic": self._dynamic, "patience": self._floor_watch.patience} | asdict(self._rule)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        # Of a device type only, where a scaler is started without a loss.
        if capturing(torch.device(dev)):
            raise RuntimeError(
                "this scaler has no scale yet, and every replay of this CUDA graph would begin with its first; take "
                "one step before the capture"
            )
        super()._lazy_init_scale_growth_tracker(dev)
        self._counters.place(dev)

    def _note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count and attribute what the step of ``optimizer`` found."""
        state = self._per_optimizer_states[id(optimizer)]
        if state.get("found_by_step"):
            state["nonfinite"] = optimizer.last_nonfinite
        if state.get("found_by_step") or getattr(optimizer, "sharded_over", None) is not None:
            # Before the step only what this process has found was known.
            state["found_inf_per_device"] = {optimizer.last_found_inf.device: optimizer.last_found_inf}
        found = self._found_of(state)
        if not found:
            return
        overflowed = _any(found) > 0
        self._counters["overflow_steps"].add_(overflowed)
        self._overflows.record(optimizer, state["nonfinite"], overflowed, self._counters["iteration"])

    def _accumulator_of(self, optimizer: torch.optim.Optimizer) -> "GradAccumulator | None":
        accumulator = getattr(optimizer, "grad_accumulator", None)
        if accumulator is not None and accumulator.scaler is not self:
            raise ValueError("the optimizer has a GradAccumulator that was made without this scaler; give it this one")
        return accumulator

    def _found_of(self, state: dict[str, Any]) -> list[Tensor]:
        """What was found for one optimizer, on the scale's device."""
        return [found.to(self._scale.device, non_blocking=True) for found in state["found_inf_per_device"].values()]

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        accumulator = self._accumulator_of(optimizer)
        if accumulator is not None:
            self._per_optimizer_states[id(optimizer)]["nonfinite"] = accumulator.counts()
            return accumulator.found_inf_per_device()
        found, nonfinite = unscale_gradients(optimizer, inv_scale, found_inf)
        self._per_optimizer_states[id(optimizer)]["nonfinite"] = nonfinite
        return found

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        self._check_scale_growth_tracker("_check_inf_per_device")
        state = self._per_optimizer_states[id(optimizer)]
        if getattr(optimizer, "finds_overflows", False):
            state["found_by_step"] = has_gradient(optimizer)
            found = {self._scale.device: torch.zeros_like(self._scale)} if state["found_by_step"] else {}
            nonfinite = []
        else:
            found, nonfinite = find_overflows(optimizer)
        state["found_inf_per_device"], state["nonfinite"] = found, nonfinite
        return found


def _any(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.stack(found).amax(0)
