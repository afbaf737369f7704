"""Inputs for the fused optimizer steps, and torch's single-tensor optimizers at FP64 as their oracle.

One entry of ``RULES`` adds an optimizer to every test of ``test_optimizer_step.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixft.ops import adamw_, lion_, sgd_
from mixft.ops.optimizer_state import dequantize_state, join_master, quantize_state, split_master

LR, DECAY, STEP = 2.0**-7, 0.1, 3.0


class Lion(torch.optim.Optimizer):
    """Lion in the paper's words (Chen et al. 2023, algorithm 2); torch has none."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                grad = -param.grad if group["maximize"] else param.grad
                average = self.state[param]["exp_avg"]
                update = (beta1 * average + (1 - beta1) * grad).sign() + group["weight_decay"] * param
                param -= group["lr"] * update
                average.copy_(beta2 * average + (1 - beta2) * grad)


@dataclass(frozen=True)
class Rule:
    """One op with one set of hyperparameters.

    Attributes:
        op: the public op.
        lists: the op's state lists, each by (its name, torch's name of it, whether it may be negative).
        oracle: torch's optimizer.
        options: hyperparameters of the oracle, and the op's where it has others.
    """

    op: Callable
    lists: tuple[tuple[str, str, bool], ...]
    oracle: type[torch.optim.Optimizer]
    options: dict = field(default_factory=dict)
    op_options: dict = field(default_factory=dict)


FIRST, SECOND = ("exp_avgs", "exp_avg", True), ("exp_avg_sqs", "exp_avg_sq", False)
MAXIMUM = ("max_exp_avg_sqs", "max_exp_avg_sq", False)
BUFFER = ("momentum_buffers", "momentum_buffer", True)
NESTEROV = {"momentum": 0.9, "nesterov": True}
DAMPENED = {"momentum": 0.8, "dampening": 0.3}
RULES = {
    "adamw": Rule(adamw_, (FIRST, SECOND), torch.optim.AdamW),
    "adamw amsgrad": Rule(adamw_, (FIRST, SECOND, MAXIMUM), torch.optim.AdamW, {"amsgrad": True}, {}),
    "adam": Rule(adamw_, (FIRST, SECOND), torch.optim.Adam, {}, {"decoupled": False}),
    "sgd": Rule(sgd_, (), torch.optim.SGD),
    "sgd dampened": Rule(sgd_, (BUFFER,), torch.optim.SGD, DAMPENED, DAMPENED),
    "sgd nesterov": Rule(sgd_, (BUFFER,), torch.optim.SGD, NESTEROV, NESTEROV),
    "lion": Rule(lion_, (FIRST,), Lion),
}


def scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


class Problem:
    """The arguments of one step: ``tensors`` by list name, and ``weights`` and ``states`` as FP32 values.

    Args:
        master: "none", "fp32" or "split".
        state: "fp32", "bf16" or "codes".
    """

    def __init__(self, rule: Rule, device, shapes, dtype, grad_dtype=None, master="none", state="fp32", step=STEP):
        self.rule, self.device, self.state = rule, device, state
        weights = [torch.randn(shape, device=device) for shape in shapes]
        self.tensors = {"params": [weight.to(dtype) for weight in weights], "masters": []}
        if master == "fp32":
            self.tensors["masters"] = weights
        elif master == "split":
            halves = [split_master(weight, dtype) for weight in weights]
            self.tensors["params"] = [param for param, _ in halves]
            self.tensors["masters"] = [remainder for _, remainder in halves]
        self.tensors["grads"] = [torch.randn(shape, device=device).to(grad_dtype or dtype) for shape in shapes]
        for name, _, signed in rule.lists:
            values = [torch.randn(shape, device=device) for shape in shapes]
            values = [value if signed else value.abs() for value in values]
            scales = []
            if state == "bf16":
                values = [value.bfloat16() for value in values]
            elif state == "codes":
                pairs = [quantize_state(value, signed=signed) for value in values]
                values, scales = [codes for codes, _ in pairs], [scale for _, scale in pairs]
            self.tensors[name] = values
            self.tensors[self.scale_name(name)] = scales
        if rule.op is adamw_:
            self.tensors.setdefault("max_exp_avg_sqs", [])
        if rule.op is sgd_:
            self.tensors.setdefault("momentum_buffers", [])
        self.tensors["steps"] = [scalar(step, device) for _ in shapes]

    @staticmethod
    def scale_name(name: str) -> str:
        return name.removesuffix("s") + "_scales"

    def weights(self) -> list[Tensor]:
        params, masters = self.tensors["params"], self.tensors["masters"]
        if not masters:
            return [param.float().clone() for param in params]
        if masters[0].dtype == torch.int16:
            return [join_master(*pair) for pair in zip(params, masters, strict=True)]
        return [master.clone() for master in masters]

    def states(self) -> list[list[Tensor]]:
        """FP32 values of every state list of the rule."""
        found = []
        for name, _, _ in self.rule.lists:
            scales = self.tensors[self.scale_name(name)]
            pairs = zip(self.tensors[name], scales, strict=True) if scales else [(s,) for s in self.tensors[name]]
            found.append([dequantize_state(*pair) if scales else pair[0].float().clone() for pair in pairs])
        return found

    def expected(self, dtype: torch.dtype, factor: float = 1.0, **options) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Weights and state lists after torch's own step at ``dtype``."""
        params = [weight.to(dtype).requires_grad_() for weight in self.weights()]
        common = {"lr": LR, "weight_decay": DECAY, "foreach": False}
        optimizer = self.rule.oracle(params, **common | self.rule.options | options)
        states = self.states()
        for position, param in enumerate(params):
            param.grad = self.tensors["grads"][position].to(dtype) * factor
            step = self.tensors["steps"][position].item()
            optimizer.state[param] = {"step": torch.tensor(step)}
            # torch's SGD begins a buffer that it does not find.
            if step or self.rule.oracle is not torch.optim.SGD:
                for values, (_, name, _) in zip(states, self.rule.lists, strict=True):
                    optimizer.state[param][name] = values[position].to(dtype)
        optimizer.step()
        kept = [[optimizer.state[param][name] for param in params] for _, name, _ in self.rule.lists]
        return [param.detach() for param in params], kept

    def run(self, **options) -> None:
        arguments = {"lr": scalar(LR, self.device), "weight_decay": DECAY} | self.rule.op_options | options
        self.rule.op(**self.tensors, **arguments)

    def snapshot(self) -> dict[str, list[Tensor]]:
        return {name: [tensor.clone() for tensor in listed] for name, listed in self.tensors.items()}
