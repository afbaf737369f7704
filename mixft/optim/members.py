"""Which parameters are updated together, and the lists of their tensors that an op takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixft.ops.capture import capturing
from mixft.ops.tensor_list import TensorList
from mixft.ops.validation import FLOATS, SIXTEEN_BITS, described, is_dtensor

from .dtensor import piece_of
from .metadata import Metadata
from .sharding import Shards
from .state import lay_steps_side_by_side
from .storage import SCALE, Storage

State = dict[Tensor, dict[str, Any]]
# The gradients that the parameters of a list are to be stepped with, None for none.
Gradients = list[Tensor | None]


@dataclass
class Members:
    """Parameters of one group, on one device, with one kind of master and divided alike, that have a gradient.

    Attributes:
        group: their parameter group.
        positions: their places in the list of parameters that they were arranged from.
        shards: the processes that hold the other pieces of them; None for none.
        tensors: the op's lists by argument name and in its order, without the gradients, which would be kept alive.
        like_grads: no tensors, with what is known of the gradients'.
    """

    group: dict[str, Any]
    positions: list[int]
    shards: Shards | None
    tensors: dict[str, list[Tensor]]
    like_grads: TensorList

    @property
    def device(self) -> torch.device:
        return self.tensors["params"][0].device

    def gradients(self, grads: Gradients) -> TensorList:
        """Those of ``grads``, one for each parameter that these were arranged from, that are of these."""
        return TensorList(map(grads.__getitem__, self.positions), self.like_grads)


class Stepped(NamedTuple):
    """What a step is taken with.

    Attributes:
        param_groups: the optimizer's.
        names: of each group, the state tensors that its rule keeps.
        params: all parameters, in order.
        pieces: what this process holds of them; the parameters themselves, but of DTensors.
        grads: the pieces' gradients.
        state: the optimizer's.
    """

    param_groups: list[dict[str, Any]]
    names: list[tuple[str, ...]]
    params: list[Tensor]
    pieces: list[Tensor]
    grads: Gradients
    state: State


class Arrangement:
    """The members of all parameters, and whether they still hold.

    Args:
        step: what they are arranged from; what its state lacks is made.
        storage: how state is kept.
        restarts: whether a new state tensor makes the next step the first: SGD's momentum begins with a gradient.
        shards: for each parameter, the processes that hold its other pieces; None for none.

    Attributes:
        members: the parameters that have a gradient, by what can go in one call.
        shards: those of all parameters, each once and in order.
    """

    def __init__(self, step: Stepped, storage: Storage, restarts: bool, shards: list[Shards | None]) -> None:
        self.members: list[Members] = []
        self.shards = [processes for processes in dict.fromkeys(shards) if processes is not None]
        first = 0
        for group, named in zip(step.param_groups, step.names, strict=True):
            positions = range(first, first := first + len(group["params"]))
            self.members += arrange(group, positions, step, storage, named, restarts, shards)
        self._groups = _described(step.param_groups, step.names)
        self._params = step.params
        self._pieces = step.pieces
        self._has_gradient = [grad is not None for grad in step.grads]
        self._metadata = Metadata(_with_gradient(step.pieces, step.grads))
        self._state = _tensors(step.state)

    def holds(self, step: Stepped) -> bool:
        """Whether ``step`` has the groups, parameters and state arranged, and its gradients differ in address alone."""
        return (
            _same(step.params, self._params)
            and (step.pieces is step.params or _same(step.pieces, self._pieces))
            and [grad is not None for grad in step.grads] == self._has_gradient
            and self._metadata.describes(_with_gradient(step.pieces, step.grads))
            and _same(_tensors(step.state), self._state)
            and _described(step.param_groups, step.names) == self._groups
        )


def _described(param_groups: list[dict[str, Any]], names: list[tuple[str, ...]]) -> list[tuple]:
    return [(id(group), len(group["params"]), named) for group, named in zip(param_groups, names, strict=True)]


def _with_gradient(params: list[Tensor], grads: Gradients) -> list[Tensor]:
    """The parameters that have a gradient, and the gradients."""
    having = [grad for grad in grads if grad is not None]
    if len(having) == len(params):
        return params + having
    return [param for param, grad in zip(params, grads, strict=True) if grad is not None] + having


def _tensors(state: State) -> list[Any]:
    try:
        return [*state, *chain.from_iterable(map(dict.values, state.values()))]
    except TypeError:  # beside the parameters' there are entries of the user's own
        return [*state, *chain.from_iterable(each.values() for each in state.values() if isinstance(each, dict))]


def _same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def check_parameters(groups: list[list[Tensor]], optimizer: str) -> None:
    """Raise TypeError or ValueError for parameters of the last of ``groups`` that no op takes, or that are one tensor.

    ``optimizer`` is what the messages call it.
    """
    *earlier, params = groups
    number = len(earlier)
    seen: dict[Tensor, int] = {}
    starts: dict[int, tuple[int, int]] = {}
    for before, listed in enumerate(earlier):
        for position, param in enumerate(map(piece_of, listed)):
            if param.dtype in SIXTEEN_BITS and param.data_ptr():
                starts[param.data_ptr()] = before, position
    for position, param in enumerate(params):
        if param in seen:
            raise ValueError(
                f"parameters {seen[param]} and {position} of group {number} are the same tensor; give it once"
            )
        seen[param] = position
        if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
            raise TypeError(
                f"parameter {position} of group {number} is a DTensor placed {param.placements}, a sum of pieces; "
                f"{optimizer} takes those that are divided or replicated"
            )
        param = piece_of(param)
        if param.dtype not in FLOATS or param.layout != torch.strided:
            raise TypeError(
                f"parameter {position} of group {number} is {described(param)}; "
                f"{optimizer} takes dense float32, float16 and bfloat16 parameters"
            )
        if param.dtype in SIXTEEN_BITS and param.data_ptr():
            group, other = starts.setdefault(param.data_ptr(), (number, position))
            if (group, other) != (number, position):
                raise ValueError(
                    f"parameter {other} of group {group} and parameter {position} of group {number} are two tensors in "
                    f"the same memory, whose masters would undo each other's steps; tie modules by one Parameter, and "
                    f"give it once"
                )
        if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
            raise ValueError(
                f"parameter {position} of group {number} has strides {param.stride()} for shape {tuple(param.shape)}: "
                f"several elements are one; give the tensor that it was expanded from"
            )


def check_gradients(params: list[Tensor], grads: Gradients, optimizer: str) -> None:
    """Raise TypeError for a gradient that no op takes, ValueError for one of another shape than its parameter
    or a view of negated numbers."""
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if grad.layout != torch.strided or grad.dtype not in FLOATS:
            raise TypeError(
                f"a gradient of shape {tuple(grad.shape)} is {described(grad)}; "
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
    positions: Iterable[int],
    step: Stepped,
    storage: Storage,
    names: tuple[str, ...],
    restarts: bool,
    shards: list[Shards | None],
) -> list[Members]:
    """Those of ``group``, which are at ``positions`` of the parameters of ``step``, that have a gradient; else as
    ``Arrangement``."""
    alike: dict[tuple[torch.device, torch.dtype | None, Shards | None], list[int]] = {}
    for position in positions:
        if step.grads[position] is not None:
            piece = step.pieces[position]
            kind = piece.device, storage.master_dtype(piece), shards[position]
            alike.setdefault(kind, []).append(position)
    return [
        Members(
            group,
            together,
            processes,
            _lists(step, together, kept is not None, storage, names, restarts),
            TensorList([], TensorList(step.grads[position] for position in together)),
        )
        for (_, kept, processes), together in alike.items()
    ]


def _lists(
    step: Stepped, positions: list[int], has_master: bool, storage: Storage, names: tuple[str, ...], restarts: bool
) -> dict[str, list[Tensor]]:
    params = [step.pieces[position] for position in positions]
    states = [step.state[step.params[position]] for position in positions]
    if capturing(params[0].device):
        for param, values in zip(params, states, strict=True):
            needed = [*names, *(["master"] if storage.master_dtype(param) else []), "step"]
            missing = [name for name in needed if name not in values]
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
    lists = {
        "params": params,
        "grads": [],
        "masters": [values["master"] for values in states] if has_master else [],
        **{f"{name}s": [values[name] for values in states] if name in names else [] for name in storage.signed},
        **{
            f"{name}{SCALE}s": [values[name + SCALE] for values in states] if name in coded else []
            for name in storage.signed
        },
        "steps": [values["step"] for values in states],
    }
    return {name: TensorList(listed) for name, listed in lists.items()}
