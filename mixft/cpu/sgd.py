"""SGD on the CPU: compiled, or torch's fused kernel on FP32 weights."""

from ctypes import c_double, c_int, c_void_p

import torch
from torch import Tensor

from . import native
from .compiled_step import compiled_step
from .optimizer_step import Step, optimizer_step_

compiled = native.Routine("sgd_step", c_void_p, *[c_double] * 4, c_int)


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
    """``mixft.kernels.sgd.sgd_step_`` on the CPU."""
    states, scales = [momentum_buffers], [momentum_buffer_scales]
    step = Step(params, grads, masters, states, scales, steps, inv_scale, clip_coef, found_inf, stochastic_rounding)
    if native.available():
        hyperparameters = lr.item(), momentum, dampening, weight_decay, nesterov
        compiled_step(compiled, step, maximize, *hyperparameters)
        return
    options = {
        "lr": lr.item(),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }

    def update(
        weights: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], counts: list[Tensor]
    ) -> None:
        # torch is told by one flag for a whole call whether buffers are yet to begin.
        at_first_step = [count.item() == 1.0 for count in counts]
        for is_first in set(at_first_step):
            chosen = [position for position, first in enumerate(at_first_step) if first == is_first]
            listed = [
                [tensors[position] for position in chosen if tensors] for tensors in (weights, gradients, *moments)
            ]
            torch._fused_sgd_(*listed, is_first_step=is_first, **options)

    optimizer_step_(step, update)
