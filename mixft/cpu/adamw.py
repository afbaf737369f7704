"""AdamW on the CPU: torch's fused kernel on FP32 weights, with casts in batches that stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements cast at a time: large enough to hide the calls' cost, small enough for the FP32 copies to stay in the cache.
BATCH = 1 << 20

Piece = tuple[int, int, int]


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
    if found_inf is not None and found_inf.item():
        return
    factor = 1.0
    for scalar in (inv_scale, clip_coef):
        if scalar is not None:
            factor *= scalar.item()
    options = {
        "lr": lr.item(),
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": eps,
        "amsgrad": bool(max_exp_avg_sqs),
        "maximize": maximize,
    }
    _advance(steps)
    weights = masters or params
    if factor == 1.0 and all(tensor.dtype == torch.float32 for tensor in (*weights, *grads)):
        torch._fused_adamw_(weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **options)
        if masters:
            torch._foreach_copy_(params, masters)
        return
    scaled = torch.empty(BATCH, dtype=torch.float32, device="cpu")
    for batch in _batches(params):
        own = _pieces(params, batch)
        stored = _pieces(masters, batch) if masters else own
        wide = [weight.float() for weight in stored]
        # Scaled on a copy, though torch's kernel could unscale: it would write the caller's gradients.
        gradients, start = [], 0
        for gradient in _pieces(grads, batch):
            copy = scaled[start : start + gradient.numel()].as_strided(gradient.shape, gradient.stride())
            # Widened first: torch would round the product of a 16-bit tensor and a number to 16 bits.
            wide_enough = gradient.dtype == torch.float32
            gradients.append(
                torch.mul(gradient, factor, out=copy) if wide_enough else copy.copy_(gradient).mul_(factor)
            )
            start += gradient.numel()
        torch._fused_adamw_(
            wide,
            gradients,
            _pieces(exp_avgs, batch),
            _pieces(exp_avg_sqs, batch),
            _pieces(max_exp_avg_sqs, batch) if max_exp_avg_sqs else [],
            [steps[position] for position, _, _ in batch],
            **options,
        )
        for parameter, weight in zip(own, wide, strict=True):
            if parameter is not weight:
                parameter.copy_(weight)


def _advance(steps: list[Tensor]) -> None:
    """Add one to every step, in one call where they lie side by side."""
    first = steps[0].data_ptr()
    if all(step.data_ptr() == first + 4 * position for position, step in enumerate(steps)):
        steps[0].as_strided((len(steps),), (1,)).add_(1)
    else:
        torch._foreach_add_(steps, 1)


def _batches(params: list[Tensor]) -> Iterator[list[Piece]]:
    """Lists of (position, start, stop) that cover every parameter, at most ``BATCH`` elements a list."""
    batch, room = [], BATCH
    for position, param in enumerate(params):
        size = param.numel()
        for start in range(0, size, BATCH):
            stop = min(start + BATCH, size)
            if stop - start > room:
                yield batch
                batch, room = [], BATCH
            batch.append((position, start, stop))
            room -= stop - start
    if batch:
        yield batch


def _pieces(tensors: list[Tensor], batch: list[Piece]) -> list[Tensor]:
    return [
        tensors[position]
        if stop - start == tensors[position].numel()
        # The tensors of one parameter share a layout, so any order of the elements will do.
        else tensors[position].as_strided((tensors[position].numel(),), (1,))[start:stop]
        for position, start, stop in batch
    ]
