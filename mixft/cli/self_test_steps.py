"""The self-test of ``mixft doctor`` for the ops over lists of tensors: gradients, and the optimizer steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from mixft import ops
from mixft.cli.self_test import FP32, ROUNDING, Case

ROWS, COLUMNS = 17, 66
# Of the optimizer steps: learning rate and weight decay.
RATE, DECAY = 0.1, 0.1


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1000).to(dtype), torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(1).to(dtype)]


def unscale_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        grads = [grad.clone() for grad in grads]
        spoiled = grads[0].clone()
        spoiled[-1] = float("inf")
        inverse, clean, overflow = (torch.full((1,), value, device=grads[0].device) for value in (0.3, 0.0, 0.0))
        ops.unscale_(grads, inverse, clean)
        ops.unscale_([spoiled], inverse, overflow)
        return [*grads, torch.cat([clean, overflow])]

    return Case(
        "unscale_",
        dtype,
        _gradients,
        actual,
        lambda *grads: [
            *(grad * torch.tensor(0.3).double() for grad in grads),
            torch.tensor([0.0, 1.0], dtype=torch.float64),
        ],
        ROUNDING[dtype],
    )


def grad_stats_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = torch.cat([grads[0], grads[0].new_tensor([float("nan"), float("-inf")])])
        return [ops.grad_stats(grads)[0], ops.grad_stats([spoiled])[1]]

    return Case(
        "grad_stats",
        dtype,
        _gradients,
        actual,
        lambda *grads: [torch.stack([grad.square().sum() for grad in grads]), torch.tensor([2.0], dtype=torch.float64)],
        ROUNDING[FP32],
    )


def _parameter_and_gradient(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS, COLUMNS).to(dtype)]


def _step_case(name: str, dtype: torch.dtype, moments: int, step_: Callable[..., None], exact: Callable) -> Case:
    """Two steps on FP32 masters with scaled gradients, then one that an overflow has to stop.

    Args:
        moments: state tensors a parameter.
        step_: called with the lists of parameters, gradients, masters, each state, and steps, and the scalars.
        exact: the parameter and its state after two steps, from the parameter and the unscaled gradient.
    """

    def actual(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone()
        masters = [] if dtype == FP32 else [param.float()]
        states = [torch.zeros_like(param, dtype=torch.float32) for _ in range(moments)]
        step, lr, inverse, clean, overflow = (
            torch.tensor(value, device=param.device) for value in (0.0, RATE, 0.25, 0.0, 1.0)
        )
        for found_inf in (clean, clean, overflow):
            listed = [[state] for state in states]
            step_([param], [grad], masters, *listed, [step], lr=lr, inv_scale=inverse, found_inf=found_inf)
        return [param, *(masters or [param]), *states, step]

    def expected(param: Tensor, grad: Tensor) -> list[Tensor]:
        weight, *states = exact(param, grad / 4)
        return [weight, weight, *states, torch.tensor(2.0, dtype=torch.float64)]

    return Case(name, dtype, _parameter_and_gradient, actual, expected, ROUNDING[dtype])


def _by_torch(make: Callable, *names: str) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Two steps of the torch optimizer that ``make`` makes: the parameter, and its state by ``names``."""

    def exact(param: Tensor, grad: Tensor) -> list[Tensor]:
        param = param.clone().requires_grad_()
        param.grad = grad
        optimizer = make([param], lr=RATE, weight_decay=DECAY)
        optimizer.step()
        optimizer.step()
        return [param.detach(), *(optimizer.state[param][name] for name in names)]

    return exact


def adamw_case(dtype: torch.dtype) -> Case:
    def step_(params, grads, masters, first, second, steps, **scalars) -> None:
        ops.adamw_(params, grads, masters, first, second, [], steps, weight_decay=DECAY, **scalars)

    return _step_case("adamw_", dtype, 2, step_, _by_torch(torch.optim.AdamW, "exp_avg", "exp_avg_sq"))


def sgd_case(dtype: torch.dtype) -> Case:
    options = {"momentum": 0.9, "nesterov": True}

    def step_(*tensors, **scalars) -> None:
        ops.sgd_(*tensors, weight_decay=DECAY, **options, **scalars)

    def make(params, **common) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **common, **options)

    return _step_case("sgd_", dtype, 1, step_, _by_torch(make, "momentum_buffer"))


def lion_case(dtype: torch.dtype) -> Case:
    def step_(*tensors, **scalars) -> None:
        ops.lion_(*tensors, weight_decay=DECAY, **scalars)

    def exact(param: Tensor, grad: Tensor) -> list[Tensor]:
        # A constant gradient: every step is along its sign.
        for _ in range(2):
            param = param * (1 - RATE * DECAY) - RATE * grad.sign()
        return [param, grad * (1 - 0.99**2)]

    return _step_case("lion_", dtype, 1, step_, exact)


def accumulate_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = grads[0].clone()
        spoiled[-1] = float("inf")
        sums = [torch.ones_like(grad, dtype=FP32) for grad in grads]
        flags = torch.zeros(2, device=grads[0].device)
        counts = torch.zeros(len(grads), dtype=torch.int64, device=grads[0].device)
        inv_scale = torch.full((1,), 0.25, device=grads[0].device)
        ops.accumulate_(grads, sums, found_inf=flags[:1], nonfinite=counts, inv_scale=inv_scale)
        ops.accumulate_([spoiled], [torch.zeros_like(sums[0])], found_inf=flags[1:], nonfinite=counts[:1])
        return [*sums, torch.cat([flags, counts[:1]])]

    def exact(*grads: Tensor) -> list[Tensor]:
        return [*(1 + grad / 4 for grad in grads), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)]

    return Case("accumulate_", dtype, _gradients, actual, exact, ROUNDING[FP32])


def grad_scalars_case(dtype: torch.dtype) -> Case:
    def actual(*grads: Tensor) -> list[Tensor]:
        spoiled = torch.cat([grads[0], grads[0].new_tensor([float("nan"), float("-inf")])])
        clean = ops.grad_scalars(grads, inv_scale=torch.tensor(0.25, device=grads[0].device), max_norm=1.0)
        broken = ops.grad_scalars([grads[1], spoiled])
        return [torch.stack([*clean[:3], broken.found_inf]), broken.nonfinite]

    def exact(*grads: Tensor) -> list[Tensor]:
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt() / 4
        flags = [torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0)]
        return [torch.stack([norm, 1 / (norm + 1e-6), *flags]), torch.tensor([0.0, 2.0], dtype=torch.float64)]

    return Case("grad_scalars", dtype, _gradients, actual, exact, ROUNDING[FP32])
