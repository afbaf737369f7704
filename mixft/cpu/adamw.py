"""AdamW and Adam on the CPU: compiled, or torch's fused kernels on FP32 weights."""

from ctypes import c_double, c_int, c_void_p

import torch
from torch import Tensor

from . import native
from .compiled_step import compiled_step
from .optimizer_step import Step, optimizer_step_

compiled = native.Routine("adamw_step", c_void_p, c_void_p, *[c_double] * 5, c_int)


def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    max_exp_avg_sq_scales: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """``mixft.kernels.adamw.adamw_step_`` on the CPU."""
    states = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    scales = [exp_avg_scales, exp_avg_sq_scales, max_exp_avg_sq_scales]
    step = Step(params, grads, masters, states, scales, steps, inv_scale, clip_coef, found_inf, stochastic_rounding)
    if native.available():
        # Two FP32 numbers a tensor.
        corrections = native.scratch(8 * len(params))
        hyperparameters = lr.item(), beta1, beta2, eps, weight_decay, decoupled
        compiled_step(compiled, step, maximize, corrections.data_ptr(), *hyperparameters)
        return
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    options = {
        "lr": lr.item(),
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": eps,
        "amsgrad": bool(max_exp_avg_sqs),
        "maximize": maximize,
    }

    def update(
        weights: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], counts: list[Tensor]
    ) -> None:
        fused(weights, gradients, *moments, counts, **options)

    optimizer_step_(step, update)
