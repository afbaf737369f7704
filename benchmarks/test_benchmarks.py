"""The registry under pytest-benchmark: ``pytest benchmarks``. An output is checked before its call is timed."""

import pytest
import torch

from mixft.benchmarks.case import Case, Workload, complaint
from mixft.benchmarks.registry import CASES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def workload(case: Case) -> Workload:
    torch.manual_seed(0)
    return case.build(DEVICE)


PROVIDERS = [(case, provider) for case in CASES for provider in ("mixft", *case.peers)]


@pytest.mark.parametrize(
    ("case", "provider"), PROVIDERS, ids=[f"{case.name}-{provider}" for case, provider in PROVIDERS], scope="module"
)
def test_case(benchmark, workload, case, provider):
    benchmark.group = case.name
    call = workload.providers[provider]
    assert complaint(call(), workload, provider) is None

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
