"""Every optimizer of mixft beside what it is held to, and the helpers that its tests share.

One entry in ``CASES`` takes an optimizer through the whole matrix of ``tests/test_optim_*.py``.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mixft.optim
from mixft.ops.optimizer_state import join_master
from mixft.optim.base import MixedPrecisionOptimizer
from mixft.optim.dtensor import piece_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(17,), (5, 7), (), (1000,), (2, 3, 3, 3)]
BAD = [float("nan"), float("inf"), -float("inf")]


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer, its reference, and the options to compare them with.

    Attributes:
        ours: the class of ``mixft.optim``.
        reference: an optimizer of the same rule that computes in its parameters' dtype: in FP64 it is the oracle.
        options: options for both under which every part of the rule leaves a mark within a few steps.
        variations: further options, each set switching one more part of the rule.
    """

    ours: type[MixedPrecisionOptimizer]
    reference: type[torch.optim.Optimizer]
    options: dict[str, Any]
    variations: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def __str__(self) -> str:
        return self.ours.__name__


class ReferenceLion(torch.optim.Optimizer):
    """Algorithm 2 of the paper (https://arxiv.org/abs/2302.06675), operator by operator."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                direction = (beta1 * momentum + (1 - beta1) * grad).sign()
                param -= group["lr"] * (direction + group["weight_decay"] * param)
                momentum.mul_(beta2).add_(grad, alpha=1 - beta2)


CASES = [
    OptimizerCase(
        mixft.optim.AdamW,
        torch.optim.AdamW,
        {"lr": 2.0**-7, "weight_decay": 0.1},
        [{}, {"weight_decay": 0.0}, {"amsgrad": True}, {"amsgrad": True, "maximize": True}],
    ),
    OptimizerCase(
        mixft.optim.Adam,
        torch.optim.Adam,
        {"lr": 2.0**-7, "weight_decay": 0.1},
        [{}, {"weight_decay": 0.0}, {"amsgrad": True, "maximize": True}],
    ),
    OptimizerCase(
        mixft.optim.SGD,
        torch.optim.SGD,
        {"lr": 2.0**-7, "momentum": 0.9, "weight_decay": 0.1},
        [{}, {"weight_decay": 0.0, "momentum": 0.0}, {"nesterov": True}, {"dampening": 0.5, "maximize": True}],
    ),
    OptimizerCase(
        mixft.optim.Lion,
        ReferenceLion,
        {"lr": 2.0**-7, "weight_decay": 0.1},
        [{}, {"weight_decay": 0.0}, {"maximize": True}],
    ),
]
STORAGES = {
    "fp32": {},
    "split": {"master_weights": "split"},
    "none": {"master_weights": "none"},
    "stochastic": {"master_weights": "none", "stochastic_rounding": True},
    "bf16-state": {"state_dtype": torch.bfloat16},
    "int8-state": {"state_dtype": torch.int8},
    "split-int8-state": {"master_weights": "split", "state_dtype": torch.int8},
}

every_optimizer = pytest.mark.parametrize("case", CASES, ids=str)
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
every_variation = pytest.mark.parametrize(
    ("case", "variation"),
    [
        pytest.param(case, variation, id="-".join([str(case), *(f"{k}={v}" for k, v in variation.items())]))
        for case in CASES
        for variation in case.variations
    ],
)


def parameters(device, dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def mixed_parameters(device, shapes=SHAPES[:3]):
    return [param for dtype in DTYPES for param in parameters(device, dtype, shapes)]


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(params, scale=1.0):
    for param in params:
        param.grad = (scale * torch.randn(param.shape, device=param.device)).to(param.dtype)


def copies(params, dtype=None):
    """New parameters of the same values, of ``dtype`` or each of its own."""
    return [torch.nn.Parameter(param.detach().to(dtype or param.dtype, copy=True)) for param in params]


def run_beside(optimizer, others, steps):
    """Step ``optimizer`` and each of ``others`` on the same gradients, cast to the others' dtypes."""
    params = members(optimizer)
    for _ in range(steps):
        give_gradients(params)
        for other in others:
            for param, twin in zip(params, members(other), strict=True):
                twin.grad = param.grad.to(twin.dtype)
            other.step()
        optimizer.step()


def bits(tensor):
    """The bytes of a tensor, of a DTensor this process's, so that NaN equals itself."""
    return piece_of(tensor).detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(optimizer):
    """Every bit that a step may change."""
    params = members(optimizer)
    state = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
    return [bits(param) for param in params], state


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


# What the host has to wait for: values, and results of a size that depends on values.
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


class RefuseSync(TorchDispatchMode):
    """Fails on the operators by which the host waits for a device.

    A copy from one device to another waits too, but for one between GPUs, and one from or to pinned memory that is
    ``non_blocking``.
    """

    def __init__(self, reads=READS):
        super().__init__()
        self._reads = reads
        self._pinned = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index.dtype == torch.bool for index in args[1] if index is not None)
        if name in self._reads or by_mask:
            raise AssertionError(f"{name} waits for the device")
        found = function(*args, **kwargs)
        if name == "_pin_memory" or kwargs.get("pin_memory"):
            assert found.device.type == "cpu", "only the host's memory can be pinned"
            self._pinned.append(found)
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args[1] if name == "copy_" else args[0], found, args[2:], kwargs)
        return found

    def _check_copy(self, name, source, target, rest, kwargs):
        if "cpu" not in (source.device.type, target.device.type) or source.device == target.device:
            return
        on_host = source if source.device.type == "cpu" else target
        pinned = any(on_host.untyped_storage()._cdata == tensor.untyped_storage()._cdata for tensor in self._pinned)
        if not (pinned and (kwargs.get("non_blocking") or any(rest))):
            raise AssertionError(f"{name} from {source.device} to {target.device} waits for the device")


def weight(optimizer, param):
    """The FP32 value of ``param`` that the optimizer keeps."""
    state = optimizer.state[param]
    master = state.get("master", param)
    return master if master.is_floating_point() else join_master(param, master)
