"""How much a whole step launches and asks of the host: two kernels a dtype, and nothing that waits."""

import numpy as np
import pytest
import torch
from recorded_launches import Recorder
from step_problems import RULES, Problem, scalar
from torch.utils._python_dispatch import TorchDispatchMode

from mixft.ops import grad_scalars

pytest.importorskip("triton")


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    if torch.cuda.is_available():
        from triton.runtime.jit import JITFunction as Kernel
    else:
        from triton.runtime.interpreter import GridExecutor as Kernel
    method = "run" if torch.cuda.is_available() else "__call__"
    names, run = [], getattr(Kernel, method)

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    monkeypatch.setattr(Kernel, method, counted)
    return names


def launched_by_a_step(problem, launches):
    launches.clear()
    found = grad_scalars(problem.tensors["grads"], inv_scale=scalar(0.5, problem.device), max_norm=1.0)
    problem.run(inv_scale=scalar(0.5, problem.device), clip_coef=found.clip_coef, found_inf=found.found_inf)
    return launches


@pytest.mark.parametrize("rule", RULES)
def test_two_launches_for_fifty_tensors_of_one_dtype(launches, rule):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = "codes" if RULES[rule].lists else "fp32"
    problem = Problem(RULES[rule], device, [(17,)] * 50, torch.bfloat16, master="split", state=state)
    assert launched_by_a_step(problem, launches) == ["grad_scalars_kernel", "optimizer_step_kernel"]


def test_one_more_of_each_for_another_dtype(launches):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(RULES["adamw"], device, [(17,)] * 4, torch.float16, torch.float16, "fp32")
    problem.tensors["params"][2:] = [param.bfloat16() for param in problem.tensors["params"][2:]]
    problem.tensors["grads"][2:] = [grad.bfloat16() for grad in problem.tensors["grads"][2:]]
    assert sorted(launched_by_a_step(problem, launches)) == ["grad_scalars_kernel"] * 2 + ["optimizer_step_kernel"] * 2


def test_a_number_is_passed_as_a_float_whatever_its_type(monkeypatch):
    """Triton compiles for an integer apart, and refuses a scalar of NumPy."""
    from mixft.kernels import grad_scalars as scalars
    from mixft.kernels import step_launch

    calls = []
    monkeypatch.setattr(step_launch, "optimizer_step_kernel", Recorder(step_launch.optimizer_step_kernel, calls))
    monkeypatch.setattr(scalars, "grad_scalars_kernel", Recorder(scalars.grad_scalars_kernel, calls))
    one = [torch.ones(3)]
    rule = step_launch.UpdateRule("sgd", False, weight_decay=np.float32(0.5), momentum=0, one_minus_dampening=1)
    step_launch.launch_step(one, one, [], [[]], [[]], one, one[0], None, None, None, False, rule)
    scalars.gradient_scalars(one, None, None, 1)
    for _, args, _ in calls:
        assert {type(arg) for arg in args} <= {torch.Tensor, float, int, type(None)}
    (_, step, _), (_, found, _) = calls
    assert step[-3:] == (0.0, 1.0, 0.5)
    assert [type(arg) for arg in (*step[8:], found[11])].count(float) == 4


def test_launches_that_are_broken_off_leave_nothing_to_the_next(monkeypatch):
    """As by Ctrl-C, while the second of two kernels compiles."""
    from mixft.kernels import grad_scalars as scalars

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel, grids = scalars.grad_scalars_kernel, []

    class Interrupted:
        def __getitem__(self, grid):
            grids.append(grid)
            if len(grids) == 2:
                raise KeyboardInterrupt
            return kernel[grid]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grads = [torch.full((5,), 3.0, device=device), torch.full((7,), torch.inf, dtype=torch.float16, device=device)]
    monkeypatch.setattr(scalars, "grad_scalars_kernel", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        scalars.gradient_scalars(grads[::-1], None, None, None)
    grads[1].fill_(4.0)
    for _ in range(2):
        found, nonfinite = scalars.gradient_scalars(grads, None, None, None)
        assert found.tolist() == [pytest.approx((5 * 9 + 7 * 16) ** 0.5), 1.0, 0.0]
        assert nonfinite.tolist() == [0, 0]


class Operators(TorchDispatchMode):
    """Notes every operator of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_else_runs_on_the_device(launches):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(RULES["adamw"], device, [(17,)] * 3, torch.bfloat16, master="split", state="codes")
    scalars = {"inv_scale": scalar(0.5, device), "found_inf": scalar(0.0, device)}
    problem.run(**scalars)
    with Operators() as seen:
        found = grad_scalars(problem.tensors["grads"], max_norm=1.0)
        problem.rule.op(**problem.tensors, lr=scalars["inv_scale"], clip_coef=found.clip_coef)
    harmless = {"aten::empty", "aten::new_empty", "aten::unbind", "aten::unbind.int", "aten::detach"}
    ours = {"mixft::gradient_scalars", "mixft::adamw_step_"}
    assert set(seen.names) <= harmless | ours, set(seen.names)
