"""Lion, with masters, gradient scaling, clipping and overflow skipping in one fused step."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mixft.ops.lion import lion_step_

from .base import MixedPrecisionOptimizer
from .hyperparameters import as_numbers, check_betas, check_not_negative, check_rate


class Lion(MixedPrecisionOptimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2): the sign of an interpolated momentum.

    Signature and state (``exp_avg``) are those of the authors' PyTorch implementation. All else is as in
    :class:`mixft.optim.AdamW`: what it does with masters, clipping and overflows, and the arguments that are not
    listed here.

    Args:
        params: parameters, named parameters or groups of them, of any shapes and strides.
        lr: learning rate, a float or a one-element tensor; the paper takes a third to a tenth of AdamW's.
        betas: weight of the momentum in the step, and decay of the momentum, each in [0, 1).
        weight_decay: decoupled decay; each step multiplies the weights by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.

    Raises:
        TypeError: as AdamW.
        ValueError: a hyperparameter out of range, or as AdamW.
    """

    op = lion_step_
    signed_state: ClassVar[dict[str, bool]] = {"exp_avg": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = True,
        sharded_over: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        defaults = {"lr": lr, "betas": as_numbers(betas), "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
            sharded_over=sharded_over,
        )

    @staticmethod
    def check_hyperparameters(group: dict[str, Any]) -> None:
        check_rate(group)
        check_not_negative(group, "weight_decay")
        check_betas(group)

    @classmethod
    def state_names(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    @classmethod
    def rule(cls, group: dict[str, Any]) -> tuple:
        return (*group["betas"], group["weight_decay"], group["maximize"])
