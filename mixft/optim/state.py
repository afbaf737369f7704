"""Optimizer state out of a state dictionary: checked, and kept as the optimizer's storage keeps it.

``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, which would round FP32 moments and
masters of a 16-bit parameter. Tensors are therefore passed through it inside ``Loaded``, which it does not look into.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dtensor import check_placed, piece_for, piece_of, whole_of
from .storage import Storage


@dataclass
class Loaded:
    """A tensor on its way through torch's loading."""

    tensor: Tensor


def without_placeholders(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of ``state_dict`` without the empty dictionaries in the parameters' state.

    ``torch.distributed.checkpoint`` puts one for whatever this optimizer keeps and a flattened dictionary has not: the
    scales of 8-bit state, or masters.
    """
    state = {
        key: {name: value for name, value in values.items() if not (isinstance(value, dict) and not value)}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def check_loaded_state(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    state_names: Callable[[dict], tuple[str, ...]],
    storage: Storage,
    needs_step: bool,
    restarts: bool,
) -> None:
    """Raise ValueError where the state of a parameter is incomplete or of another shape than the parameter.

    With ``restarts`` a rule does without a state tensor that is not there yet.
    """
    saved_groups = state_dict["param_groups"]
    saved = ((key, group) for group in saved_groups for key in group["params"])
    fitting = ((param, group) for group in param_groups for param in group["params"])
    # Groups of other lengths are refused by torch, in its own words.
    for (key, saved_group), (param, group) in zip(saved, fitting, strict=False):
        state = state_dict["state"].get(key)
        if not state:
            continue
        has_none_yet = restarts and "step" in state and state.keys() <= {"step", "master"}
        names = () if has_none_yet else state_names({**group, **saved_group})
        missing = [name for name in (*["step"] * needs_step, *names) if state.get(name) is None]
        if missing:
            raise ValueError(
                f"the loaded state of parameter {key} lacks {', '.join(missing)}; load that of an optimizer of the "
                "same kind and options"
            )
        for name in shaped(storage):
            if state.get(name) is None:
                continue
            if state[name].shape != param.shape:
                raise ValueError(
                    f"the loaded {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(param.shape)}; give the parameters in the order in which they were saved"
                )
            check_placed(param, state[name], f"the loaded {name} of parameter {key}")


def shield_loaded_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of ``state_dict`` with every tensor of the parameters' state in ``Loaded``."""
    state = {
        key: {name: Loaded(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@torch.no_grad()
def adopt_loaded_state(params: list[Tensor], state: dict[Tensor, dict[str, Any]], storage: Storage) -> None:
    """Take the loaded state of ``params`` out of ``Loaded``; state that was not just loaded stays as it is."""
    for param in params:
        values = state.get(param)
        if values and any(isinstance(value, Loaded) for value in values.values()):
            own = {name: _own(value, param.device) for name, value in values.items() if value is not None}
            state[param] = adopted(param, own, storage)
    stepped = [param for param in params if state.get(param) and "step" in state[param]]
    for device in dict.fromkeys(param.device for param in stepped):
        lay_steps_side_by_side([state[param] for param in stepped if param.device == device], device)


def wide_state(param: Tensor, state: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """The state that an optimizer keeps of ``param`` as a state dictionary has it."""
    wide = storage.widen(piece_of(param), state)
    return {name: whole_of(param, value) if name in shaped(storage) else value for name, value in wide.items()}


def shaped(storage: Storage) -> tuple[str, ...]:
    """Names of what a state dictionary can have of a parameter's shape."""
    return (*storage.signed, "master")


def adopted(param: Tensor, state: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """The state of ``param`` in a state dictionary, or in an optimizer of torch's, as ``storage`` keeps it.

    A master that is not FP32 has been in an optimizer of torch's, which rounds it and does not step it: left out.
    """
    pieces = {
        name: piece_for(param, value) if name in shaped(storage) else value
        for name, value in state.items()
        if name != "master" or value.dtype == torch.float32
    }
    wide = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in pieces.items()
    }
    # Momentum of an optimizer that counts no steps: one has been taken, or there would be none.
    wide.setdefault("step", 1.0)
    wide["step"] = torch.as_tensor(wide["step"], dtype=torch.float32, device=param.device).reshape(())
    return storage.narrow(piece_of(param), wide)


def lay_steps_side_by_side(states: list[dict[str, Any]], device: torch.device) -> None:
    """Put the step counts of ``states`` into one buffer, where one call can advance them; a missing one is zero."""
    steps = torch.zeros(len(states), dtype=torch.float32, device=device)
    if any("step" in state for state in states):
        steps = torch.stack([state.get("step", zero) for state, zero in zip(states, steps, strict=True)])
    for state, step in zip(states, steps.unbind(), strict=True):
        state["step"] = step


def _own(value: Any, device: torch.device) -> Any:
    """A loaded value as a copy on ``device``."""
    return value.tensor.detach().to(device, copy=True) if isinstance(value, Loaded) else value
