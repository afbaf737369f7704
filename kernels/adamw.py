"""AdamW over many tensors in one launch: unscale, clip, update of the FP32 weights, cast to the parameter's dtype.

For each element, with t = step + 1 (Loshchilov and Hutter 2019, in the arrangement of ``torch.optim.AdamW``)::

    g     <- grad * inv_scale * clip_coef         (negated when maximizing)
    p     <- p * (1 - lr * weight_decay)          p: the master, or the parameter where there is none
    m     <- m + (1 - beta1) * (g - m)
    v     <- beta2 * v + (1 - beta2) * g^2
    u     <- v, or with AMSGrad vmax <- max(vmax, v) and u <- vmax   (Reddi et al. 2018)
    p     <- p - lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps)
    param <- p rounded to the parameter's dtype,  step <- t

Nothing is written when ``found_inf`` is not zero. ``params`` and ``grads`` are FP16, BF16 or FP32; masters and moments
FP32; each step, ``lr``, ``inv_scale``, ``clip_coef`` and ``found_inf`` one-element FP32 tensors on the device. All
tensors of one parameter keep their elements in storage without gaps and in the same order. Arithmetic is FP32.
"""

import math
from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture, architecture_of
from .configuration import configuration
from .multi_tensor import (
    TRITON_NAMES,
    TRITON_TYPES,
    MultiTensorConfig,
    addresses,
    programs_for,
    table_for,
    tensor_pointer,
)
from .variant import Variant

# Table columns; MASTER and MAX_EXP_AVG_SQ are zero where the launch has none.
SIZE, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, MASTER, MAX_EXP_AVG_SQ = (tl.constexpr(i) for i in range(8))
COLUMNS = tl.constexpr(8)


@triton.jit
def one_minus_power(log_beta, step):
    """1 - beta^step from ln(beta), without the cancellation of 1 - 0.999 in FP32."""
    x = log_beta * step
    # Near zero the series of exp(x) - 1, whose eleventh term is below FP32 resolution at |x| = 0.5.
    series = 1.0 + x * (1.0 / 10.0)
    for i in tl.static_range(8):
        series = 1.0 + x * series * (1.0 / (9.0 - i))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_rule(p, g, m, v, v_max, decay, step_size, bias2_sqrt, eps, one_minus_beta1, beta2, one_minus_beta2):
    p = p * decay
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    # Comparison by hand: a maximum that drops NaN would hide one.
    v_max = tl.where(v_max > v, v_max, v)
    p = p - step_size * (m / (tl.sqrt(v_max) / bias2_sqrt + eps))
    return p, m, v, v_max


