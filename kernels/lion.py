"""Lion over many tensors, a launch per (parameter dtype, gradient dtype, alignment).

The formula is in ``update_rule.py``. The tensors are those of ``optimizer_step.py``; the momentum is FP32, BF16, or
int8 codes with their scales.
"""

import torch
from torch import Tensor

from .architecture import Architecture
from .step_launch import UpdateRule, launch_step, step_variant
from .variant import Variant


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
    """Step every parameter; see :func:`mixft.ops.lion_` for the arguments, all checked there."""
    rule = UpdateRule("lion", maximize, weight_decay, one_minus_beta1=1.0 - beta1, one_minus_beta2=1.0 - beta2)
    launch_step(
        params,
        grads,
        masters,
        [exp_avgs],
        [exp_avg_scales],
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
    rule = UpdateRule("lion", maximize=False, weight_decay=0.01, one_minus_beta1=0.1, one_minus_beta2=0.01)
    return [
        step_variant(arch, rule, single, single),
        step_variant(arch, rule, half, half, master="fp32"),
        step_variant(arch, rule, brain, brain, master="split", state="code"),
    ]
