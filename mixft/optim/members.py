"""Which parameters are updated together, and the lists of their tensors that an op takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mixft.ops.capture import capturing
from mixft.ops.validation import FLOATS

from .state import lay_steps_side_by_side
from .storage import SCALE, Storage

State = dict[Tensor, dict[str, Any]]
# The gradient that a parameter is to be stepped with, None for none.
GradientOf = Callable[[Tensor], Tensor | None]


@dataclass
class Members:
    """Parameters of one group, on one device and with one kind of master, that have a gradient.

    Attributes:
        group: their parameter group.
        tensors: the op's lists by argument name and in its order, without the gradients, which would be kept alive.
    """

    group: dict[str, Any]
    tensors: dict[str, list[Tensor]]

    @property
    def device(self) -> torch.device:
        return self.tensors["params"][0].device

    def gradients(self, gradient_of: GradientOf) -> list[Tensor]:
        return list(map(gradient_of, self.tensors["params"]))


def check_parameters(params: list[Tensor], number: int, optimizer: str) -> None:
    """Raise TypeError or ValueError for parameters of group ``number`` that no op takes, or that are one tensor."""
    seen: dict[Tensor, int] = {}
    for position, param in enumerate(params):
        if param in seen:
            raise ValueError(
                f"parameters {seen[param]} and {position} of group {number} are the same tensor; give it once"
            )
        seen[param] = position
        if param.dtype not in FLOATS or param.layout != torch.strided:
            raise TypeError(
                f"parameter {position} of group {number} is a {param.layout} tensor of {param.dtype}; "
                f"{optimizer} takes dense float32, float16 and bfloat16 parameters"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
            raise ValueError(
                f"parameter {position} of group {number} has strides {param.stride()} for shape {tuple(param.shape)}: "
                f"several elements are one; give the tensor that it was expanded from"
            )


def check_gradients(params: Iterable[Tensor], gradient_of: GradientOf, optimizer: str) -> None:
    """Raise TypeError for a gradient that no op takes, ValueError for one of another shape than its parameter
    or a view of negated numbers."""
    for param in params:
        grad = gradient_of(param)
        if grad is None:
            continue
        if grad.layout != torch.strided or grad.dtype not in FLOATS:
            raise TypeError(
                f"a gradient of shape {tuple(grad.shape)} is a {grad.layout} tensor of {grad.dtype}; "
                f"{optimizer} takes dense float32, float16 and bfloat16 gradients"
            )
        if grad.is_neg():
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} is a view of the negative of its numbers, as the imaginary "
                f"part of a conjugate is; assign its resolve_neg()"
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"a gradient has shape {tuple(grad.shape)} and its parameter, which was changed after the backward, "
                f"{tuple(param.shape)}; call zero_grad() and run the backward again"
            )


def arrange(
    group: dict[str, Any],
    params: Iterable[Tensor],
    gradient_of: GradientOf,
    state: State,
    storage: Storage,
    names: tuple[str, ...],
    restarts: bool,
) -> list[Members]:
    """``params`` of ``group`` that have a gradient, by what can go in one call; what their state lacks is made.

    Args:
        names: the state tensors that the group's rule keeps.
        restarts: whether a new state tensor makes the next step the first: SGD's momentum begins with a gradient.
    """
    alike: dict[tuple[torch.device, str | None], list[Tensor]] = {}
    for param in params:
        if gradient_of(param) is not None:
            alike.setdefault((param.device, storage.master_name(param)), []).append(param)
    return [
        Members(group, _lists(together, kept, state, storage, names, restarts)) for (_, kept), together in alike.items()
    ]


def _lists(
    params: list[Tensor], kept: str | None, state: State, storage: Storage, names: tuple[str, ...], restarts: bool
) -> dict[str, list[Tensor]]:
    states = [state[param] for param in params]
    if capturing(params[0].device):
        for param, values in zip(params, states, strict=True):
            missing = [name for name in (*names, storage.master_name(param), "step") if name and name not in values]
            if missing:
                raise RuntimeError(
                    f"{', '.join(missing)} of a parameter of shape {tuple(param.shape)} would be made anew by every "
                    f"replay of this CUDA graph; take one step before the capture"
                )
    for param, values in zip(params, states, strict=True):
        if storage.complete(param, values, names) and restarts:
            values.pop("step", None)
    if any("step" not in values for values in states):
        lay_steps_side_by_side(states, params[0].device)
    coded = [name for name in names if states[0].get(name + SCALE) is not None]
    return {
        "params": params,
        "grads": [],
        "masters": [values[kept] for values in states] if kept else [],
        **{f"{name}s": [values[name] for values in states] if name in names else [] for name in storage.signed},
        **{
            f"{name}{SCALE}s": [values[name + SCALE] for values in states] if name in coded else []
            for name in storage.signed
        },
        "steps": [values["step"] for values in states],
    }


def signature(
    param_groups: list[dict[str, Any]],
    names: list[tuple[str, ...]],
    gradient_of: GradientOf,
    state: State,
    with_strides: bool,
) -> list[Any]:
    """What the lists of all members depend on, to tell at every step whether they still hold.

    Identities are compared, not tensors: while the lists are kept nothing else can take an identity.
    """
    params = list(chain.from_iterable(group["params"] for group in param_groups))
    return [
        [(id(group), len(group["params"]), named) for group, named in zip(param_groups, names, strict=True)],
        list(map(id, params)),
        [
            (param.dtype, param.shape, None)
            if (grad := gradient_of(param)) is None
            else (param.dtype, param.shape, grad.dtype, grad.numel(), grad.layout, grad.is_neg())
            for param in params
        ],
        [param.stride() for param in params] if with_strides else None,
        list(map(id, state)),
        list(map(id, chain.from_iterable(map(dict.values, state.values())))),
    ]
