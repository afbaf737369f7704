"""``mixft.ops.sgd_``: the whole mixed-precision SGD step of many parameters in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.cpu import sgd as routines

from .optimizer_step import SIGNED_STATE, check_step, step_unchecked_
from .registration import define_in_place_op

sgd_step_ = define_in_place_op(
    routines.sgd_step_, mutates_args=("params", "masters", "momentum_buffers", "momentum_buffer_scales", "steps")
)


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    momentum_buffer_scales: Sequence[Tensor] = (),
    lr: Tensor,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    stochastic_rounding: bool = False,
) -> None:
    """Unscale, clip, SGD in FP32 and the cast back, for all parameters at once and without host synchronisation.

    The formula is that of ``torch.optim.SGD`` on the gradients times ``inv_scale`` times ``clip_coef``, computed in
    FP32 on the masters, or on the parameters where there are no masters. A parameter whose step count is zero takes
    its gradient as its momentum buffer, whatever the buffer held, as torch does; to go on from a buffer of
    ``torch.optim.SGD``, set the step count to one. Where ``found_inf`` is not zero nothing is written at all.

    Args:
        params: FP16, BF16 or FP32 tensors of any shapes and strides on one device, changed in place.
        grads: one gradient a parameter, of its shape; FP16, BF16 or FP32, not necessarily the parameter's dtype.
        masters: FP32 weights or int16 remainders, one a parameter, as in :func:`mixft.ops.adamw_`; or empty.
        momentum_buffers: FP32, BF16 or int8 codes (:func:`mixft.ops.optimizer_state.quantize_state`); or empty. Left
            alone where ``momentum`` is 0.
        steps: one-element FP32 tensors, the steps taken so far; each grows by one.
        momentum_buffer_scales: the scales of 8-bit ``momentum_buffers``; empty for other dtypes.
        lr: one-element FP32 tensor, the learning rate.
        inv_scale: one-element FP32 tensor that gradients are multiplied by, or None for 1.
        clip_coef: another, for clipping.
        found_inf: one-element FP32 tensor; not zero skips everything.
        momentum: decay of the momentum buffer.
        dampening: the gradient enters the buffer times ``1 - dampening``, except at the first step.
        weight_decay: this times the weights is added to the gradients.
        nesterov: step along the gradient plus ``momentum`` times the buffer.
        maximize: ascend instead of descend.
        stochastic_rounding: as in :func:`mixft.ops.adamw_`.

    Raises:
        TypeError: a tensor has another dtype than said above.
        ValueError: lists of different lengths, a tensor of another shape, layout or device than its parameter, or
            ``momentum`` without buffers.
    """
    if momentum and params and not momentum_buffers:
        raise ValueError(f"momentum is {momentum} and momentum_buffers is empty; pass one buffer a parameter")
    if nesterov and not momentum:
        raise ValueError("nesterov is True and momentum is 0; Nesterov momentum needs a momentum")
    tensors = {
        "params": params,
        "grads": grads,
        "masters": masters,
        "momentum_buffers": momentum_buffers,
        "momentum_buffer_scales": momentum_buffer_scales,
        "steps": steps,
    }
    states = {"momentum_buffers": SIGNED_STATE}
    scalars = {"lr": lr, "inv_scale": inv_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    tensors = check_step(tensors, states, ("momentum_buffers",), scalars, stochastic_rounding)
    if not momentum:
        # As in torch, buffers beside no momentum are left alone.
        tensors |= {"momentum_buffers": [], "momentum_buffer_scales": []}
    if tensors["params"]:
        rule = (momentum, dampening, weight_decay, nesterov, maximize, stochastic_rounding)
        step_unchecked_(sgd_step_, tensors, (*scalars.values(), *rule))
