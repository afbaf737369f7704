"""What ``mixft.optim`` refuses, by name, with nothing changed."""

import copy

import pytest
import torch
from optimizer_cases import CASES, every_optimizer, members

from mixft.optim import SGD, AdamW


def one_parameter():
    return torch.nn.Parameter(torch.ones(2))


SHARED = [
    ({"lr": -1.0}, "lr is -1.0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr is a tensor of shape"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
    ({"master_weights": "half"}, "master_weights is 'half'; it must be one of auto, fp32, split, none"),
    ({"state_dtype": torch.float16}, "state_dtype is torch.float16; it must be one of torch.float32, torch.bfloat16"),
    ({"stochastic_rounding": True}, "stochastic_rounding is True and master_weights 'auto'"),
]
BETAS = [
    ({"betas": (1.0, 0.9)}, "betas is"),
    ({"betas": (0.9, -0.1)}, "betas is"),
    ({"betas": (0.9,)}, "betas is"),
    ({"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))}, "betas has a tensor of shape"),
]
ADAM = [*BETAS, ({"eps": -1e-8}, "eps is")]
MOMENTUM = [
    ({"momentum": -0.5}, "momentum is -0.5"),
    ({"nesterov": True}, "nesterov is True with momentum 0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov is True with momentum 0.9 and dampening 0.1"),
]
OWN = {"AdamW": ADAM, "Adam": ADAM, "SGD": MOMENTUM, "Lion": BETAS}


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [(case, *row) for case in CASES for row in (*SHARED, *OWN[str(case)])],
    ids=str,
)
def test_bad_hyperparameters(case, options, message):
    with pytest.raises(ValueError, match=message):
        case.ours([one_parameter()], **options)


@pytest.mark.parametrize(
    "options",
    [{"lr": "0.1"}, {"lr": None}, {"weight_decay": torch.tensor(0.1)}, {"weight_decay": "0"}, {"max_grad_norm": "1"}],
    ids=str,
)
@every_optimizer
def test_what_is_no_number_is_refused_by_name(case, options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} is .*; it must be a"):
        case.ours([one_parameter()], **options)


@pytest.mark.parametrize("dampening", ["0.5", torch.tensor(0.5)], ids=str)
def test_a_dampening_that_is_no_number_is_refused(dampening):
    with pytest.raises(TypeError, match=r"dampening is .*; it must be a number"):
        SGD([one_parameter()], momentum=0.9, dampening=dampening)


@every_optimizer
def test_a_model_in_place_of_its_parameters_is_refused(case):
    with pytest.raises(TypeError, match=r"params is a Linear; give its parameters\(\)"):
        case.ours(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("betas", [0.9, None, ("0.9", 0.9), (None, 0.9)])
def test_betas_that_are_no_numbers_are_refused_by_name(betas):
    with pytest.raises(TypeError, match=r"betas is .*; it must be two numbers"):
        AdamW([one_parameter()], betas=betas)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
@every_optimizer
def test_parameters_of_other_dtypes_are_refused(case, dtype):
    optimizer = case.ours([one_parameter()])
    with pytest.raises(TypeError, match=f"tensor of {dtype}"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


def test_16_bit_parameters_in_one_memory_are_refused():
    first, second = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    second.data = first.data
    with pytest.raises(
        ValueError, match="parameter 0 of group 0 and parameter 1 of group 0 are two tensors in the same memory"
    ):
        AdamW([first, second])
    halves = torch.ones(8, dtype=torch.bfloat16).split(4)
    AdamW([*map(torch.nn.Parameter, halves), *(torch.nn.Parameter(torch.ones(0).half()) for _ in range(2))])
    AdamW([torch.nn.Parameter(torch.ones(4, device="meta").half()) for _ in range(2)])


@every_optimizer
def test_a_parameter_given_twice_or_expanded_is_refused(case):
    param = one_parameter()
    optimizer = case.ours([one_parameter()])
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match="0 and 2 of group 1 are the same"),
    ):
        optimizer.add_param_group({"params": [param, one_parameter(), param]})
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 has strides \(0,\) for shape \(5,\)"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1).expand(5))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"max_grad_norm": 1.0}, {"fused": True}])
@every_optimizer
def test_bad_groups(case, option):
    optimizer = case.ours([one_parameter()])
    with pytest.raises(ValueError, match=next(iter(option))):
        optimizer.add_param_group({"params": [one_parameter()], **option})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_unknown_options_and_sparse_gradients_are_refused(case):
    table = torch.nn.Embedding(5, 3, sparse=True)
    with pytest.raises(TypeError, match="momentums"):
        case.ours(table.parameters(), momentums=0.9)
    optimizer = case.ours(table.parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse_coo"):
        optimizer.step()
    assert torch.equal(table.weight, before)
    assert not optimizer.state


def stepped(case, **options):
    param = torch.nn.Parameter(torch.ones(40))
    optimizer = case.ours([param], **case.options | options)
    param.grad = torch.ones(40)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("shape", [(10,), (8, 5)])
@every_optimizer
def test_a_parameter_that_was_given_another_shape_is_refused(case, shape):
    param, optimizer = stepped(case)
    before = copy.deepcopy(optimizer.state[param])
    param.grad = None
    param.data = torch.ones(shape)
    param.grad = torch.ones(shape)
    with pytest.raises(ValueError, match=r"has shape \(40,\) and its parameter \(.*\) by now; delete"):
        optimizer.step()
    assert (param == 1).all()
    torch.testing.assert_close(optimizer.state[param], before, rtol=0, atol=0)
    del optimizer.state[param]
    optimizer.step()
    assert (param < 1).all()


@every_optimizer
def test_a_gradient_of_another_shape_is_refused(case):
    param, optimizer = stepped(case)
    param.data = torch.ones(10)
    with pytest.raises(ValueError, match=r"a gradient has shape \(40,\) and its parameter, .* \(10,\)"):
        optimizer.step()
    assert (param == 1).all()


@every_optimizer
def test_a_rate_of_several_elements_is_refused_before_any_group_is_stepped(case):
    param, optimizer = stepped(case)
    other = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other]})
    param.grad, other.grad = torch.ones_like(param), torch.ones(2)
    optimizer.param_groups[1]["lr"] = torch.ones(2)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"lr is a tensor of shape \(2,\)"):
        optimizer.step()
    assert torch.equal(param, before)


@every_optimizer
def test_a_gradient_of_negated_numbers_is_refused(case):
    """No backward gives one; its memory holds the numbers of the other sign."""
    param, optimizer = stepped(case)
    param.grad = torch._neg_view(torch.ones_like(param))
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"view of the negative of its numbers.*assign its resolve_neg\(\)"):
        optimizer.step()
    assert torch.equal(param, before)
    param.grad = param.grad.resolve_neg()
    optimizer.step()


@pytest.mark.usefixtures("without_interpreter")
@every_optimizer
def test_a_parameter_without_memory_is_refused(case):
    param, optimizer = stepped(case)
    before = copy.deepcopy(optimizer.state[param])
    param.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"has no memory of its own|data is not allocated"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param], before, rtol=0, atol=0)


def test_16_bit_parameters_of_two_groups_in_one_memory_are_refused():
    first, second = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    second.data = first.data
    with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 1 of group 1 are two tensors"):
        AdamW([{"params": [first]}, {"params": [torch.nn.Parameter(torch.ones(4).half()), second]}])


@every_optimizer
def test_entries_of_the_user_s_own_in_the_state(case):
    optimizer = case.ours([one_parameter()], **case.options)
    optimizer.state["global_step"] = 5
    param = members(optimizer)[0]
    for _ in range(2):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert not torch.equal(param, before)
