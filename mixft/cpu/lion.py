"""Lion on the CPU: compiled, or by torch's operators over lists of tensors."""

import math
from ctypes import c_double, c_void_p

import torch
from torch import Tensor

from . import native
from .compiled_step import compiled_step
from .optimizer_state import may_hold_nan
from .optimizer_step import Step, optimizer_step_

compiled = native.Routine("lion_step", c_void_p, *[c_double] * 4)


def lion_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_scales: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """``mixft.kernels.lion.lion_step_`` on the CPU."""
    rate = lr.item()
    states, scales = [exp_avgs], [exp_avg_scales]
    step = Step(params, grads, masters, states, scales, steps, inv_scale, clip_coef, found_inf, stochastic_rounding)
    if native.available():
        compiled_step(compiled, step, maximize, rate, beta1, beta2, weight_decay)
        return

    def update(
        weights: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], counts: list[Tensor]
    ) -> None:
        (averages,) = moments
        if maximize:
            gradients = torch._foreach_neg(gradients)
        directions = torch._foreach_lerp(averages, gradients, 1 - beta1)
        signs = torch._foreach_sign(directions)
        for direction, sign in zip(directions, signs, strict=True):
            # torch's sign of a NaN is 0.
            if may_hold_nan(direction):
                sign.masked_fill_(direction.isnan(), math.nan)
        torch._foreach_mul_(weights, 1 - rate * weight_decay)
        torch._foreach_add_(weights, signs, alpha=-rate)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)

    optimizer_step_(step, update)
