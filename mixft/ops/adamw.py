"""``mixft.ops.adamw_``: the whole mixed-precision AdamW step of many parameters in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .grad import check_scalar
from .layout import all_contiguous, in_layout_of, is_dense
from .registration import define_op, without_dispatch
from .validation import FLOATS


@define_op(
    "adamw",
    mutates_args=("params", "masters", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
)
def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    return None


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """Unscale, clip, AdamW in FP32 and the cast back, for all parameters at once and without host synchronisation.

    The formula is that of ``torch.optim.AdamW`` on the gradients times ``inv_scale`` times ``clip_coef``, computed in
    FP32 on the masters, or on the parameters where there are no masters. Gradients are left as they are. Where
    ``found_inf`` is not zero nothing is written at all, step counts included.

    Args:
        params: FP16, BF16 or FP32 tensors of any shapes and strides on one device, changed in place.
        grads: one gradient a parameter, of its shape; FP16, BF16 or FP32, not necessarily the parameter's dtype.
        masters: FP32 weights, one a parameter, changed in place and cast to it; or empty: each parameter is its own
            master, and a 16-bit one is rounded to nearest at every step.
        exp_avgs: FP32 first moments.
        exp_avg_sqs: FP32 second moments.
        max_exp_avg_sqs: FP32 running maxima of the second moments for AMSGrad; or empty: no AMSGrad.
        steps: one-element FP32 tensors, the steps taken so far; each grows by one.
        lr: one-element FP32 tensor, the learning rate.
        inv_scale: one-element FP32 tensor that gradients are multiplied by, or None for 1.
        clip_coef: another, for clipping.
        found_inf: one-element FP32 tensor; not zero skips everything.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay; each step multiplies the weights by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.

    Raises:
        TypeError: a tensor has another dtype than said above.
        ValueError: lists of different lengths, or a tensor of another shape, layout or device than its parameter.
    """
    lists = {
        "params": list(params),
        "grads": list(grads),
        "masters": list(masters),
        "exp_avgs": list(exp_avgs),
        "exp_avg_sqs": list(exp_avg_sqs),
        "max_exp_avg_sqs": list(max_exp_avg_sqs),
    }
    steps = list(steps)
    if not lists["params"]:
        return
    _check(lists, steps)
    device = lists["params"][0].device
    check_scalar("lr", lr, device)
    for name, scalar in (("inv_scale", inv_scale), ("clip_coef", clip_coef), ("found_inf", found_inf)):
        if scalar is not None:
            check_scalar(name, scalar, device)
    advance_(lists, steps, (lr, inv_scale, clip_coef, found_inf, beta1, beta2, eps, weight_decay, maximize))


def advance_(lists: dict[str, list[Tensor]], steps: list[Tensor], scalars: tuple) -> None:
    """:func:`adamw_` on arguments that are known to be right: its six lists by name, the steps, and the rest in order.

    An optimizer makes them itself; checking a hundred parameters again would be a tenth of a millisecond a step.
    """
    advance = without_dispatch(adamw_step_, lists["params"][0])
    if all_contiguous(*lists.values()):
        advance(*lists.values(), steps, *scalars)
        return
    arranged = _in_common_layout(lists)
    advance(*arranged.values(), steps, *scalars)
    for name in lists.keys() - {"grads"}:
        for tensor, worked_on in zip(lists[name], arranged[name], strict=True):
            if worked_on is not tensor:
                tensor.copy_(worked_on)


def _in_common_layout(lists: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The same tensors, with copies in place of those whose storage order differs from their parameter's."""
    references = [param if is_dense(param) else param.contiguous() for param in lists["params"]]
    others = {
        name: [in_layout_of(like, tensor) for like, tensor in zip(references, tensors, strict=False)]
        for name, tensors in lists.items()
        if name != "params"
    }
    return {"params": references, **others}


def _check(lists: dict[str, list[Tensor]], steps: list[Tensor]) -> None:
    params = lists["params"]
    may_be_empty = ("masters", "max_exp_avg_sqs")
    for name, tensors in (*lists.items(), ("steps", steps)):
        if len(tensors) != len(params) and (tensors or name not in may_be_empty):
            raise ValueError(f"{name} has {len(tensors)} tensors for {len(params)} parameters")
    shapes = [param.shape for param in params]
    device = params[0].device
    for name, tensors in (*lists.items(), ("steps", steps)):
        allowed = FLOATS if name in ("params", "grads") else (torch.float32,)
        # Whole lists are compared first: the search for the culprit is only for the message.
        kinds = {(tensor.dtype, tensor.device, tensor.layout) for tensor in tensors}
        if kinds <= {(dtype, device, torch.strided) for dtype in allowed}:
            continue
        if not {dtype for dtype, _, _ in kinds}.issubset(allowed):
            position, wrong = next((i, t.dtype) for i, t in enumerate(tensors) if t.dtype not in allowed)
            raise TypeError(f"{name}[{position}] is {wrong}; it must be one of {', '.join(map(str, allowed))}")
        if {where for _, where, _ in kinds} != {device}:
            position, wrong = next((i, t.device) for i, t in enumerate(tensors) if t.device != device)
            raise ValueError(f"{name}[{position}] is on {wrong} and params[0] on {device}; pass one device at a time")
        position, wrong = next((i, t.layout) for i, t in enumerate(tensors) if t.layout != torch.strided)
        raise ValueError(f"{name}[{position}] is {wrong}; it must be a dense tensor")
    if set(map(Tensor.numel, steps)) != {1}:
        raise ValueError("every one of steps must hold one element")
    for name, tensors in lists.items():
        if tensors and [tensor.shape for tensor in tensors] != shapes:
            position = next(i for i, t in enumerate(tensors) if t.shape != shapes[i])
            raise ValueError(
                f"{name}[{position}] has shape {tuple(tensors[position].shape)} and its parameter "
                f"{tuple(shapes[position])}"
            )
