"""SGD with momentum, with masters, gradient scaling, clipping and overflow skipping in one fused step."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mixft.ops.sgd import sgd_step_

from .base import MixedPrecisionOptimizer
from .hyperparameters import check_not_negative, check_number, check_rate


class SGD(MixedPrecisionOptimizer):
    """Stochastic gradient descent, with momentum and Nesterov's (Sutskever et al. 2013) as torch has them.

    A drop-in for ``torch.optim.SGD``: a parameter's first gradient becomes its momentum buffer, undampened. All else
    is as in :class:`mixft.optim.AdamW`: what it does with masters, clipping and overflows, and the arguments that are
    not listed here.

    Args:
        params: parameters, named parameters or groups of them, of any shapes and strides.
        lr: learning rate, a float or a one-element tensor.
        momentum: decay of the momentum buffer; 0 keeps none.
        dampening: a gradient enters the buffer times ``1 - dampening``.
        weight_decay: this times the weights is added to the gradients.
        nesterov: step along the gradient plus ``momentum`` times the buffer.
        maximize: ascend instead of descend.

    Raises:
        TypeError: as AdamW, or ``weight_decay`` a tensor.
        ValueError: a hyperparameter out of range, ``nesterov`` without momentum or with dampening, or as AdamW.
    """

    op = sgd_step_
    signed_state: ClassVar[dict[str, bool]] = {"momentum_buffer": True}
    restarts_with_new_state = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = True,
        sharded_over: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
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
        check_not_negative(group, "momentum", "weight_decay")
        check_number(group, "dampening")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {group['momentum']} and dampening {group['dampening']}; Nesterov's "
                f"momentum needs a momentum and no dampening"
            )

    @classmethod
    def state_names(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    @classmethod
    def rule(cls, group: dict[str, Any]) -> tuple:
        return tuple(group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize"))
