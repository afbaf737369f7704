"""AdamW and Adam over many tensors, a launch per (parameter dtype, gradient dtype, alignment).

The formulas are in ``update_rule.py``. The tensors are those of ``optimizer_step.py``; moments are FP32, BF16, or 8-bit
codes with their scales.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .architecture import Architecture
from .step_launch import UpdateRule, launch_step, step_variant
from .variant import Variant


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
    """Step every parameter; see :func:`mixft.ops.adamw_` for the arguments, all checked there."""
    rule = _rule(beta1, beta2, eps, weight_decay, decoupled, maximize)
    launch_step(
        params,
        grads,
        masters,
        [exp_avgs, exp_avg_sqs, max_exp_avg_sqs],
        [exp_avg_scales, exp_avg_sq_scales, max_exp_avg_sq_scales],
        steps,
        lr,
        inv_scale,
        clip_coef,
        found_inf,
        stochastic_rounding,
        rule,
    )


def variants(arch: Architecture) -> list[Variant]:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    adamw = _rule(0.9, 0.999, 1e-8, 0.01, decoupled=True, maximize=False)
    adam = replace(adamw, decoupled=False)
    return [
        step_variant(arch, adamw, single, single, scaled=False),
        step_variant(arch, replace(adamw, maximize=True), single, single, amsgrad=True),
        step_variant(arch, adam, single, single),
        step_variant(arch, adamw, single, single, state="code"),
        step_variant(arch, adamw, half, half, master="fp32"),
        step_variant(arch, adamw, half, half, master="fp32", amsgrad=True),
        step_variant(arch, adamw, brain, brain, master="fp32"),
        step_variant(arch, adamw, half, single, master="fp32"),
        step_variant(arch, adamw, half, half, master="fp32", aligned=False),
        step_variant(arch, adamw, half, half, master="split"),
        step_variant(arch, adamw, brain, brain, master="split", state="bf16"),
        step_variant(arch, adamw, half, half, master="split", state="code"),
        step_variant(arch, adamw, brain, brain, master="split", state="code"),
        step_variant(arch, adamw, brain, brain, master="split", state="code", amsgrad=True),
        step_variant(arch, adamw, brain, single, master="split", state="code"),
        step_variant(arch, adam, brain, brain, master="split", state="code", aligned=False),
        step_variant(arch, adamw, brain, brain, stochastic=True, state="bf16"),
        step_variant(arch, adamw, brain, brain, stochastic=True, state="code"),
    ]


def _rule(beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, maximize: bool) -> UpdateRule:
    return UpdateRule(
        "adam",
        maximize,
        weight_decay,
        decoupled=decoupled,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
