"""Optimizer state out of a state dictionary: checked, kept in FP32, masters made where they are missing.

``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, which would round FP32 moments and
masters of a 16-bit parameter. Tensors are therefore passed through it inside ``Loaded``, which it does not look into.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor


@dataclass
class Loaded:
    """A tensor on its way through torch's loading."""

    tensor: Tensor


def check_loaded_state(
    state_dict: dict[str, Any], param_groups: list[dict[str, Any]], state_names: Callable[[dict], tuple[str, ...]]
) -> None:
    """Raise ValueError where the state of a parameter is incomplete or of another shape than the parameter."""
    saved_groups = state_dict["param_groups"]
    params = chain.from_iterable(group["params"] for group in param_groups)
    saved = chain.from_iterable(((key, group) for key in group["params"]) for group in saved_groups)
    # Groups of other lengths are refused by torch, in its own words.
    for (key, group), param in zip(saved, params, strict=False):
        state = state_dict["state"].get(key)
        if not state:
            continue
        names = state_names({"amsgrad": False, **group})
        missing = [name for name in ("step", *names) if name not in state]
        if missing:
            raise ValueError(f"the loaded state of parameter {key} lacks {', '.join(missing)}")
        for name in (*names, "master"):
            if name in state and state[name].shape != param.shape:
                raise ValueError(
                    f"the loaded {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter "
                    f"{tuple(param.shape)}"
                )


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
def adopt_loaded_state(
    params: list[Tensor], state: dict[Tensor, dict[str, Any]], has_master: Callable[[Tensor], bool]
) -> None:
    """Take the loaded state of ``params`` out of ``Loaded``; state that was not just loaded stays as it is."""
    loaded: dict[tuple[torch.device, bool], list[Tensor]] = {}
    for param in params:
        values = state.get(param)
        if not values or not any(isinstance(value, Loaded) for value in values.values()):
            continue
        for name, value in values.items():
            if isinstance(value, Loaded):
                dtype = torch.float32 if value.tensor.is_floating_point() else value.tensor.dtype
                values[name] = value.tensor.detach().to(param.device, dtype, copy=True)
        if not has_master(param):
            values.pop("master", None)
        elif "master" not in values:
            values["master"] = param.detach().float()
        loaded.setdefault((param.device, has_master(param)), []).append(param)
    for (device, _), alike in loaded.items():
        # Side by side in one buffer, as new state is made.
        counts = [torch.as_tensor(state[param]["step"], dtype=torch.float32, device=device) for param in alike]
        steps = torch.stack([count.reshape(()) for count in counts])
        for position, param in enumerate(alike):
            state[param]["step"] = steps[position]
