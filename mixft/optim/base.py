"""What every mixft optimizer shares: master weights, the check of the gradients, clipping, and state dictionaries."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from mixft.ops.grad import grad_stats
from mixft.ops.validation import FLOATS

from .state import adopt_loaded_state, check_loaded_state, shield_loaded_state

MASTER_WEIGHTS = ("auto", "fp32", "none")
# Options by which torch's optimizers choose between implementations of the same values; there is one here.
TORCH_IMPLEMENTATION_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


@dataclass
class Members:
    """The parameters of one group, on one device, that have a gradient and are alike in having masters or not."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    has_master: bool


@dataclass
class Scalars:
    """One-element FP32 tensors of one step on one device; None stands for 1, and for False in ``found_inf``."""

    inv_scale: Tensor | None
    clip_coef: Tensor | None
    found_inf: Tensor | None


class MixedPrecisionOptimizer(Optimizer):
    """Base of the optimizers; a subclass names its state and applies one update (``state_names``, ``update``).

    Attributes:
        max_grad_norm: the norm that gradients are clipped to, over all groups; None for no clipping.
        master_weights: "auto", "fp32" or "none".
        last_grad_norm: 0-d FP32 tensor, the norm of the unscaled gradients before clipping at the last step; None
            before the first step and where ``max_grad_norm`` is None.
        skip_nonfinite: whether a step reads the gradients for NaN and Inf first.
        last_found_inf: 0-d FP32 tensor, 1 where the last step was skipped; None before the first step, and where
            nothing looked.
    """

    # Tells torch.amp.GradScaler to hand over its scale and its finding (the attributes grad_scale and found_inf).
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        master_weights: str,
        skip_nonfinite: bool,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be a positive number or None")
        if master_weights not in MASTER_WEIGHTS:
            raise ValueError(f"master_weights is {master_weights!r}; it must be one of {', '.join(MASTER_WEIGHTS)}")
        if max_grad_norm is not None and not skip_nonfinite:
            raise ValueError("skip_nonfinite is False; with max_grad_norm the gradients are read anyway, leave it True")
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self._forget_last_step()
        self.check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def _forget_last_step(self) -> None:
        self.last_grad_norm: Tensor | None = None
        self.last_found_inf: Tensor | None = None
        self._rates: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}

    @staticmethod
    @abstractmethod
    def check_hyperparameters(group: dict[str, Any]) -> None:
        """Raise ValueError for a hyperparameter out of range."""

    @staticmethod
    @abstractmethod
    def state_names(group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the FP32 tensors, of a parameter's shape, that the update keeps."""

    @abstractmethod
    def update(self, group: dict[str, Any], members: Members, lr: Tensor, scalars: Scalars) -> None:
        """Change parameters and state of ``members``, or nothing where ``scalars.found_inf`` is not zero."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group`` does.

        Raises:
            TypeError: a parameter is not a real floating-point tensor of 16 or 32 bits.
            ValueError: a hyperparameter is out of range, or an option is named that a group cannot have.
        """
        for name in ("max_grad_norm", "master_weights", "skip_nonfinite", *TORCH_IMPLEMENTATION_OPTIONS):
            if name in param_group:
                raise ValueError(f"{name} is not an option of a parameter group of {type(self).__name__}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_hyperparameters(group)
            seen: dict[Tensor, int] = {}
            for position, param in enumerate(group["params"]):
                if param in seen:
                    raise ValueError(
                        f"parameters {seen[param]} and {position} of group {len(self.param_groups) - 1} are the same "
                        f"tensor; give it once"
                    )
                seen[param] = position
                if param.dtype not in FLOATS or param.layout != torch.strided:
                    raise TypeError(
                        f"parameter {position} of group {len(self.param_groups) - 1} is a {param.layout} tensor of "
                        f"{param.dtype}; {type(self).__name__} takes dense float32, float16 and bfloat16 parameters"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def has_master(self, param: Tensor) -> bool:
        """Whether ``param`` is kept in FP32 beside its 16-bit value."""
        return self.master_weights != "none" and param.dtype != torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none at all where a gradient holds a NaN or Inf.

        Nothing here waits for the device: whether the step was taken is in ``last_found_inf``.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError: a gradient is sparse, or of a dtype that is not served.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, members) for group in self.param_groups for members in self._members(group)]
        if work:
            scalars = self._check_gradients([members for _, members in work])
            for group, members in work:
                device = members.params[0].device
                self.update(group, members, self._learning_rate(group, device), scalars[device])
        return loss

    def _members(self, group: dict[str, Any]) -> list[Members]:
        alike: dict[tuple[torch.device, bool], Members] = {}
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.dtype not in FLOATS:
                raise TypeError(
                    f"a gradient of shape {tuple(grad.shape)} is a {grad.layout} tensor of {grad.dtype}; "
                    f"{type(self).__name__} takes dense float32, float16 and bfloat16 gradients"
                )
            has_master = self.has_master(param)
            members = alike.get((param.device, has_master))
            if members is None:
                members = alike[param.device, has_master] = Members([], [], [], has_master)
            members.params.append(param)
            members.grads.append(grad)
            members.states.append(self.state[param])
        names = self.state_names(group)
        for members in alike.values():
            self._make_state(members, names)
        return list(alike.values())

    def _make_state(self, members: Members, names: tuple[str, ...]) -> None:
        new = []
        for param, state in zip(members.params, members.states, strict=True):
            if "step" not in state:
                new.append(state)
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
            if not members.has_master:
                # Left from when the parameter had 16 bits: kept, it would come back out of date.
                state.pop("master", None)
            elif "master" not in state:
                state["master"] = param.detach().float()
        if new:
            # Side by side in one buffer, steps can be advanced by one call.
            steps = torch.zeros(len(new), dtype=torch.float32, device=members.params[0].device)
            for position, state in enumerate(new):
                state["step"] = steps[position]

    def _check_gradients(self, work: list[Members]) -> dict[torch.device, Scalars]:
        """The scalars of this step on every device, from the gradients and from a GradScaler where there is one."""
        grads: dict[torch.device, list[Tensor]] = defaultdict(list)
        for members in work:
            grads[members.params[0].device] += members.grads
        home = next(iter(grads))
        inv_scale = found_inf = clip_coef = None
        # Set by torch.amp.GradScaler around the step: the scale still in the gradients, and what its own check found.
        if getattr(self, "grad_scale", None) is not None:
            inv_scale = _at(self.grad_scale, home).reciprocal()
        if getattr(self, "found_inf", None) is not None:
            found_inf = _at(self.found_inf, home)
        if (found_inf is None and self.skip_nonfinite) or self.max_grad_norm is not None:
            stats = [grad_stats(listed) for listed in grads.values()]
            bad = sum(_at(nonfinite.sum(), home) for _, nonfinite in stats) > 0
            if self.max_grad_norm is not None:
                norm = sum(_at(squares.sum(), home) for squares, _ in stats).sqrt()
                if inv_scale is not None:
                    norm = norm * inv_scale
                # A finite gradient whose norm exceeds FP32 would be clipped to zero: no step worth taking.
                bad = bad | ~norm.isfinite()
                # torch.nn.utils.clip_grad_norm_ has the same small addend.
                clip_coef = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                self.last_grad_norm = norm.reshape(())
            found_inf = bad.float() if found_inf is None else torch.maximum(found_inf, bad.float())
        self.last_found_inf = None if found_inf is None else found_inf.reshape(())
        return {
            device: Scalars(
                *(None if value is None else _at(value, device) for value in (inv_scale, clip_coef, found_inf))
            )
            for device in grads
        }

    def _learning_rate(self, group: dict[str, Any], device: torch.device) -> Tensor:
        rate = group["lr"]
        if isinstance(rate, Tensor):
            return _at(rate, device)
        key = (id(group), device)
        value, tensor = self._rates.get(key, (math.nan, None))
        if tensor is None:
            tensor = torch.full((), rate, dtype=torch.float32, device=device)
        elif value != rate:
            tensor.fill_(rate)
        self._rates[key] = (rate, tensor)
        return tensor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this optimizer or of its namesake in ``torch.optim``.

        State is kept in FP32 whatever the parameter's dtype, and is copied. A master that the dictionary lacks is made
        from the parameter as it is now, so load the model first.

        Raises:
            ValueError: groups or state do not fit this optimizer's parameters; nothing is changed then.
        """

        # Registered last, so that the user's own hooks see the dictionary as it is.
        def prepare(_, loaded: dict[str, Any]) -> dict[str, Any]:
            check_loaded_state(loaded, self.param_groups, self.state_names)
            return shield_loaded_state(loaded)

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "max_grad_norm": self.max_grad_norm,
            "master_weights": self.master_weights,
            "skip_nonfinite": self.skip_nonfinite,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_last_step()
        for group in self.param_groups:
            for name in TORCH_IMPLEMENTATION_OPTIONS:
                group.pop(name, None)
            for name, value in self.defaults.items():
                if name not in TORCH_IMPLEMENTATION_OPTIONS:
                    group.setdefault(name, value)
            adopt_loaded_state(group["params"], self.state, self.has_master)


def _at(scalar: Tensor, device: torch.device) -> Tensor:
    # A copy to the host is read at once, so that one has to wait.
    return scalar.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
