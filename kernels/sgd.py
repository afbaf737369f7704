"""SGD over many tensors, a launch per (parameter dtype, gradient dtype, alignment).

The formula is in ``update_rule.py``. The tensors are those of ``optimizer_step.py``; the momentum buffer is FP32, BF16,
or int8 codes with their scales.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .architecture import Architecture
from .step_launch import UpdateRule, launch_step, step_variant
from .variant import Variant


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momentum_buffers: list[Tensor],
    momentum_buffer_scales: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """Step every parameter; see :func:`mixft.ops.sgd_` for the arguments, all checked there."""
    rule = UpdateRule(
        "sgd", maximize, weight_decay, nesterov=nesterov, momentum=momentum, one_minus_dampening=1.0 - dampening
    )
    launch_step(
        params,
        grads,
        masters,
        [momentum_buffers],
        [momentum_buffer_scales],
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
    plain = UpdateRule("sgd", maximize=False, weight_decay=0.01, momentum=0.9, one_minus_dampening=1.0)
    nesterov = replace(plain, nesterov=True)
    return [
        step_variant(arch, plain, single, single, state="none"),
        step_variant(arch, nesterov, single, single),
        step_variant(arch, plain, half, half, master="fp32"),
        step_variant(arch, nesterov, brain, brain, master="split", state="code"),
    ]
