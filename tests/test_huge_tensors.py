"""Elements beyond the 2^31st of a tensor, in every kernel that takes many tensors in one launch.

Nobody has the memory to spare for that in a test. So each kernel is told that 2^31 elements come before a tensor's
own: in its size, in the number of its first chunk, and in the addresses, which then lie that much before the tensor.
"""

import pytest
import torch
from conftest import EPSILON, HAS_GPU, assert_within_budget
from step_problems import RULES, Problem, scalar

pytest.importorskip("triton")

from mixft.kernels import accumulate, grad, grad_scalars, optimizer_step, step_launch
from mixft.ops import accumulate_, grad_stats, unscale_
from mixft.ops import grad_scalars as grad_scalars_op

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
BEFORE = 2**31
# A whole chunk, and a part of one.
SIZES = [16384 + 17, 5]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if HAS_GPU else "1")
    return torch.device("cuda" if HAS_GPU else "cpu")


class Later:
    """Stands in for a jit function whose table has these bytes an element in each column, 0 where it is no address."""

    def __init__(self, function, element_sizes):
        self.function, self.element_sizes = function, element_sizes

    def __getitem__(self, grid):
        def launch(table, program_tensor, program_chunk, *args, **options):
            chunks = BEFORE // options["CHUNK"]
            shift = torch.tensor([-BEFORE, *self.element_sizes[1:]], dtype=torch.float64, device=table.device)
            shift[1:] *= BEFORE
            if self.function is optimizer_step.optimizer_step_kernel:
                # Programs of the chunks before that have finished.
                args = (args[0] + chunks, *args[1:])
            self.function[grid](table - shift.long(), program_tensor, program_chunk + chunks, *args, **options)

        return launch


def gradients(device, dtype):
    found = [torch.randn(size, device=device).to(dtype) for size in SIZES]
    found[0][[3, 16384]] = float("inf")
    return found


DTYPES = [torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
def test_unscaling_and_statistics(monkeypatch, device, dtype):
    grads = gradients(device, dtype)
    twins = [grad.clone() for grad in grads]
    for name in ("unscale_kernel", "partial_stats_kernel"):
        monkeypatch.setattr(grad, name, Later(getattr(grad, name), [0, dtype.itemsize, 0]))
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    found_inf = scalar(0.0, device)
    assert grad_stats(grads)[1].tolist() == [2, 0]
    unscale_(grads, scalar(0.5, device), found_inf, counts)
    assert found_inf.item() == 1
    assert counts.tolist() == [2, 0]
    assert all(torch.equal(grad, twin * 0.5) for grad, twin in zip(grads, twins, strict=True))


@every_dtype
def test_the_scalars_of_a_step(monkeypatch, device, dtype):
    grads = gradients(device, dtype)
    kernel = Later(grad_scalars.grad_scalars_kernel, [0, dtype.itemsize, 0])
    monkeypatch.setattr(grad_scalars, "grad_scalars_kernel", kernel)
    assert grad_scalars_op(grads).nonfinite.tolist() == [2, 0]
    grads[0][[3, 16384]] = 100.0
    exact, own = (torch.cat(grads).to(kind).norm() for kind in (torch.float64, torch.float32))
    assert_within_budget(grad_scalars_op(grads).norm, exact, own, EPSILON[torch.float32])


@every_dtype
def test_accumulation(monkeypatch, device, dtype):
    grads = gradients(device, dtype)
    buffers = [torch.randn(size, device=device) for size in SIZES]
    sums = [buffer + grad.float() for buffer, grad in zip(buffers, grads, strict=True)]
    kernel = Later(accumulate.accumulate_kernel, [0, dtype.itemsize, 4, 0])
    monkeypatch.setattr(accumulate, "accumulate_kernel", kernel)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    accumulate_(grads, buffers, found_inf=scalar(0.0, device), nonfinite=counts, clear=True)
    assert counts.tolist() == [2, 0]
    assert all(map(torch.equal, buffers, sums))
    assert not any(map(torch.any, grads))


@pytest.mark.parametrize("state", ["fp32", "codes"])
@pytest.mark.parametrize("rule", ["adamw amsgrad", "sgd nesterov", "lion"])
def test_the_step(monkeypatch, device, rule, state):
    shapes = [(size,) for size in SIZES]
    problem, twin = (
        Problem(RULES[rule], device, shapes, torch.bfloat16, master="split", state=state) for _ in range(2)
    )
    problem.tensors = twin.snapshot()
    twin.run()
    state_size = 4 if state == "fp32" else 1
    sizes = [0, 0, 2, 2, 2, *[state_size] * 3, *[1 / 32] * 3]
    assert len(sizes) == optimizer_step.COLUMNS.value
    kernel = Later(optimizer_step.optimizer_step_kernel, sizes)
    monkeypatch.setattr(step_launch, "optimizer_step_kernel", kernel)
    problem.run()
    # All but 8-bit state, whose rounding depends on an element's number, is the same bit for bit.
    for name in ("params", "masters", "steps"):
        assert all(map(torch.equal, problem.tensors[name], twin.tensors[name])), name
    for found, expected in zip(problem.states(), twin.states(), strict=True):
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=0.0 if state == "fp32" else 0.13, atol=1e-3)
