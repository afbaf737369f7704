"""``mixft.ops.adamw_``: the whole mixed-precision AdamW or Adam step of many parameters, one launch per dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.cpu import adamw as routines

from .optimizer_step import SIGNED_STATE, UNSIGNED_STATE, check_step, step_unchecked_
from .registration import define_in_place_op

adamw_step_ = define_in_place_op(
    routines.adamw_step_,
    mutates_args=(
        "params",
        "masters",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "exp_avg_scales",
        "exp_avg_sq_scales",
        "max_exp_avg_sq_scales",
        "steps",
    ),
)


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
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    max_exp_avg_sq_scales: Sequence[Tensor] = (),
    lr: Tensor,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    stochastic_rounding: bool = False,
) -> None:
    """Unscale, clip, AdamW in FP32 and the cast back, for all parameters at once and without host synchronisation.

    The formula is that of ``torch.optim.AdamW`` (``torch.optim.Adam`` where ``decoupled`` is False) on the gradients
    times ``inv_scale`` times ``clip_coef``, computed in FP32 on the masters, or on the parameters where there are no
    masters. Gradients are left as they are. Where ``found_inf`` is not zero nothing is written at all, step counts
    included.

    Args:
        params: FP16, BF16 or FP32 tensors of any shapes and strides on one device, changed in place.
        grads: one gradient a parameter, of its shape; FP16, BF16 or FP32, not necessarily the parameter's dtype.
        masters: FP32 weights, one a parameter, changed in place and cast to it; or int16 remainders of FP32 weights,
            whose upper half is the FP16 or BF16 parameter (:func:`mixft.ops.optimizer_state.split_master`); or empty:
            each parameter is its own master, and a 16-bit one is rounded at every step.
        exp_avgs: first moments, FP32, BF16 or int8 codes (see :func:`mixft.ops.optimizer_state.quantize_state`).
        exp_avg_sqs: second moments, FP32, BF16 or uint8 codes.
        max_exp_avg_sqs: running maxima of the second moments for AMSGrad, likewise; or empty: no AMSGrad.
        steps: one-element FP32 tensors, the steps taken so far; each grows by one.
        exp_avg_scales: the scales of 8-bit ``exp_avgs``; empty for other dtypes.
        exp_avg_sq_scales: the scales of 8-bit ``exp_avg_sqs``.
        max_exp_avg_sq_scales: the scales of 8-bit ``max_exp_avg_sqs``.
        lr: one-element FP32 tensor, the learning rate.
        inv_scale: one-element FP32 tensor that gradients are multiplied by, or None for 1.
        clip_coef: another, for clipping.
        found_inf: one-element FP32 tensor; not zero skips everything.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled: each step multiplies the weights by ``1 - lr * weight_decay``; else: this times the
            weights is added to the gradients.
        decoupled: True is AdamW, False Adam with L2 regularization.
        maximize: ascend instead of descend.
        stochastic_rounding: round 16-bit parameters without masters up or down at random, unbiased, instead of to
            nearest. The random numbers are a function of the element's index and the step count.

    Raises:
        TypeError: a tensor has another dtype than said above.
        ValueError: lists of different lengths, or a tensor of another shape, layout or device than its parameter.
    """
    tensors = {
        "params": params,
        "grads": grads,
        "masters": masters,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "max_exp_avg_sq_scales": max_exp_avg_sq_scales,
        "steps": steps,
    }
    states = {"exp_avgs": SIGNED_STATE, "exp_avg_sqs": UNSIGNED_STATE, "max_exp_avg_sqs": UNSIGNED_STATE}
    scalars = {"lr": lr, "inv_scale": inv_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    tensors = check_step(tensors, states, ("max_exp_avg_sqs",), scalars, stochastic_rounding)
    if tensors["params"]:
        rule = (beta1, beta2, eps, weight_decay, decoupled, maximize, stochastic_rounding)
        step_unchecked_(adamw_step_, tensors, (*scalars.values(), *rule))
