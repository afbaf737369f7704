"""The whole optimizer step: each optimizer, kind of master weights and dtype of state, and how its time grows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.benchmarks.case import Case, Provider
from mixft.benchmarks.recording import Sweep
from mixft.ops.optimizer_state import GROUP_SIZE

from . import shapes
from .optimizer_peers import (
    FLASH,
    LOSS_SCALE,
    MAX_NORM,
    OPTIONS,
    TORCH,
    bitsandbytes,
    by_hand,
    compiled_step,
    flashoptim,
    foreach_lion,
    ours,
    plain,
    torch_optimizer,
    torchao_8bit,
)
from .shapes import SHORT, elements, sample

STATES = {"adamw": 2, "adam": 2, "sgd": 1, "lion": 1}
# Of 8-bit state: a code, and its share of its group's scale of one byte.
CODE_BYTES = 1 + 1 / GROUP_SIZE
PACKED = "saves memory: on a CPU, packing and unpacking can take longer than moving the bytes they save"
CHECKED = "torch does not look for NaN and Inf: that is one more read of the gradients, and at small sizes more calls"
# Of the largest weight: rounding to 16 bits, and no step as large as one that was left out.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def optimizer_step(
    optimizer: str,
    dtype: torch.dtype,
    master_weights: str = "auto",
    state_dtype: torch.dtype = torch.float32,
    clip: bool = False,
    skip_nonfinite: bool = True,
    sizes: Sequence[tuple[int, ...]] | None = None,
    name: str | None = None,
    reason_if_slower: str | None = None,
    **options,
) -> Case:
    """One step on the tensors of a small BERT, or on ``sizes``; the case is named by its options unless by ``name``.

    ``clip``: the gradients are those of a scaled loss; the step unscales, checks and clips them. The peers of 16-bit
    parameters with masters are the usual steps by hand, on FP32 copies. ``skip_nonfinite``: as in mixft's optimizers;
    without it the step does what torch's does, and reads the gradients once.
    """

    def tensors() -> Sequence[tuple[int, ...]]:
        return sizes or shapes.BERT

    def inputs(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        start = [torch.randn(shape, device=device).mul_(0.02).to(dtype) for shape in tensors()]
        scale = 0.01 * LOSS_SCALE if clip else 0.01
        return start, [torch.randn(shape, device=device).mul_(scale).to(dtype) for shape in tensors()]

    def exact(inputs) -> list[Tensor]:
        start, grads = inputs
        factor = 1.0
        if clip:
            norm = sum(grad.double().square().sum() for grad in grads).sqrt() / LOSS_SCALE
            factor = min(1.0, MAX_NORM / norm) / LOSS_SCALE
        # Every rule works element by element, so the first step of a sample is the sample of the first step.
        pairs = zip(sample(start), sample(grads), strict=True)
        return [first_step(optimizer, weight.double(), grad.double() * factor) for weight, grad in pairs]

    mode = "" if master_weights == "auto" else f"-{master_weights}"
    mode += "" if state_dtype == torch.float32 else f"-{SHORT[state_dtype]}"
    kind = f"{optimizer}-{SHORT[dtype]}{mode}{'-clip' if clip else ''}{'' if skip_nonfinite else '-unchecked'}"
    chosen = {} if master_weights == "auto" else {"master_weights": master_weights}
    chosen |= {} if state_dtype == torch.float32 else {"state_dtype": state_dtype}
    chosen |= {} if skip_nonfinite else {"skip_nonfinite": False}
    providers = {
        "mixft": ours(optimizer, clip, **chosen),
        **_peers(optimizer, dtype, master_weights, state_dtype, clip),
    }
    if sizes is None and optimizer in TORCH and kind == f"{optimizer}-fp32":
        # Once an optimizer: it compiles for a minute.
        providers["torch.compile"] = compiled_step(torch_optimizer(optimizer, foreach=True))
    count = elements(sizes or shapes.BERT)
    narrow = master_weights == "split" or state_dtype != torch.float32
    return Case(
        name or f"optimizer_step/{kind}",
        inputs=inputs,
        exact=exact,
        providers=providers,
        bound=BOUNDS[dtype],
        bytes=int(
            count * (step_bytes(optimizer, dtype, master_weights, state_dtype) + skip_nonfinite * dtype.itemsize)
        ),
        reason_if_slower=reason_if_slower or (PACKED if narrow else CHECKED if skip_nonfinite else None),
        needs=count * (4 * dtype.itemsize + 20 * len(providers)),
        **options,
    )


def step_bytes(optimizer: str, dtype: torch.dtype, master_weights: str, state_dtype: torch.dtype) -> float:
    """Least traffic a parameter: the gradient read, weights and states read and written.

    A step that may change nothing before all gradients are known to be finite reads them once more.
    """
    weights = 2 * dtype.itemsize
    if dtype != torch.float32 and master_weights != "none":
        # A master is read and written, its parameter only written; of a split one both halves are read and written.
        weights = 2 * (2 + 2) if master_weights == "split" else dtype.itemsize + 2 * 4
    state = CODE_BYTES if state_dtype == torch.int8 else state_dtype.itemsize
    return dtype.itemsize + weights + 2 * STATES[optimizer] * state


def first_step(optimizer: str, weight: Tensor, grad: Tensor) -> Tensor:
    """The rule in FP64, from no state: torch's own, and Lion of Chen et al. 2023, https://arxiv.org/abs/2302.06675."""
    options = OPTIONS[optimizer]
    if optimizer == "lion":
        return weight * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * grad.sign()
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad
    TORCH[optimizer]([parameter], **options).step()
    return parameter.detach()


