"""The optimizer step over many tensors in one launch, whatever the rule: unscale, clip, update, store.

Read per element: the gradient, the weight (from its FP32 master, from the 16-bit parameter and its remainder, or from
the parameter alone) and the state; written: parameter, master or remainder, state. The rules are in
``update_rule.py``, the narrow formats in ``optimizer_state.py``. Arithmetic is FP32.

Nothing is written when ``found_inf`` is not zero. ``params`` and ``grads`` are FP16, BF16 or FP32; each step count,
``lr``, ``inv_scale``, ``clip_coef`` and ``found_inf`` one-element FP32 tensors on the device. All tensors of one
parameter keep their elements in storage without gaps and in the same order.
"""

import triton
import triton.language as tl

from .multi_tensor import chunk_of_program, load, tensor_pointer
from .optimizer_state import (
    FIRST_MOMENT,
    GROUP_SIZE,
    PARAMETER,
    SECOND_MOMENT,
    join_weight,
    load_state,
    phase,
    round_stochastically,
    split_weight,
    store_state,
)
from .update_rule import adam_rule, lion_rule, one_minus_power, sgd_rule

# Table columns; zero where the launch has no such tensor. FIRST and SECOND are the moments, MAXIMUM is AMSGrad's.
SIZE, STEP, PARAM, GRAD, MASTERS, FIRST, SECOND, MAXIMUM = (tl.constexpr(i) for i in range(8))
FIRST_SCALE, SECOND_SCALE, MAXIMUM_SCALE = (tl.constexpr(i) for i in range(8, 11))
COLUMNS = tl.constexpr(11)


