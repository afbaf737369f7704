"""The host's side of the optimizer step: one launch for each (parameter dtype, gradient dtype, alignment)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Architecture, architecture_of
from .configuration import configuration
from .multi_tensor import (
    TRITON_NAMES,
    TRITON_TYPES,
    MultiTensorConfig,
    addresses,
    dtypes_of,
    groups_of,
    launches,
    multi_tensor_variant,
    sizes_of,
)
from .optimizer_state import GROUP_SIZE
from .optimizer_step import COLUMNS, PARAM, optimizer_step_kernel
from .variant import Variant

STATE_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "code", torch.uint8: "code"}
MASTER_FORMATS = {torch.float32: "fp32", torch.int16: "split"}
# Columns of the table: all but the size and the step count.
VECTORS = PARAM.value, COLUMNS.value


@dataclass(frozen=True)
class UpdateRule:
    """What a rule passes to the kernel: compile-time choices, and hyperparameters, None for those it does not have."""

    rule: str
    maximize: bool
    weight_decay: float
    decoupled: bool = False
    nesterov: bool = False
    log_beta1: float | None = None
    log_beta2: float | None = None
    one_minus_beta1: float | None = None
    beta2: float | None = None
    one_minus_beta2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    one_minus_dampening: float | None = None


# In the kernel's order, which has the compile-time choices under capitals.
HYPERPARAMETERS = [name for name in optimizer_step_kernel.arg_names if name in UpdateRule.__dataclass_fields__]


def launch_step(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    states: list[list[Tensor]],
    scales: list[list[Tensor]],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    stochastic_rounding: bool,
    rule: UpdateRule,
) -> None:
    """Launch the kernel once for each group; empty lists mean "none".

    Args:
        states: first moments, second moments and AMSGrad's maxima, as many as the rule has.
        scales: the scales of each.
    """
    device = params[0].device
    none = [[]] * (3 - len(states))
    tensors = [steps, params, grads, masters, *states, *none, *scales, *none]
    columns = (sizes_of(params), *(addresses(listed) if listed else None for listed in tensors))
    groups = groups_of((dtypes_of(params), dtypes_of(grads)), columns, VECTORS)
    # Floats always: Triton compiles the kernel once more for an integer, and again for 1 and for multiples of 16.
    hyperparameters = [None if (value := getattr(rule, name)) is None else float(value) for name in HYPERPARAMETERS]
    state = STATE_FORMATS[states[0][0].dtype] if states[0] else "none"
    with torch.cuda.device_of(params[0]):
        config = _config(architecture_of(device), state)
        for (param_dtype, grad_dtype), table, programs, constants in launches(groups, config, device):
            optimizer_step_kernel[(programs.count,)](
                table, programs.tensor, programs.chunk, programs.tickets,
                lr, inv_scale, clip_coef, found_inf,
                *hyperparameters,
                RULE=rule.rule, PARAM_TYPE=TRITON_TYPES[param_dtype], GRAD_TYPE=TRITON_TYPES[grad_dtype],
                MASTER=MASTER_FORMATS[masters[0].dtype] if masters else "none", STATE=state,
                AMSGRAD=len(states) == 3 and bool(states[2]),
                DECOUPLED=rule.decoupled, NESTEROV=rule.nesterov, MAXIMIZE=rule.maximize,
                STOCHASTIC=stochastic_rounding,
                **constants,
            )  # fmt: skip


def step_variant(
    arch: Architecture,
    rule: UpdateRule,
    param: torch.dtype,
    grad: torch.dtype,
    *,
    master: str = "none",
    state: str = "fp32",
    amsgrad: bool = False,
    scaled: bool = True,
    stochastic: bool = False,
    aligned: bool = True,
) -> Variant:
    """The variant of one launch; ``scaled`` is whether it has ``inv_scale``, ``clip_coef`` and ``found_inf``."""
    moments = 2 + amsgrad if rule.rule == "adam" else 1
    flags = {
        "decoupled": rule.decoupled,
        "nesterov": rule.nesterov,
        "amsgrad": amsgrad,
        "maximize": rule.maximize,
        "stochastic": stochastic,
        "unscaled": not scaled,
    }
    types = [TRITON_NAMES[param], TRITON_NAMES[grad], f"{master} master", f"{state} state"]
    scalars = ("inv_scale", "clip_coef", "found_inf")
    return multi_tensor_variant(
        rule.rule,
        types + [name for name, is_set in flags.items() if is_set],
        optimizer_step_kernel,
        {
            "tickets": "*i64",
            "lr": "*fp32",
            **dict.fromkeys(scalars, "*fp32" if scaled else None),
            **{name: None if getattr(rule, name) is None else "fp32" for name in HYPERPARAMETERS},
        },
        {
            "RULE": rule.rule,
            "PARAM_TYPE": TRITON_TYPES[param],
            "GRAD_TYPE": TRITON_TYPES[grad],
            "MASTER": master,
            "STATE": state,
            "AMSGRAD": amsgrad,
            "DECOUPLED": rule.decoupled,
            "NESTEROV": rule.nesterov,
            "MAXIMIZE": rule.maximize,
            "STOCHASTIC": stochastic,
        },
        _config(arch, state),
        aligned,
        _floor_bytes(param, grad, master, state, moments),
        indivisible=("lr", *scalars),
    )


def _config(arch: Architecture, state: str) -> MultiTensorConfig:
    bucket = {"bf16": "bf16 state", "code": "8-bit state"}.get(state, "fp32 state")
    return configuration("optimizer_step", MultiTensorConfig, arch, bucket)


def _floor_bytes(param: torch.dtype, grad: torch.dtype, master: str, state: str, moments: int) -> float:
    """Bytes an element: the gradient read, everything else read and written."""
    # With a master the parameter is only written, with a remainder it is half of the master.
    weights = {"none": 2 * param.itemsize, "fp32": param.itemsize + 8, "split": 2 * param.itemsize + 4}[master]
    each = {"none": 0.0, "fp32": 4.0, "bf16": 2.0, "code": 1 + 1 / GROUP_SIZE.value}[state]
    return grad.itemsize + weights + 2 * moments * each