def _peers(
    optimizer: str, dtype: torch.dtype, master_weights: str, state_dtype: torch.dtype, clip: bool
) -> dict[str, Provider]:
    peers: dict[str, Provider] = {}
    wide = dtype == torch.float32
    if optimizer in TORCH:
        fused, foreach = (torch_optimizer(optimizer, **{how: True}) for how in ("fused", "foreach"))
        if (wide and not clip) or master_weights == "none":
            peers |= {"torch fused": plain(fused), "torch foreach": plain(foreach)}
        else:
            peers |= {"by hand, fused": by_hand(fused, clip), "by hand, foreach": by_hand(foreach, clip)}
    else:
        peers["by hand, foreach"] = plain(foreach_lion) if wide else by_hand(foreach_lion, clip)
    if clip:
        return peers
    if state_dtype in (torch.float32, torch.int8):
        bits = 8 if state_dtype == torch.int8 else 32
        peers["bitsandbytes"] = plain(bitsandbytes(optimizer, bits))
    if state_dtype == torch.int8 and optimizer in ("adamw", "adam"):
        peers["torchao+compile"] = plain(torchao_8bit(optimizer))
    if optimizer in FLASH and state_dtype in (torch.float32, torch.int8):
        split = not wide and master_weights != "none"
        peers["flashoptim"] = plain(flashoptim(optimizer, split, state_dtype == torch.int8))
    return peers


def growth(variable: str, value: int, sizes: Sequence[tuple[int, ...]], **options) -> Case:
    """AdamW in FP32 at one point of a series."""
    return optimizer_step(
        "adamw",
        torch.float32,
        sizes=sizes,
        name=f"{variable}/adamw-fp32-{value}",
        sweep=Sweep("optimizer_step", variable, value),
        **options,
    )


SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
SAME_BYTES = "both move the same bytes, and nothing else takes as long"
NARROW_MOMENTS = "torch keeps the moments of BF16 parameters in BF16, mixft in FP32 unless told otherwise"

CASES = (
    optimizer_step("adamw", SINGLE, memory=True),
    optimizer_step("adamw", HALF, memory=True),
    optimizer_step("adamw", HALF, clip=True, memory=True),
    optimizer_step("adamw", BRAIN),
    optimizer_step("adamw", SINGLE, skip_nonfinite=False, reason_if_slower=SAME_BYTES),
    optimizer_step("adamw", SINGLE, state_dtype=torch.int8, memory=True, long=True),
    optimizer_step("adamw", BRAIN, "split", torch.int8, memory=True),
    optimizer_step("adamw", BRAIN, "split", torch.int8, clip=True, long=True),
    optimizer_step("adamw", BRAIN, "split", BRAIN, memory=True, long=True),
    optimizer_step("adamw", BRAIN, "split", memory=True, long=True),
    optimizer_step("adamw", HALF, "split", memory=True, long=True),
    optimizer_step("adamw", BRAIN, "none", reason_if_slower=NARROW_MOMENTS),
    optimizer_step("adamw", BRAIN, "none", BRAIN, long=True),
    *(optimizer_step(rule, SINGLE, memory=True) for rule in ("adam", "sgd", "lion")),
    *(optimizer_step(rule, HALF, memory=True, long=True) for rule in ("adam", "sgd", "lion")),
    optimizer_step("lion", BRAIN, "split", torch.int8, memory=True, long=True),
    *(
        growth("parameters", count, [(count // 8,)] * 8, long=count > 10**7)
        for count in (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
    ),
    *(growth("tensors", count, [(10**6 // count,)] * count) for count in (1, 10, 100, 1000, 2000)),
)
