"""``mixft.ops.lion_``: the whole mixed-precision Lion step of many parameters in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.cpu import lion as routines

from .optimizer_step import SIGNED_STATE, check_step, step_unchecked_
from .registration import define_in_place_op

lion_step_ = define_in_place_op(
    routines.lion_step_, mutates_args=("params", "masters", "exp_avgs", "exp_avg_scales", "steps")
)


@torch.no_grad()
def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    exp_avg_scales: Sequence[Tensor] = (),
    lr: Tensor,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    maximize: bool = False,
    stochastic_rounding: bool = False,
) -> None:
    """Unscale, clip, Lion in FP32 and the cast back, for all parameters at once and without host synchronisation.

    The formula is Lion's (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2) on the gradients times
    ``inv_scale`` times ``clip_coef``, computed in FP32 on the masters, or on the parameters where there are none.
    Where ``found_inf`` is not zero nothing is written at all, step counts included.

    Args:
        params: FP16, BF16 or FP32 tensors of any shapes and strides on one device, changed in place.
        grads: one gradient a parameter, of its shape; FP16, BF16 or FP32, not necessarily the parameter's dtype.
        masters: FP32 weights or int16 remainders, one a parameter, as in :func:`mixft.ops.adamw_`; or empty.
        exp_avgs: momenta, FP32, BF16 or int8 codes (see :func:`mixft.ops.optimizer_state.quantize_state`).
        steps: one-element FP32 tensors, the steps taken so far; each grows by one.
        exp_avg_scales: the scales of 8-bit ``exp_avgs``; empty for other dtypes.
        lr: one-element FP32 tensor, the learning rate.
        inv_scale: one-element FP32 tensor that gradients are multiplied by, or None for 1.
        clip_coef: another, for clipping.
        found_inf: one-element FP32 tensor; not zero skips everything.
        beta1: share of the momentum in the direction of the step.
        beta2: decay of the momentum.
        weight_decay: decoupled decay; each step multiplies the weights by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.
        stochastic_rounding: as in :func:`mixft.ops.adamw_`.

    Raises:
        TypeError: a tensor has another dtype than said above.
        ValueError: lists of different lengths, or a tensor of another shape, layout or device than its parameter.
    """
    tensors = {
        "params": params,
        "grads": grads,
        "masters": masters,
        "exp_avgs": exp_avgs,
        "exp_avg_scales": exp_avg_scales,
        "steps": steps,
    }
    scalars = {"lr": lr, "inv_scale": inv_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    tensors = check_step(tensors, {"exp_avgs": SIGNED_STATE}, (), scalars, stochastic_rounding)
    if tensors["params"]:
        rule = (beta1, beta2, weight_decay, maximize, stochastic_rounding)
        step_unchecked_(lion_step_, tensors, (*scalars.values(), *rule))
