"""Checks of hyperparameters; each error names the hyperparameter, what it was and what would do."""

from collections.abc import Sequence
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .storage import MASTER_WEIGHTS, STATE_DTYPES


def check_rate(group: dict[str, Any]) -> None:
    """Raise TypeError unless ``lr`` is a number or a tensor, ValueError for several elements or a negative rate."""
    if not isinstance(group["lr"], (Real, Tensor)):
        raise TypeError(f"lr is {group['lr']!r}; it must be a number or a one-element tensor")
    if isinstance(group["lr"], Tensor):
        check_rate_tensor(group["lr"])
    if not group["lr"] >= 0.0:
        raise ValueError(f"lr is {group['lr']}; it must not be negative")


def check_rate_tensor(rate: Tensor) -> None:
    """Raise ValueError unless ``rate`` has one element; its value stays where it is."""
    if rate.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(rate.shape)}; it must hold one element")


def check_number(group: dict[str, Any], name: str) -> None:
    """Raise TypeError for what is no number, a tensor included."""
    if not isinstance(group[name], Real):
        what = "a tensor" if isinstance(group[name], Tensor) else repr(group[name])
        raise TypeError(f"{name} is {what}; it must be a number")


def check_not_negative(group: dict[str, Any], *names: str) -> None:
    """Raise TypeError for what is no number, a tensor included, and ValueError for a negative number or NaN."""
    for name in names:
        check_number(group, name)
        if not group[name] >= 0.0:
            raise ValueError(f"{name} is {group[name]}; it must not be negative")


def check_betas(group: dict[str, Any]) -> None:
    """Raise ValueError unless ``betas`` is two numbers in [0, 1)."""
    if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; it must be two numbers in [0, 1)")


def as_numbers(betas: tuple[float | Tensor, ...]) -> tuple[float, ...]:
    """``betas`` with one-element tensors read.

    Raises:
        TypeError: it is no sequence of numbers or tensors.
        ValueError: some are numbers and some tensors, or a tensor has not one element.
    """
    if not isinstance(betas, Sequence) or not all(isinstance(beta, (Real, Tensor)) for beta in betas):
        raise TypeError(f"betas is {betas!r}; it must be two numbers in [0, 1)")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError(f"betas is {betas}; they must be both numbers or both tensors")
    for beta in betas:
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"betas has a tensor of shape {tuple(beta.shape)}; it must hold one element")
    return tuple(map(float, betas))


def loaded_group(
    group: dict[str, Any], defaults: dict[str, Any], decoupled: bool | None, optimizer: str
) -> dict[str, Any]:
    """A group of a state dictionary for an ``optimizer`` of these ``defaults``: one-element betas are read.

    Raises:
        TypeError: a hyperparameter that has to be a number is a tensor.
        ValueError: the group is of an Adam, and not of one whose weight decay is ``decoupled`` as here.
    """
    for name in defaults.keys() - {"lr", "betas"}:
        if isinstance(group.get(name), Tensor):
            raise TypeError(f"the loaded {name} is a tensor; it must be a number")
    loaded = group.get("decoupled_weight_decay", decoupled)
    if loaded != decoupled:
        kind = "AdamW" if loaded else "Adam"
        raise ValueError(
            f"the loaded decoupled_weight_decay is {loaded}, that of {kind}, from which {optimizer} does not go on; "
            f"load it into {kind}"
        )
    return {**group, "betas": as_numbers(group["betas"])} if "betas" in group else group


def check_precision(
    max_grad_norm: float | None,
    master_weights: str,
    state_dtype: torch.dtype,
    stochastic_rounding: bool,
    skip_nonfinite: bool,
) -> None:
    """Raise TypeError or ValueError for an option out of range, ValueError for options that exclude each other."""
    if not isinstance(max_grad_norm, (Real, NoneType)):
        raise TypeError(f"max_grad_norm is {max_grad_norm!r}; it must be a positive number or None")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be a positive number or None")
    if master_weights not in MASTER_WEIGHTS:
        raise ValueError(f"master_weights is {master_weights!r}; it must be one of {', '.join(MASTER_WEIGHTS)}")
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {state_dtype!r}; it must be one of {', '.join(map(str, STATE_DTYPES))}")
    if stochastic_rounding and master_weights != "none":
        raise ValueError(
            f"stochastic_rounding is True and master_weights {master_weights!r}; masters leave nothing to round "
            f"but a copy, so it is for master_weights='none'"
        )
    if max_grad_norm is not None and not skip_nonfinite:
        raise ValueError("skip_nonfinite is False; with max_grad_norm the gradients are read anyway, leave it True")
