"""AdamW and Adam on the CPU: torch's fused kernels on FP32 weights."""

import torch
from torch import Tensor

from .optimizer_step import optimizer_step_


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

    optimizer_step_(
        params,
        grads,
        masters,
        [exp_avgs, exp_avg_sqs, max_exp_avg_sqs],
        [exp_avg_scales, exp_avg_sq_scales, max_exp_avg_sq_scales],
        steps,
        inv_scale,
        clip_coef,
        found_inf,
        stochastic_rounding,
        update,
    )
