"""AdamW and Adam, with masters, gradient scaling, clipping and overflow skipping in one fused step."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mixft.ops.adamw import adamw_step_

from .base import MixedPrecisionOptimizer
from .hyperparameters import as_numbers, check_betas, check_not_negative, check_rate


class Adam(MixedPrecisionOptimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) for FP32, FP16 and BF16 parameters.

    A drop-in for ``torch.optim.Adam``. ``weight_decay`` is an L2 penalty, added to the gradient. All else is as in
    :class:`mixft.optim.AdamW`: its arguments, what it raises, and what it does with masters, clipping and overflows.

    Args:
        weight_decay: this times the weights is added to the gradients.

    Raises:
        TypeError: as AdamW.
        ValueError: as AdamW.
    """

    op = adamw_step_
    signed_state: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
    needs_step = True
    decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
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
            "betas": as_numbers(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
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
        check_not_negative(group, "eps", "weight_decay")
        check_betas(group)

    @classmethod
    def state_names(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    @classmethod
    def rule(cls, group: dict[str, Any]) -> tuple:
        return (*group["betas"], group["eps"], group["weight_decay"], cls.decoupled, group["maximize"])


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) for FP32, FP16 and BF16 parameters.

    A drop-in for ``torch.optim.AdamW``: the same formula, hyperparameters, parameter groups and state dictionary, which
    loads there and back. It differs in what it does with 16-bit parameters and with gradients that overflow:

    - A 16-bit parameter has an FP32 master, made from it at its first step, updated there and cast back. Masters are
      saved as ``master``. Change such a parameter by hand after the first step and the next step puts the master's
      value back. With ``master_weights="split"`` the parameter is the master's upper half and 16 bits beside it are
      the rest: a change by hand stays.
    - State is FP32 for every parameter, or what ``state_dtype`` says; in a state dictionary it is always FP32.
    - A step whose gradients hold a NaN or Inf changes nothing: parameters, masters, state and step counts keep every
      bit. The gradients are read for this at the beginning of every step, after the closure; under a
      ``torch.amp.GradScaler`` the scaler's own finding is taken instead, and with ``max_grad_norm`` both count.
    - ``max_grad_norm`` clips inside the step, by the norm over all groups of the unscaled gradients. A norm that
      exceeds FP32 skips the step. ``float("inf")`` gives ``last_grad_norm`` without clipping.
    - Check and norm cover the gradients that this process has. Parameters that are DTensors, as those of
      ``fully_shard`` and of tensor parallelism are, know who has the rest: all processes clip by the model's norm, and
      skip together, for one ``all_reduce`` of two numbers a step and mesh dimension. State is kept for a process's own
      piece, and is DTensors in a state dictionary, 8-bit state and split masters too. Where parameters are plain shards
      of a model's, give ``sharded_over``.
    - ``torch.amp.GradScaler`` works unchanged, with FP16 parameters too as long as nobody calls ``scaler.unscale_``
      (which refuses FP16 gradients): the scale is taken out inside the step, in FP32, and ``.grad`` keeps it.

    Arithmetic is FP32. The step never waits for the device and can be captured in a CUDA graph, once one step before
    has made the state (with ``lr`` a tensor on the parameters' device where it is to change between replays), so there
    is no ``capturable``, ``fused`` or ``foreach``; ``last_found_inf`` and ``last_grad_norm`` are 0-d tensors to be read
    when convenient. Under ``torch.compile`` the step runs as it is, between two graphs.

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
        master_weights: "auto" and "fp32": FP32 masters for 16-bit parameters. "split": the same weights in half the
            bytes, exactly for BF16 (see :func:`mixft.ops.optimizer_state.split_master`). "none": 16-bit parameters are
            updated in FP32 and rounded at every step, which to nearest loses updates below half a unit in the last
            place.
        state_dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8``: block-wise 8-bit floating point (see
            :func:`mixft.ops.optimizer_state.quantize_state`).
        stochastic_rounding: with ``master_weights="none"``, round 16-bit parameters up or down at random so that the
            mean is right, instead of to nearest.
        skip_nonfinite: True skips steps as said above. False takes every step that no scaler forbids, as torch does,
            and saves the read of the gradients: 4 of 32 bytes an FP32 parameter. Not with ``max_grad_norm``.
        sharded_over: the process group over which one model's parameters are divided: sums of squares and findings are
            added up over it, in one ``all_reduce`` of two numbers a step, before gradients are clipped or the step is
            skipped. Every process of the group has to take every step, with gradients or without, and to have the same
            options; a parameter that several of them hold counts as often. For ``FullyShardedDataParallel`` with
            ``use_orig_params=True``, and for ``ZeroRedundancyOptimizer``, which has to get it in
            ``functools.partial(AdamW, sharded_over=group)`` for its optimizer's class. A GradScaler's own scale still
            follows what its process found; :class:`mixft.amp.LossScaler`'s follows all. It is in no state dictionary,
            and None again in an optimizer that was pickled. None: this process's gradients are all there are, as they
            are in ``DistributedDataParallel``.

    Raises:
        TypeError: a parameter is complex, integer, sparse, FP64 or a DTensor placed as a sum; or ``sharded_over`` is
            no process group.
        ValueError: a hyperparameter out of range, an unknown ``master_weights`` or ``state_dtype``, or options that
            exclude each other.
    """

    decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: str = "auto",
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = True,
        sharded_over: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            skip_nonfinite=skip_nonfinite,
            sharded_over=sharded_over,
        )