@triton.jit
def state_pointers(
    row, start, COLUMN: tl.constexpr, SCALE_COLUMN: tl.constexpr,
    STATE: tl.constexpr, SIGNED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where a chunk's state begins, and where its scales do."""
    CODE: tl.constexpr = tl.int8 if SIGNED else tl.uint8
    TYPE: tl.constexpr = CODE if STATE == "code" else (tl.bfloat16 if STATE == "bf16" else tl.float32)
    scale = tensor_pointer(row, SCALE_COLUMN, tl.uint8, ALIGNED) + start // GROUP_SIZE
    return tensor_pointer(row, COLUMN, TYPE, ALIGNED) + start, scale


@triton.jit
def load_weight(param, master, mask, TYPE: tl.constexpr, MASTER: tl.constexpr):
    """A block of weights in FP32, from the parameter of ``TYPE``, from its master or from both."""
    if MASTER == "split":
        return join_weight(load(param, mask), load(master, mask), TYPE)
    else:
        return load(master if MASTER == "fp32" else param, mask).to(tl.float32)


@triton.jit
def store_weight(param, master, mask, weight, bits, TYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr):
    if MASTER == "split":
        upper, remainder = split_weight(weight, TYPE)
        tl.store(param, upper, mask=mask)
        tl.store(master, remainder, mask=mask)
    else:
        if MASTER == "fp32":
            tl.store(master, weight, mask=mask)
        if STOCHASTIC and tl.float32 != TYPE:
            tl.store(param, round_stochastically(weight, bits, TYPE), mask=mask)
        else:
            tl.store(param, weight.to(TYPE), mask=mask)


@triton.jit
def advance_step(table, program_tensor, tickets, CHUNK: tl.constexpr):
    """Add one to the step of this program's tensor, if this program is the last of that tensor's to finish."""
    # Read again rather than kept: registers held through the loop would spill.
    tensor = tl.load(program_tensor + tl.program_id(0)).to(tl.int64)
    row = table + tensor * COLUMNS
    chunks = tl.maximum((tl.load(row + SIZE) + CHUNK - 1) // CHUNK, 1)
    # Every thread has read the step before its program takes a ticket, so the taker of the last one may write it.
    tl.debug_barrier()
    if tl.atomic_add(tickets + tensor, 1) == chunks - 1:
        step = tensor_pointer(row, STEP, tl.float32, False)
        tl.store(step, tl.load(step) + 1.0)
        tl.store(tickets + tensor, 0)


# The scalars may be views of one buffer: whether 16 bytes divide their addresses is not worth a compilation.
@triton.jit(do_not_specialize=["lr", "inv_scale", "clip_coef", "found_inf"])
def optimizer_step_kernel(
    table, program_tensor, program_chunk, tickets,
    lr, inv_scale, clip_coef, found_inf,
    log_beta1, log_beta2, one_minus_beta1, beta2, one_minus_beta2, eps,
    momentum, one_minus_dampening, weight_decay,
    RULE: tl.constexpr, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    MASTER: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_BITS: tl.constexpr = MASTER == "split" and tl.bfloat16 == PARAM_TYPE
    overflow = 0.0
    if found_inf is not None:
        overflow = tl.load(found_inf)
    if overflow != 0.0:
        return
    row, start, size = chunk_of_program(table, program_tensor, program_chunk, COLUMNS, CHUNK)
    left = size - start
    step = tl.load(tensor_pointer(row, STEP, tl.float32, False)) + 1.0
    rate = tl.load(lr)
    factor = -1.0 if MAXIMIZE else 1.0
    if inv_scale is not None:
        factor *= tl.load(inv_scale)
    if clip_coef is not None:
        factor *= tl.load(clip_coef)
    decay = 1.0 - rate * weight_decay
    is_first = step == 1.0
    count = step.to(tl.int32).to(tl.uint32)
    if RULE == "adam":
        step_size = rate / one_minus_power(log_beta1, step)
        bias2_sqrt = tl.sqrt(one_minus_power(log_beta2, step))

    # Full chunks go without a mask: a mask that the compiler cannot see through makes every access scalar. So the loop
    # is there twice, and one of the two runs. Each has its own pointers and lanes: shared, they would cost up to 72
    # registers more on sm_90 with 8-bit state.
    for MASKED in tl.static_range(2):
        if (left < CHUNK) == (MASKED == 1):
            length = left.to(tl.int32) if MASKED else CHUNK
            param = tensor_pointer(row, PARAM, tl.int16 if HAS_BITS else PARAM_TYPE, ALIGNED) + start
            grad = tensor_pointer(row, GRAD, GRAD_TYPE, ALIGNED) + start
            master = param
            if MASTER != "none":
                master = tensor_pointer(row, MASTERS, tl.float32 if MASTER == "fp32" else tl.int16, ALIGNED) + start
            if STATE != "none":
                first, first_scale = state_pointers(row, start, FIRST, FIRST_SCALE, STATE, True, ALIGNED)
            if RULE == "adam":
                second, second_scale = state_pointers(row, start, SECOND, SECOND_SCALE, STATE, False, ALIGNED)
                if AMSGRAD:
                    maximum, maximum_scale = state_pointers(row, start, MAXIMUM, MAXIMUM_SCALE, STATE, False, ALIGNED)
            lanes = tl.arange(0, BLOCK)
            groups = tl.arange(0, BLOCK // GROUP_SIZE)
            for offset in range(0, length, BLOCK):
                at = offset + lanes
                group = offset // GROUP_SIZE + groups
                mask = None
                group_mask = None
                if MASKED:
                    mask = at < length
                    group_mask = group * GROUP_SIZE < length
                begin = phase(start.to(tl.uint32) + at.to(tl.uint32))
                g = load(grad + at, mask).to(tl.float32) * factor
                p = load_weight(param + at, master + at, mask, PARAM_TYPE, MASTER)
                m = tl.zeros_like(g)
                if STATE != "none":
                    m = load_state(first + at, first_scale + group, mask, group_mask, STATE, True)
                if RULE == "adam":
                    v = load_state(second + at, second_scale + group, mask, group_mask, STATE, False)
                    v_max = tl.zeros_like(v)
                    if AMSGRAD:
                        v_max = load_state(maximum + at, maximum_scale + group, mask, group_mask, STATE, False)
                    p, m, v, v_max = adam_rule(
                        p, g, m, v, v_max, decay, step_size, bias2_sqrt, eps, weight_decay,
                        one_minus_beta1, beta2, one_minus_beta2, DECOUPLED,
                    )  # fmt: skip
                    bits = begin + count * SECOND_MOMENT
                    store_state(second + at, second_scale + group, mask, group_mask, v, bits, STATE, False)
                    if AMSGRAD:
                        store_state(maximum + at, maximum_scale + group, mask, group_mask, v_max, bits, STATE, False)
                elif RULE == "sgd":
                    p, m = sgd_rule(
                        p, g, m, rate, is_first, weight_decay, momentum, one_minus_dampening, STATE != "none", NESTEROV
                    )
                else:
                    p, m = lion_rule(p, g, m, rate, decay, one_minus_beta1, one_minus_beta2)
                if STATE != "none":
                    bits = begin + count * FIRST_MOMENT
                    store_state(first + at, first_scale + group, mask, group_mask, m, bits, STATE, True)
                bits = begin + count * PARAMETER
                store_weight(param + at, master + at, mask, p, bits, PARAM_TYPE, MASTER, STOCHASTIC)
    advance_step(table, program_tensor, tickets, CHUNK)
