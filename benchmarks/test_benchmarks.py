"""The registry under pytest-benchmark: ``pytest benchmarks``. An output is checked before its call is timed.

A peer that is not installed or refuses a case is skipped, with the reason (``-rs``); mixft itself never is.
"""

from functools import lru_cache

import pytest
import torch

from mixft.benchmarks.case import OURS
from mixft.benchmarks.registry import CASES, cases_for
from mixft.benchmarks.run import checked

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = [(case, provider) for case in cases_for(DEVICE) for provider in case.providers]


@lru_cache(maxsize=1)
def inputs_of(position: int):
    torch.manual_seed(0)
    inputs = CASES[position].inputs(DEVICE)
    return inputs, CASES[position].exact(inputs)


@pytest.mark.parametrize(("case", "provider"), PROVIDERS, ids=[f"{case.name}-{name}" for case, name in PROVIDERS])
def test_case(benchmark, case, provider):
    benchmark.group = case.name
    inputs, exact = inputs_of(CASES.index(case))
    call, excuse = checked(case.providers[provider], inputs, exact, case.own_bounds.get(provider, case.bound))
    if provider != OURS and excuse is not None and excuse[0] != "wrong":
        pytest.skip(": ".join(excuse))
    assert excuse is None, excuse

    def run():
        call.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
