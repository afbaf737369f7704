"""What the fused optimizer steps share: the checks of their tensors, and one layout for all tensors of a parameter."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.cpu.optimizer_state import GROUP_SIZE

from .layout import all_contiguous, in_layout_of, is_dense, same_layout, without_negation
from .registration import change_in_place
from .validation import FLOATS, check_scalar

SIGNED_STATE = (torch.float32, torch.bfloat16, torch.int8)
UNSIGNED_STATE = (torch.float32, torch.bfloat16, torch.uint8)


def step_unchecked_(op, tensors: dict[str, list[Tensor]], scalars: tuple) -> None:
    """Call ``op`` on arguments that are known to be right: its tensor lists by name and in order, then the rest.

    An optimizer makes them itself; checking a hundred parameters again would be a tenth of a millisecond a step.
    """
    params = tensors["params"]
    shaped = _shaped(tuple(tensors))
    if all_contiguous(*[tensors[name] for name in shaped]):
        change_in_place(op, params, *tensors.values(), *scalars)
        return
    references = list(map(dense_copy, params))
    arranged = tensors | {
        name: [in_layout_of(like, tensor) for like, tensor in zip(references, tensors[name], strict=False)]
        for name in shaped
    }
    arranged["params"] = references
    change_in_place(op, references, *arranged.values(), *scalars)
    for name in shaped:
        if name != "grads":
            for tensor, worked_on in zip(tensors[name], arranged[name], strict=True):
                if worked_on is not tensor:
                    tensor.copy_(worked_on)


@functools.cache
def _shaped(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the op's lists whose tensors have their parameter's shape."""
    return tuple(name for name in names if not (name == "steps" or name.endswith("_scales")))


def dense_copy(param: Tensor) -> Tensor:
    """``param`` itself where it fills its storage, else a copy in the order that ``torch.empty_like`` gives state."""
    return param if is_dense(param) else torch.empty_like(param).copy_(param)


def check_step(
    tensors: dict[str, Sequence[Tensor]],
    states: dict[str, tuple[torch.dtype, ...]],
    optional: tuple[str, ...],
    scalars: dict[str, Tensor | None],
    stochastic_rounding: bool,
) -> dict[str, list[Tensor]]:
    """The lists of one step as lists, or an error that names what is wrong with them.

    Args:
        tensors: the op's lists by name: ``params``, ``grads``, ``masters``, the state lists, the scales of each state
            list (``exp_avg_scales`` for ``exp_avgs``), and ``steps``.
        states: the dtypes that each state list may have.
        optional: the state lists that may be empty.
        scalars: ``lr``, ``inv_scale``, ``clip_coef`` and ``found_inf``.
        stochastic_rounding: whether 16-bit parameters without masters are rounded stochastically.

    Raises:
        TypeError: a tensor has another dtype than its list may have.
        ValueError: lists of different lengths, or a tensor of another shape, layout or device than its parameter.
    """
    tensors = {name: list(listed) for name, listed in tensors.items()}
    tensors["grads"] = without_negation(tensors["grads"])
    params = tensors["params"]
    scales = {name: name.removesuffix("s") + "_scales" for name in states}
    for name, listed in tensors.items():
        if len(listed) != len(params) and (listed or name not in ("masters", *optional, *scales.values())):
            raise ValueError(
                f"{name} has {len(listed)} tensors for {len(params)} parameters; it must have one for each"
            )
    if not params:
        return tensors
    device = params[0].device
    allowed = {"params": FLOATS, "grads": FLOATS, "masters": (torch.float32, torch.int16), **states}
    allowed |= dict.fromkeys(scales.values(), (torch.uint8,))
    for name, listed in tensors.items():
        _check_kind(name, listed, allowed.get(name, (torch.float32,)), device)
    shapes = [param.shape for param in params]
    for name in ("grads", "masters", *states):
        if tensors[name] and [tensor.shape for tensor in tensors[name]] != shapes:
            position = next(i for i, t in enumerate(tensors[name]) if t.shape != shapes[i])
            raise ValueError(
                f"{name}[{position}] has shape {tuple(tensors[name][position].shape)} and its parameter "
                f"{tuple(shapes[position])}; they must be equal"
            )
    if set(map(Tensor.numel, tensors["steps"])) != {1}:
        position, size = next((i, t.numel()) for i, t in enumerate(tensors["steps"]) if t.numel() != 1)
        raise ValueError(f"steps[{position}] has {size} elements; it must hold one")
    for name in ("masters", *states):
        _check_one_dtype(name, tensors[name])
    _check_masters(params, tensors["masters"], stochastic_rounding)
    for name, scale_name in scales.items():
        _check_scales(name, tensors[name], scale_name, tensors[scale_name], params)
    for name, scalar in scalars.items():
        if scalar is not None or name == "lr":
            check_scalar(name, scalar, device)
    return tensors


def _check_kind(name: str, tensors: list[Tensor], allowed: tuple[torch.dtype, ...], device: torch.device) -> None:
    # Whole lists are compared first: the search for the culprit is only for the message.
    kinds = {(tensor.dtype, tensor.device, tensor.layout) for tensor in tensors}
    if kinds <= {(dtype, device, torch.strided) for dtype in allowed}:
        return
    if not {dtype for dtype, _, _ in kinds}.issubset(allowed):
        position, wrong = next((i, t.dtype) for i, t in enumerate(tensors) if t.dtype not in allowed)
        raise TypeError(f"{name}[{position}] is {wrong}; it must be one of {', '.join(map(str, allowed))}")
    if {where for _, where, _ in kinds} != {device}:
        position, wrong = next((i, t.device) for i, t in enumerate(tensors) if t.device != device)
        raise ValueError(f"{name}[{position}] is on {wrong} and params[0] on {device}; pass one device at a time")
    position, wrong = next((i, t.layout) for i, t in enumerate(tensors) if t.layout != torch.strided)
    raise ValueError(f"{name}[{position}] is {wrong}; it must be a dense tensor")


def _check_one_dtype(name: str, tensors: list[Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        listing = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(f"{name} holds {listing}; make one call for each dtype")


def _check_masters(params: list[Tensor], masters: list[Tensor], stochastic_rounding: bool) -> None:
    if masters and stochastic_rounding:
        raise ValueError("stochastic_rounding is for parameters without masters; masters must be empty")
    if masters and masters[0].dtype == torch.int16:
        for position, param in enumerate(params):
            if param.dtype == torch.float32:
                raise TypeError(
                    f"params[{position}] is torch.float32; it needs no remainder, make a call without masters for it"
                )


def _check_scales(name: str, states: list[Tensor], scale_name: str, scales: list[Tensor], params: list[Tensor]) -> None:
    has_codes = bool(states) and states[0].dtype in (torch.int8, torch.uint8)
    if has_codes != bool(scales):
        needed = "one a parameter" if has_codes else "none"
        kind = states[0].dtype if states else "empty"
        raise ValueError(f"{scale_name} has {len(scales)} tensors; {name} is {kind}, so there must be {needed}")
    for position, scale in enumerate(scales):
        shape = (-(-params[position].numel() // GROUP_SIZE),)
        if scale.shape != shape or not scale.is_contiguous():
            raise ValueError(
                f"{scale_name}[{position}] has shape {tuple(scale.shape)}; it must be a contiguous {shape}"
            )
        if not same_layout(dense_copy(params[position]), states[position]):
            raise ValueError(
                f"{name}[{position}] has strides {states[position].stride()}; 8-bit state must lie in storage as "
                "torch.empty_like of its parameter does"
            )
