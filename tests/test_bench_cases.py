"""The registry's cases are what they say: every provider that is here does the same work."""

import pytest
import torch

from mixft.benchmarks.case import complaint
from mixft.benchmarks.cases import shapes
from mixft.benchmarks.registry import CASES, find
from mixft.benchmarks.run import COMPILED, checked

CPU = torch.device("cpu")
# torch.compile computes what torch computes: a compiler run for each case would take minutes.
TESTED = [case for case in CASES if "cpu" in case.devices and (not case.long or case.family == "optimizer_step")]


@pytest.fixture(autouse=True)
def cpu_routines(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(shapes, "BERT", ((300, 7), (1000,), (1,)))


def test_every_case_has_its_own_name():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(find(name).name == name for name in names)


def test_mixft_comes_first_and_has_a_peer_in_every_case():
    for case in CASES:
        assert next(iter(case.providers)) == "mixft", case.name
        assert len(case.providers) > 1, case.name


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.family == "optimizer_step"], ids=lambda case: case.name
)
def test_a_step_that_changes_nothing_is_wrong(case):
    torch.manual_seed(0)
    inputs = case.inputs(CPU)
    assert complaint(shapes.sample(inputs[0]), case.exact(inputs), case.bound)


def shortened(inputs):
    """The same, with 16 tokens a sequence for a whole model."""
    *others, last = inputs
    if not isinstance(last, dict):
        return inputs
    return *others, {name: tensor[:, :16] if tensor.dim() == 2 else tensor for name, tensor in last.items()}


@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.name)
def test_the_providers_of_a_case_do_the_same_work(case):
    torch.manual_seed(0)
    inputs = shortened(case.inputs(CPU))
    exact = case.exact(inputs)
    for name, prepare in case.providers.items():
        if name.endswith(COMPILED):
            continue
        _, excuse = checked(prepare, inputs, exact, case.own_bounds.get(name, case.bound))
        if name == "mixft":
            assert excuse is None, excuse
        assert excuse is None or excuse[0] != "wrong", (name, excuse)
