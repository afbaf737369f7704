"""``mixft.optim`` on the inputs that torch tests its own optimizers with, against torch's for-loop implementation.

``torch.testing._internal.common_optimizers.optim_db`` comes with torch. None of its inputs is left out: every one is
run and compared, or refused in an error that names the option, and those that are refused are listed here.
"""

import importlib.util
import re
import sys
import types
import unittest
import warnings

import pytest
import torch
from conftest import assert_within_budget
from optimizer_cases import CASES, DTYPES, copies, members, weight

# Options that choose between torch's implementations; mixft's optimizers have one, which is always capturable.
IMPLEMENTATION_OPTIONS = ("capturable", "foreach", "fused", "differentiable")
TORCH_CASES = [case for case in CASES if case.reference.__module__.startswith("torch.optim")]

# Inputs of torch's for which torch and mixft answer in other words or with another error, by description.
OTHER_WORDS = {
    "Tensor lr must be 1-element": (ValueError, "lr is a tensor of shape"),
    "a param group cannot have duplicate parameters": (ValueError, "parameters 0 and 1 of group 0 are the same tensor"),
    "beta1 should be between 0 and 1": (ValueError, "betas is"),
    "weight_decay should > 0": (ValueError, "weight_decay is -1"),
    "momentum should be between 0 and 1": (ValueError, "momentum is -0.5"),
    "betas must be either both floats or both Tensors": (ValueError, "betas is .* both numbers or both tensors"),
    "lr as Tensor doesn't work with foreach & not capturable": (TypeError, "'foreach'"),
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": (TypeError, "'foreach'"),
    "`fused` and `foreach` cannot be `True` together": (TypeError, "'foreach'|'fused'"),
    "`fused` does not support `differentiable`": (TypeError, "'fused'|'differentiable'"),
}


@pytest.fixture(scope="module")
def infos():
    """torch's test information by optimizer class."""
    if importlib.util.find_spec("expecttest") is None:
        # torch's test helpers take one base class from it, which nothing here uses.
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    from torch.testing._internal.common_optimizers import optim_db

    # The import forbids the whole process to set torch.backends flags.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return {info.optim_cls: info for info in optim_db}


def tensors(device, dtype, contiguous):
    """A matrix, a vector and a scalar; not contiguous: the first two with gaps between their elements."""
    made = [torch.randn(shape).to(device, dtype) for shape in ((6, 10), (69,), ())]
    return made if contiguous else [made[0][:, ::2].t(), made[1][1::2], made[2]]


def inputs(info):
    """All of torch's inputs for this optimizer, those for a GPU too, with what ours has no option for."""
    for given in info.optim_inputs_func(device="cuda", dtype=torch.float16):
        others = {name: value for name, value in given.kwargs.items() if name not in IMPLEMENTATION_OPTIONS}
        yield given.desc, others, {name: given.kwargs[name] for name in given.kwargs.keys() - others.keys()}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_every_input_is_as_exact_as_torch_s_for_loop(device, infos, case, dtype, contiguous):
    for description, options, implementation in inputs(infos[case.reference]):
        params = [torch.nn.Parameter(tensor) for tensor in tensors(device, dtype, contiguous)]
        assert all(param.is_contiguous() == contiguous for param in params[:2])
        if implementation:
            with pytest.raises(TypeError, match="|".join(map(repr, implementation))):
                case.ours(params, **options, **implementation)
        ours = case.ours(params, **options)
        loops = [
            case.reference(copies(params, kind), **numbers(options), foreach=False)
            for kind in (torch.float64, torch.float32, dtype)
        ]
        for _ in range(2):
            for listed in zip(params, *map(members, loops), strict=True):
                grad = torch.randn_like(params[0] if listed[0].dim() == 2 else listed[0])
                for param in listed:
                    param.grad = grad.to(param.dtype)
            for optimizer in (ours, *loops):
                optimizer.step()
        for param, exact, single, same in zip(params, *map(members, loops), strict=True):
            try:
                assert_within_budget(weight(ours, param), exact, single, epsilon=1e-6)
                assert_within_budget(param, exact, same, epsilon=torch.finfo(dtype).eps / 2 + 1e-6)
            except AssertionError as error:
                raise AssertionError(f"{description}: {error}") from error


def numbers(options):
    """The options with tensors read: torch's loops would compute in the dtype of a tensor lr."""

    def number(value):
        if isinstance(value, tuple):
            return tuple(map(number, value))
        return value.item() if isinstance(value, torch.Tensor) else value

    return {name: number(value) for name, value in options.items()}


@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_every_error_input_is_refused(infos, case):
    count = 0
    for given in infos[case.reference].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        made = given.optimizer_error_input
        params = made.params
        if params is None:
            params = [torch.nn.Parameter(torch.randn(2, 3))]
        error, words = OTHER_WORDS.get(made.desc, (given.error_type, given.error_regex))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(error) as caught:
                case.ours(params, **made.kwargs)
        assert re.search(words, str(caught.value)), made.desc
        count += 1
    assert count >= 7
