"""The optimizers that mixft's step is compared with, and what each holds in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Call, Provider, Refused
from mixft.benchmarks.peers import peer

from .shapes import sample

OPTIONS = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "adam": {"lr": 1e-3, "weight_decay": 0.01},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    # A larger one than usual: in 16 bits a step shows beside the rounding of the weights.
    "lion": {"lr": 1e-3, "weight_decay": 0.01},
}
MIXFT = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "lion": "Lion"}
TORCH = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
FLASH = {"adamw": "FlashAdamW", "adam": "FlashAdam", "lion": "FlashLion"}
LOSS_SCALE = 1024.0
MAX_NORM = 1.0

Optimizer = torch.optim.Optimizer
Make = Callable[[list[nn.Parameter]], Optimizer]
Inputs = tuple[Sequence[Tensor], Sequence[Tensor]]


def ours(name: str, clip: bool, **options: Any) -> Provider:
    """mixft's optimizer; with ``clip`` under a loss scaler, and clipping inside the step."""
    if clip:
        options["max_grad_norm"] = MAX_NORM

    def make(parameters):
        return getattr(mixft.optim, MIXFT[name])(parameters, **OPTIONS[name], **options)

    return scaled(make) if clip else plain(make)


class ForeachLion(torch.optim.Optimizer):
    """Lion in torch's foreach functions, as one would write it; torch has none of its own."""

    def __init__(self, params, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        parameters, (first, second) = group["params"], group["betas"]
        grads = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
        updates = torch._foreach_lerp(averages, grads, 1 - first)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - second)


def torch_optimizer(name: str, **implementation: bool) -> Make:
    """torch's optimizer with ``fused=True`` or ``foreach=True``."""
    return lambda parameters: TORCH[name](parameters, **OPTIONS[name], **implementation)


def foreach_lion(parameters: list[nn.Parameter]) -> Optimizer:
    """:class:`ForeachLion` with the options that all have."""
    return ForeachLion(parameters, **OPTIONS["lion"])


def bitsandbytes(name: str, bits: int) -> Make:
    """Its optimizers; a state of 8 bits in blocks where ``bits`` is 8."""

    def make(parameters):
        family = getattr(peer("bitsandbytes", "optim"), MIXFT[name])
        if name == "adam":
            raise Refused("its Adam decays weights as AdamW does")
        return family(parameters, **OPTIONS[name], **({"optim_bits": 8} if bits == 8 else {}))

    return make


def torchao_8bit(name: str) -> Make:
    """Its step is compiled for every shape of a parameter."""
    return lambda parameters: getattr(peer("torchao", "optim"), f"{MIXFT[name]}8bit")(parameters, **OPTIONS[name])


def flashoptim(name: str, split: bool, quantize: bool) -> Make:
    def make(parameters):
        flash = peer("flashoptim")
        if not parameters[0].is_cuda:
            raise Refused("its kernels are for GPUs")
        bits = 32 if split else None
        return getattr(flash, FLASH[name])(parameters, **OPTIONS[name], master_weight_bits=bits, quantize=quantize)

    return make


def plain(make: Make) -> Provider:
    """One ``optimizer.step()`` on the parameters themselves."""

    def prepare(inputs: Inputs) -> Call:
        parameters = with_gradients(*inputs)
        optimizer = make(parameters)
        return Call(
            lambda: (optimizer.step(), sample(parameters))[1],
            held=lambda: held(parameters) | state_bytes(optimizer),
        )

    return prepare


def compiled_step(make: Make) -> Provider:
    """The same under ``torch.compile``."""

    def prepare(inputs: Inputs) -> Call:
        parameters = with_gradients(*inputs)
        optimizer = make(parameters)
        step = torch.compile(optimizer.step)
        return Call(lambda: (step(), sample(parameters))[1], held=lambda: held(parameters) | state_bytes(optimizer))

    return prepare


def scaled(make: Make) -> Provider:
    """``scaler.step(optimizer)`` on gradients of a loss that was scaled."""

    def prepare(inputs: Inputs) -> Call:
        parameters = with_gradients(*inputs)
        optimizer = make(parameters)
        device = parameters[0].device
        scaler = mixft.amp.LossScaler(LOSS_SCALE, growth_interval=2**30, device=device.type)
        scaler.scale(torch.zeros((), device=device))

        def run():
            scaler.step(optimizer)
            scaler.update()
            return sample(parameters)

        return Call(run, held=lambda: held(parameters) | state_bytes(optimizer))

    return prepare


def by_hand(make: Make, clip: bool) -> Provider:
    """Mixed precision as it is written by hand: FP32 copies of weights and gradients, a step on them, a copy back.

    With ``clip`` the copied gradients are unscaled and checked as ``torch.amp.GradScaler`` does, and clipped by
    ``torch.nn.utils.clip_grad_norm_``.
    """

    def prepare(inputs: Inputs) -> Call:
        parameters = with_gradients(*inputs)
        copies = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        for parameter in copies:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = make(copies)
        device = copies[0].device
        inverse = torch.full((1,), 1 / LOSS_SCALE, device=device)

        def run():
            grads = [copy.grad for copy in copies]
            torch._foreach_copy_(grads, [parameter.grad for parameter in parameters])
            if clip:
                found_inf = torch.zeros(1, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse)
                torch.nn.utils.clip_grad_norm_(copies, MAX_NORM)
            if not clip or not found_inf.item():
                optimizer.step()
                torch._foreach_copy_([parameter.data for parameter in parameters], copies)
            return sample(parameters)

        copied = {"FP32 copies": sum(copy.nbytes for copy in copies)}
        copied["copied gradients"] = copied["FP32 copies"]
        return Call(run, held=lambda: held(parameters) | copied | state_bytes(optimizer))

    return prepare


def with_gradients(start: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters that start at ``start`` and have copies of ``grads`` as gradients."""
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def held(parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    """Bytes of the parameters and of their gradients."""
    parameters = list(parameters)
    return {
        "parameters": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None),
    }


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the optimizer's state tensors by their name in it."""
    total: Counter[str] = Counter()
    for state in optimizer.state.values():
        for name, value in state.items():
            total[name] += _bytes(value)
    return {name: size for name, size in total.items() if size}


def _bytes(value: Any) -> int:
    if hasattr(value, "__tensor_flatten__"):  # a quantized tensor is what it consists of
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, Tensor) else 0
