"""AdamW with FP32 masters, gradient scaling, clipping and overflow skipping in one fused step."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from mixft.ops.adamw import adamw_step_
from mixft.ops.optimizer_step import advance_

from .base import Members, MixedPrecisionOptimizer, Scalars


class AdamW(MixedPrecisionOptimizer):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) for FP32, FP16 and BF16 parameters.

    A drop-in for ``torch.optim.AdamW``: the same formula, hyperparameters, parameter groups and state dictionary, which
    loads there and back. It differs in what it does with 16-bit parameters and with gradients that overflow:

    - A 16-bit parameter has an FP32 master, made from it at its first step, updated there and cast back. Moments are
      FP32 for every parameter. Masters are saved as ``master``. Change such a parameter by hand after the first step
      and the next step puts the master's value back.
    - A step whose gradients hold a NaN or Inf changes nothing: parameters, masters, moments and step counts keep every
      bit. The gradients are read for this at the beginning of every step, after the closure; under a
      ``torch.amp.GradScaler`` the scaler's own finding is taken instead, and with ``max_grad_norm`` both count.
    - ``max_grad_norm`` clips inside the step, by the norm over all groups of the unscaled gradients. A norm that
      exceeds FP32 skips the step. ``float("inf")`` gives ``last_grad_norm`` without clipping.
    - ``torch.amp.GradScaler`` works unchanged, with FP16 parameters too as long as nobody calls ``scaler.unscale_``
      (which refuses FP16 gradients): the scale is taken out inside the step, in FP32, and ``.grad`` keeps it.

    Arithmetic is FP32. The step never waits for the device; ``last_found_inf`` and ``last_grad_norm`` are 0-d tensors
    to be read when convenient.

    Args:
        params: parameters, named parameters or groups of them, of any shapes and strides.
        lr: learning rate, a float or a one-element tensor.
        betas: decay of the first and of the second moment, each in [0, 1); tensors are read once, here.
        eps: added to the denominator.
        weight_decay: decoupled decay; each step multiplies the weights by ``1 - lr * weight_decay``.
        amsgrad: divide by the running maximum of the second moment (Reddi et al. 2018,
            https://arxiv.org/abs/1904.09237).
        maximize: ascend instead of descend.
        max_grad_norm: clip the global gradient norm to this; None for no clipping.
        master_weights: "auto" and "fp32": FP32 masters for 16-bit parameters; "none": 16-bit parameters are updated
            in FP32 and rounded to nearest at every step, which loses updates below half a unit in the last place.
        skip_nonfinite: True skips steps as said above. False takes every step that no scaler forbids, as torch does,
            and saves the read of the gradients: 4 of 32 bytes an FP32 parameter. Not with ``max_grad_norm``.

    Raises:
        TypeError: a parameter is complex, integer, sparse or FP64.
        ValueError: a hyperparameter out of range, or an unknown ``master_weights``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: str = "auto",
        skip_nonfinite: bool = True,
    ) -> None:
        if len({isinstance(beta, Tensor) for beta in betas}) > 1:
            raise ValueError(f"betas is {betas}; they must be both numbers or both tensors")
        defaults = {
            "lr": lr,
            "betas": tuple(map(float, betas)),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, master_weights=master_weights, skip_nonfinite=skip_nonfinite
        )

    @staticmethod
    def check_hyperparameters(group: dict[str, Any]) -> None:
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(group['lr'].shape)}; it must hold one element")
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0.0:
                raise ValueError(f"{name} is {group[name]}; it must not be negative")
        if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"betas is {group['betas']}; it must be two numbers in [0, 1)")

    @staticmethod
    def state_names(group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], members: Members, lr: Tensor, scalars: Scalars) -> None:
        states = members.states
        beta1, beta2 = group["betas"]
        tensors = {
            "params": members.params,
            "grads": members.grads,
            "masters": [state["master"] for state in states] if members.has_master else [],
            "exp_avgs": [state["exp_avg"] for state in states],
            "exp_avg_sqs": [state["exp_avg_sq"] for state in states],
            "max_exp_avg_sqs": [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            "exp_avg_scales": [],
            "exp_avg_sq_scales": [],
            "max_exp_avg_sq_scales": [],
            "steps": [state["step"] for state in states],
        }
        rule = (beta1, beta2, group["eps"], group["weight_decay"], True, group["maximize"], False)
        advance_(adamw_step_, tensors, (lr, scalars.inv_scale, scalars.clip_coef, scalars.found_inf, *rule))
