"""``swap``: one of torch's optimizers, in the middle of training, replaced by mixft's."""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adam import Adam, AdamW
from .base import OPTIMIZER_OPTIONS, TORCH_IMPLEMENTATION_OPTIONS, MixedPrecisionOptimizer
from .hyperparameters import as_numbers
from .lion import Lion
from .sgd import SGD
from .state import adopted, check_loaded_state, wide_state

COUNTERPARTS = {torch.optim.AdamW: AdamW, torch.optim.Adam: Adam, torch.optim.SGD: SGD}
OURS = (AdamW, Adam, SGD, Lion)
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def swap(optimizer: Optimizer, **overrides: Any) -> MixedPrecisionOptimizer:
    """Go on with mixft's optimizer where ``optimizer`` is, and retire that.

    The new optimizer takes over the state, the hooks and the very same parameter group dictionaries, so that a learning
    rate scheduler made for ``optimizer`` goes on working. 16-bit parameters get masters, made from the parameters as
    they are, and 16-bit state is widened. ``optimizer`` holds no state any more, and its ``step``, ``state_dict`` and
    ``load_state_dict`` raise RuntimeError. Hyperparameters stay as they are in the groups; ``foreach``, ``fused`` and
    ``capturable``, which choose between implementations of the same values, are dropped.

    Args:
        optimizer: a ``torch.optim`` AdamW, Adam or SGD, or one of mixft's, whose state is then kept in another way.
        overrides: ``max_grad_norm``, ``master_weights``, ``state_dtype``, ``stochastic_rounding``, ``skip_nonfinite``
            and ``sharded_over`` of :class:`mixft.optim.AdamW`. Those not given are as there, or as in ``optimizer``
            where that is mixft's.

    Returns:
        A :class:`mixft.optim.AdamW`, ``Adam``, ``SGD`` or ``Lion``.

    Raises:
        TypeError: ``optimizer`` is of another class, a subclass included, whose step may differ; an override is not
            one of the above; or a parameter is not served. Nothing is changed then.
        ValueError: ``optimizer`` is differentiable, has its gradients released inside backward or accumulated, or an
            override has a value that will not do. Nothing is changed.
    """
    kind = _counterpart(optimizer)
    unknown = sorted(overrides.keys() - set(OPTIMIZER_OPTIONS))
    if unknown:
        raise TypeError(f"swap takes {', '.join(OPTIMIZER_OPTIONS)}, not {', '.join(unknown)}")
    _check_no_one_else_steps(optimizer)
    if isinstance(optimizer, MixedPrecisionOptimizer):
        overrides = {name: getattr(optimizer, name) for name in OPTIMIZER_OPTIONS} | overrides
    hyperparameters = inspect.signature(kind).parameters.keys() - {"params", *OPTIMIZER_OPTIONS}
    defaults = {name: value for name, value in optimizer.defaults.items() if name in hyperparameters}
    swapped = kind([_group(group) for group in optimizer.param_groups], **defaults, **overrides)
    _take_state(swapped, optimizer)
    for live, group in zip(optimizer.param_groups, swapped.param_groups, strict=True):
        live.clear()
        live.update(group)
    swapped.param_groups = optimizer.param_groups
    for hooks in HOOKS:
        # The dictionaries themselves, so that handles of hooks still remove them.
        setattr(swapped, hooks, getattr(optimizer, hooks))
        setattr(optimizer, hooks, type(getattr(optimizer, hooks))())
    _retire(optimizer, swapped)
    return swapped


def _counterpart(optimizer: Optimizer) -> type[MixedPrecisionOptimizer]:
    kind = type(optimizer)
    if kind in OURS:
        return kind
    if kind not in COUNTERPARTS:
        known = ", ".join(f"torch.optim.{served.__name__}" for served in COUNTERPARTS)
        raise TypeError(f"optimizer is a {kind.__module__}.{kind.__qualname__}; swap takes {known}, and mixft's own")
    decoupled = {group.get("decoupled_weight_decay", False) for group in optimizer.param_groups}
    for position, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise ValueError(f"group {position} is differentiable; mixft's steps cannot be differentiated")
    if kind is torch.optim.Adam and decoupled == {True}:
        return AdamW
    if kind is torch.optim.Adam and True in decoupled:
        raise ValueError("decoupled_weight_decay differs from group to group; swap takes it True or False in all")
    return COUNTERPARTS[kind]


def _check_no_one_else_steps(optimizer: Optimizer) -> None:
    if getattr(optimizer, "releases_gradients", False):
        raise ValueError(
            "the gradients of optimizer are released inside backward, which would go on stepping it; "
            "remove() that first and release those of the new optimizer"
        )
    if getattr(optimizer, "grad_accumulator", None) is not None:
        raise ValueError(
            "optimizer has a GradAccumulator, whose scaler would not find it at the new optimizer; "
            "remove() it first and make another there"
        )


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``group`` without what mixft's groups do not have."""
    own = {name: value for name, value in group.items() if name not in TORCH_IMPLEMENTATION_OPTIONS}
    if "betas" in own:
        own["betas"] = as_numbers(own["betas"])
    return own


@torch.no_grad()
def _take_state(swapped: MixedPrecisionOptimizer, optimizer: Optimizer) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    present = [param for param in params if optimizer.state.get(param)]
    wide = {param: _wide(optimizer, param) for param in present}
    numbered = [{**group, "params": [id(param) for param in group["params"]]} for group in swapped.param_groups]
    saved = {"state": {id(param): state for param, state in wide.items()}, "param_groups": numbered}
    restarts = swapped.restarts_with_new_state
    check_loaded_state(saved, swapped.param_groups, swapped.state_names, swapped.storage, swapped.needs_step, restarts)
    for param in present:
        swapped.state[param] = adopted(param, wide.pop(param), swapped.storage)
        optimizer.state.pop(param)
    for param in params:
        optimizer.state.pop(param, None)


def _wide(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    state = {name: value for name, value in optimizer.state[param].items() if value is not None}
    if isinstance(optimizer, MixedPrecisionOptimizer):
        return wide_state(param, state, optimizer.storage)
    # One of mixft's, which torch's optimizer was given and has not stepped.
    state.pop("master", None)
    return state


def _retire(optimizer: Optimizer, swapped: MixedPrecisionOptimizer) -> None:
    name = type(swapped).__name__

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"this optimizer was swapped for a mixft.optim.{name}; use that one")

    old = weakref.ref(optimizer)

    def note_step(*_: Any) -> None:
        # A scheduler made for the old optimizer looks at this, and warns where no step was taken.
        if old() is not None:
            old()._opt_called = True

    optimizer.register_step_pre_hook(refuse)
    # A checkpoint of it would silently lack the state.
    optimizer.register_state_dict_pre_hook(refuse)
    optimizer.register_load_state_dict_pre_hook(refuse)
    swapped.register_step_post_hook(note_step)
