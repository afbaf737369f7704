"""Memory figures of the benchmarks come from a fresh process, and show what a provider holds and needs."""

import pytest
import torch

from mixft.benchmarks.memory import available_bytes, measure_memory
from mixft.benchmarks.registry import find

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cpu_routines(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_the_peak_is_what_the_tensors_take_and_a_little_more():
    case = find("parameters/adamw-fp32-10000000")
    found = measure_memory(case, "torch fused", CPU)
    peak, resident = found.pop("peak"), found.pop("resident")
    tensors = {"parameters", "gradients", "exp_avg", "exp_avg_sq"}
    assert {name for name, size in found.items() if size > 1e6} == tensors
    assert all(found[name] == 4e7 for name in tensors)
    assert 1.6e8 < peak < 1.9e8
    assert 1.58e8 < resident < peak + 1e6
    by_loop = measure_memory(case, "torch foreach", CPU)
    assert by_loop["peak"] > peak + 3e7  # it holds another copy of the parameters for a while
    assert by_loop["resident"] < resident + 2e7


def test_the_free_memory_is_that_of_the_machine():
    assert 1e8 < available_bytes(CPU) < 1e14
