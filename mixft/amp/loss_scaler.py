"""``LossScaler``: ``torch.amp.GradScaler`` for pure-FP16 training."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mixft.ops import grad_stats, unscale_
from mixft.ops.validation import FLOATS


class LossScaler(torch.amp.GradScaler):
    """Scale the loss so that FP16 gradients neither overflow nor vanish, and skip the steps where one did overflow.

    A step in which every gradient is finite is taken; ``growth_interval`` of them in a row multiply the scale by
    ``growth_factor``. A NaN or Inf skips the step, changes nothing, and multiplies the scale by ``backoff_factor``
    (Micikevicius et al., Mixed precision training, 2018, section 3.2, with the dynamic rule of their appendix).

    It is a ``GradScaler``, so that whatever asks for one accepts it, with the same methods, the same order of calls and
    the same errors for a wrong order. What differs:

    - ``unscale_`` accepts FP16 gradients.
    - With an optimizer that does the unscaling itself, as ``mixft.optim.AdamW``, ``step`` only reads the gradients to
      find overflows, and neither ``step`` nor ``update`` waits for the device. With any other optimizer ``step``
      waits once, as GradScaler's does.
    - The scale stays within ``min_scale`` and ``max_scale``, whether it grows, backs off, is set or is loaded.
    - ``dynamic=False`` keeps the scale as it is; steps that overflow are still skipped.
    - ``overflow_steps`` counts the skipped optimizer steps.

    Args:
        init_scale: the first scale. A loss in FP16 itself needs one below 65504, FP16's largest number, which the
            default exceeds: its first step backs off.
        growth_factor: above 1. It and the next two have no effect with ``dynamic=False``, beyond being saved.
        backoff_factor: between 0 and 1.
        growth_interval: finite steps in a row before the scale grows.
        dynamic: False for a scale that never changes by itself.
        min_scale: the least scale, above 0.
        max_scale: the greatest scale.
        enabled: False makes ``step`` call ``optimizer.step`` and everything else do nothing.
        device: device type of the losses, "cuda" or "cpu"; None is "cuda" where there is one.

    Raises:
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
        enabled: bool = True,
        device: str | None = None,
    ) -> None:
        if not growth_factor > 1:
            raise ValueError(f"growth_factor must be above 1; it is {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1; it is {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1; it is {growth_interval}")
        if not 0 < min_scale <= init_scale <= max_scale < float("inf"):
            raise ValueError(
                "0 < min_scale <= init_scale <= max_scale must hold with a finite max_scale; they are "
                f"{min_scale}, {init_scale} and {max_scale}"
            )
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
        self._min_scale = float(min_scale)
        self._max_scale = float(max_scale)
        self._init_overflow_steps = 0
        self._overflow_steps: Tensor | None = None

    @property
    def overflow_steps(self) -> int:
        """Optimizer steps skipped so far; reading it waits for the device."""
        return self._init_overflow_steps if self._overflow_steps is None else int(self._overflow_steps)

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
        """
        result = super().step(optimizer, *args, **kwargs)
        if self._enabled:
            found = self._found_inf_per_device(optimizer).values()
            local = [found_inf.to(self._overflow_steps.device, non_blocking=True) for found_inf in found]
            if local:
                self._overflow_steps.add_(torch.stack(local).any())
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
        fixed = self._scale.clone() if self._scale is not None and not self._dynamic else None
        if isinstance(new_scale, int):
            new_scale = float(new_scale)
        elif isinstance(new_scale, Tensor) and new_scale.numel() == 1:
            new_scale = new_scale.reshape(())
        super().update(new_scale)
        if fixed is not None and new_scale is None:
            self._scale.copy_(fixed)
        self._scale.clamp_(self._min_scale, self._max_scale)

    def state_dict(self) -> dict[str, Any]:
        """GradScaler's entries, which a GradScaler can load, and this class's own; empty when not enabled."""
        if not self._enabled:
            return {}
        return super().state_dict() | {
            "dynamic": self._dynamic,
            "min_scale": self._min_scale,
            "max_scale": self._max_scale,
            "overflow_steps": self.overflow_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, here or in a GradScaler; entries that only this class has may be missing.

        Raises:
            RuntimeError: ``state_dict`` is empty, as a disabled scaler's is.
        """
        if not self._enabled:
            return
        lowest = state_dict.get("min_scale", self._min_scale)
        highest = state_dict.get("max_scale", self._max_scale)
        if state_dict:
            state_dict = state_dict | {"scale": min(max(state_dict["scale"], lowest), highest)}
        super().load_state_dict(state_dict)
        self._min_scale, self._max_scale = lowest, highest
        self._dynamic = state_dict.get("dynamic", self._dynamic)
        self._init_overflow_steps = state_dict.get("overflow_steps", 0)
        if self._overflow_steps is not None:
            self._overflow_steps.fill_(self._init_overflow_steps)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_init_overflow_steps": self.overflow_steps, "_overflow_steps": None}

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._overflow_steps = torch.full((), self._init_overflow_steps, dtype=torch.int64, device=dev)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = {}
        for device, (ours, others) in _gradients(optimizer).items():
            found[device] = found_inf.to(device, non_blocking=True, copy=True)
            local_inv_scale = inv_scale.to(device, non_blocking=True)
            unscale_(ours, local_inv_scale, found[device])
            for same in others:
                torch._amp_foreach_non_finite_check_and_unscale_(same, found[device], local_inv_scale)
        return found

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        self._check_scale_growth_tracker("_check_inf_per_device")
        found = {}
        for device, (ours, others) in _gradients(optimizer).items():
            found[device] = torch.zeros((), dtype=torch.float32, device=device)
            if ours:
                found[device] += grad_stats(ours)[1].any()
            for same in others:
                one = torch.ones((), dtype=torch.float32, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(same, found[device], one)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found


@torch.no_grad()
def _gradients(
    optimizer: torch.optim.Optimizer,
) -> dict[torch.device, tuple[list[Tensor], list[list[Tensor]]]]:
    """By device, the gradients that mixft's ops take, and the rest, FP64 and tensor subclasses, by dtype."""
    ours: dict[torch.device, list[Tensor]] = defaultdict(list)
    others: dict[torch.device, dict[torch.dtype, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse and param.grad.dtype is torch.float16:
                # The values of one index may overflow only in their sum, so that is what has to be checked.
                param.grad = param.grad.coalesce()
            grad = param.grad._values() if param.grad.is_sparse else param.grad
            if grad.dtype in FLOATS and type(grad) is Tensor:
                ours[grad.device].append(grad)
            else:
                others[grad.device][grad.dtype].append(grad)
    return {device: (ours[device], list(others[device].values())) for device in dict.fromkeys([*ours, *others])}