@triton.jit
def adamw_block(
    param,
    grad,
    master,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    at,
    mask,
    factor,
    decay,
    step_size,
    bias2_sqrt,
    eps,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    PARAM_TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    g = tl.load(grad + at, mask=mask).to(tl.float32) * factor
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    if HAS_MASTER:
        p = tl.load(master + at, mask=mask)
    else:
        p = tl.load(param + at, mask=mask).to(tl.float32)
    if AMSGRAD:
        v_max = tl.load(max_exp_avg_sq + at, mask=mask)
    else:
        v_max = tl.zeros_like(v)
    p, m, v, v_max = adamw_rule(
        p, g, m, v, v_max, decay, step_size, bias2_sqrt, eps, one_minus_beta1, beta2, one_minus_beta2
    )
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    if AMSGRAD:
        tl.store(max_exp_avg_sq + at, v_max, mask=mask)
    if HAS_MASTER:
        tl.store(master + at, p, mask=mask)
    tl.store(param + at, p.to(PARAM_TYPE), mask=mask)


@triton.jit
def advance_step(table, program_tensor, tickets, CHUNK: tl.constexpr):
    """Add one to the step of this program's tensor, if this program is the last of that tensor's to finish."""
    # Read again rather than kept: registers held through the loop above would spill.
    tensor = tl.load(program_tensor + tl.program_id(0)).to(tl.int64)
    row = table + tensor * COLUMNS
    chunks = tl.maximum((tl.load(row + SIZE) + CHUNK - 1) // CHUNK, 1)
    # Every thread has read the step before its program takes a ticket, so the taker of the last one may write it.
    tl.debug_barrier()
    if tl.atomic_add(tickets + tensor, 1) == chunks - 1:
        step = tensor_pointer(row, STEP, tl.float32, False)
        tl.store(step, tl.load(step) + 1.0)
        tl.store(tickets + tensor, 0)


@triton.jit
def adamw_kernel(
    table,
    program_tensor,
    program_chunk,
    tickets,
    lr,
    inv_scale,
    clip_coef,
    found_inf,
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    overflow = 0.0
    if found_inf is not None:
        overflow = tl.load(found_inf)
    if overflow != 0.0:
        return
    program = tl.program_id(0)
    tensor = tl.load(program_tensor + program).to(tl.int64)
    start = tl.load(program_chunk + program).to(tl.int64) * CHUNK
    row = table + tensor * COLUMNS
    size = tl.load(row + SIZE)
    step = tl.load(tensor_pointer(row, STEP, tl.float32, False)) + 1.0

    factor = -1.0 if MAXIMIZE else 1.0
    if inv_scale is not None:
        factor *= tl.load(inv_scale)
    if clip_coef is not None:
        factor *= tl.load(clip_coef)
    rate = tl.load(lr)
    decay = 1.0 - rate * weight_decay
    step_size = rate / one_minus_power(log_beta1, step)
    bias2_sqrt = tl.sqrt(one_minus_power(log_beta2, step))

    param = tensor_pointer(row, PARAM, PARAM_TYPE, ALIGNED) + start
    grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
    exp_avg = tensor_pointer(row, EXP_AVG, tl.float32, ALIGNED) + start
    exp_avg_sq = tensor_pointer(row, EXP_AVG_SQ, tl.float32, ALIGNED) + start
    master = exp_avg
    if HAS_MASTER:
        master = tensor_pointer(row, MASTER, tl.float32, ALIGNED) + start
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tensor_pointer(row, MAX_EXP_AVG_SQ, tl.float32, ALIGNED) + start

    lanes = tl.arange(0, BLOCK)
    # Full chunks go without a mask: a mask that the compiler cannot see through makes every access scalar.
    if start + CHUNK <= size:
        for offset in range(0, CHUNK, BLOCK):
            adamw_block(
                param,
                grad,
                master,
                exp_avg,
                exp_avg_sq,
                max_exp_avg_sq,
                offset + lanes,
                None,
                factor,
                decay,
                step_size,
                bias2_sqrt,
                eps,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                PARAM_TYPE,
                HAS_MASTER,
                AMSGRAD,
            )
    else:
        left = (size - start).to(tl.int32)
        for offset in range(0, left, BLOCK):
            adamw_block(
                param,
                grad,
                master,
                exp_avg,
                exp_avg_sq,
                max_exp_avg_sq,
                offset + lanes,
                offset + lanes < left,
                factor,
                decay,
                step_size,
                bias2_sqrt,
                eps,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                PARAM_TYPE,
                HAS_MASTER,
                AMSGRAD,
            )

    advance_step(table, program_tensor, tickets, CHUNK)


def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Launch ``adamw_kernel`` once for each (parameter dtype, gradient dtype, alignment); empty lists mean "none"."""
    device = params[0].device
    columns = [
        list(map(Tensor.numel, params)),
        *(addresses(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)),
        addresses(masters) if masters else [0] * len(params),
        addresses(max_exp_avg_sqs) if max_exp_avg_sqs else [0] * len(params),
    ]
    rows = list(zip(*columns, strict=True))
    groups = defaultdict(list)
    for param, grad, row in zip(params, grads, rows, strict=True):
        step_free = row[PARAM.value] | row[GRAD.value] | row[EXP_AVG.value] | row[EXP_AVG_SQ.value]
        is_aligned = (step_free | row[MASTER.value] | row[MAX_EXP_AVG_SQ.value]) % 16 == 0
        groups[param.dtype, grad.dtype, is_aligned].append(row)

    with torch.cuda.device_of(params[0]):
        config = _config(architecture_of(device))
        for (param_dtype, grad_dtype, is_aligned), members in groups.items():
            columns = list(zip(*members, strict=True))
            programs = programs_for(columns[SIZE.value], config.chunk, device)
            adamw_kernel[(programs.count,)](
                table_for(columns, device),
                programs.tensor,
                programs.chunk,
                programs.tickets,
                lr,
                inv_scale,
                clip_coef,
                found_inf,
                _log(beta1),
                _log(beta2),
                1.0 - beta1,
                beta2,
                1.0 - beta2,
                eps,
                weight_decay,
                PARAM_TYPE=TRITON_TYPES[param_dtype],
                GRAD_TYPE=TRITON_TYPES[grad_dtype],
                HAS_MASTER=bool(masters),
                AMSGRAD=bool(max_exp_avg_sqs),
                MAXIMIZE=maximize,
                ALIGNED=is_aligned,
                CHUNK=config.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
                num_stages=1,
            )


def variants(arch: Architecture) -> list[Variant]:
    return [
        _variant(arch, torch.float32, torch.float32, scales=False),
        _variant(arch, torch.float32, torch.float32, amsgrad=True, maximize=True),
        _variant(arch, torch.float16, torch.float16, has_master=True),
        _variant(arch, torch.float16, torch.float16, has_master=True, amsgrad=True),
        _variant(arch, torch.bfloat16, torch.bfloat16, has_master=True),
        _variant(arch, torch.float16, torch.float32, has_master=True),
        _variant(arch, torch.bfloat16, torch.bfloat16),
        _variant(arch, torch.float16, torch.float16, has_master=True, is_aligned=False),
    ]


def _variant(
    arch: Architecture,
    param: torch.dtype,
    grad: torch.dtype,
    *,
    has_master: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    scales: bool = True,
    is_aligned: bool = True,
) -> Variant:
    config = _config(arch)
    flags = {
        "master": has_master,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "scaled": scales,
        "unaligned": not is_aligned,
    }
    scalars = {"lr": "*fp32"} | ({"inv_scale": "*fp32", "clip_coef": "*fp32", "found_inf": "*fp32"} if scales else {})
    pointers = {"table": "*i64", "program_tensor": "*i32", "program_chunk": "*i32", "tickets": "*i32", **scalars}
    hyperparameters = (
        "log_beta1",
        "log_beta2",
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "weight_decay",
    )
    return Variant(
        name=f"adamw[{','.join([TRITON_NAMES[param], TRITON_NAMES[grad], *(k for k, on in flags.items() if on)])}]",
        function=adamw_kernel,
        signature=pointers | dict.fromkeys(hyperparameters, "fp32"),
        constexprs={
            **({} if scales else {"inv_scale": None, "clip_coef": None, "found_inf": None}),
            "PARAM_TYPE": TRITON_TYPES[param],
            "GRAD_TYPE": TRITON_TYPES[grad],
            "HAS_MASTER": has_master,
            "AMSGRAD": amsgrad,
            "MAXIMIZE": maximize,
            "ALIGNED": is_aligned,
            "CHUNK": config.chunk,
            "BLOCK": config.block,
        },
        divisible_by_16=tuple(pointers),
        num_warps=config.num_warps,
        wide_loads=is_aligned,
    )


def _config(arch: Architecture) -> MultiTensorConfig:
    return configuration("adamw", MultiTensorConfig, arch, "all")


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
