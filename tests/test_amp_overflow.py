"""Overflow attribution: which parameters, how many elements, at which iterations; and the warning at the floor."""

import copy
import pickle
import warnings

import pytest
import torch

import mixft.optim
from mixft.amp import LossScaler

INF, NAN = float("inf"), float("nan")
UNSCALING = [torch.optim.SGD, mixft.optim.AdamW]


def model_of(device="cpu", dtype=torch.float32):
    layers = {"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 3)}
    return torch.nn.ModuleDict(layers).to(device, dtype)


def iterate(scaler, optimizer, spoilt=()):
    """One iteration; ``spoilt`` lists (group, position of the parameter, its first so many elements, value)."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = scaler.scale(torch.ones_like(param))
    for group, position, count, value in spoilt:
        optimizer.param_groups[group]["params"][position].grad.view(-1)[:count] = value
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("make", UNSCALING)
def test_parameters_are_named_and_their_elements_counted(device, make, dtype):
    model = model_of(device, dtype)
    optimizer = make(model.named_parameters(), lr=1e-3)
    scaler = LossScaler(8.0, device=device.type)
    assert scaler.overflow_report() == []
    iterate(scaler, optimizer)
    assert scaler.overflow_report() == []
    iterate(scaler, optimizer, [(0, 3, 2, INF), (0, 0, 7, NAN)])
    iterate(scaler, optimizer)
    assert scaler.overflow_report() == [("first.weight", 7), ("second.bias", 2)]
    iterate(scaler, optimizer, [(0, 2, 1, -INF)])
    assert scaler.overflow_report() == [("second.weight", 1)]
    assert scaler.overflow_history() == [
        (2, [("first.weight", 7), ("second.bias", 2)]),
        (4, [("second.weight", 1)]),
    ]
    assert scaler.overflow_steps == 2


class Wrapped(torch.Tensor):
    """A tensor of another library, as a sharded one is."""


def test_gradients_of_a_subclass_alone_are_scaled_and_checked():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5)
    scaler = LossScaler(8.0, device="cpu")
    for value in (1.0, INF, 1.0):
        param.grad = scaler.scale(torch.full((3,), value)).as_subclass(Wrapped)
        scaler.step(optimizer)
        scaler.update()
    assert param.tolist() == [0.0] * 3
    assert scaler.overflow_steps == 1


def test_parameters_without_names_are_known_by_group_position_and_shape():
    model = model_of()
    groups = [{"params": [model["first"].weight]}, {"params": [model["second"].bias, model["second"].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scaler = LossScaler(8.0, device="cpu")
    iterate(scaler, optimizer, [(0, 0, 16, NAN), (1, 0, 1, NAN)])
    assert scaler.overflow_report() == [("group 0, parameter 0 (4, 4)", 16), ("group 1, parameter 0 (3,)", 1)]


@pytest.mark.parametrize("make", UNSCALING)
def test_after_unscale(device, make):
    model = model_of(device)
    optimizer = make(model.named_parameters(), lr=1e-3)
    scaler = LossScaler(8.0, device=device.type)
    scaler.scale(torch.ones((), device=device))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model["second"].weight.grad[0] = NAN
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report() == [("second.weight", 4)]


def test_an_optimizer_that_clips_is_the_only_one_to_read_the_gradients(device, monkeypatch):
    model = model_of(device)
    optimizer = mixft.optim.AdamW(model.named_parameters(), lr=1e-3, max_grad_norm=1.0)
    before = [param.detach().clone() for param in model.parameters()]
    scaler = LossScaler(8.0, device=device.type)
    monkeypatch.delattr("mixft.amp.gradients.grad_scalars_unchecked")
    iterate(scaler, optimizer, [(0, 2, 3, NAN)])
    assert scaler.overflow_report() == [("second.weight", 3)]
    # Finite elements whose norm is beyond FP32: the step is skipped, and the scale has to come down.
    iterate(scaler, optimizer, [(0, 2, 3, 3e38)])
    assert scaler.overflow_report() == []
    assert [step.iteration for step in scaler.overflow_history()] == [1, 2]
    assert (scaler.get_scale(), scaler.overflow_steps) == (2.0, 2)
    assert all(map(torch.equal, model.parameters(), before))
    iterate(scaler, optimizer)
    assert (scaler.get_scale(), scaler.overflow_steps) == (2.0, 2)
    optimizer.zero_grad()
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()


def test_parameters_without_a_gradient_and_gradients_of_other_kinds():
    table = torch.nn.Embedding(6, 2, sparse=True)
    wide = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    idle, plain = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    named = [("idle", idle), ("wide", wide), ("table", table.weight), ("plain", plain)]
    optimizer = torch.optim.SGD(named, lr=0.1)
    scaler = LossScaler(8.0, device="cpu")
    scaler.scale(torch.ones(()))
    for spoilt in ([wide], [plain], [wide, plain, table.weight]):
        wide.grad, plain.grad = torch.ones_like(wide), torch.ones_like(plain)
        table.weight.grad = None
        table(torch.tensor([1, 4])).sum().backward()
        for param in spoilt:
            values = param.grad._values() if param.grad.is_sparse else param.grad
            values.view(-1)[-2:] = INF
        scaler.step(optimizer)
        scaler.update()
    names = [[name for name, _ in step.parameters] for step in scaler.overflow_history()]
    assert names == [["wide"], ["plain"], ["wide", "table", "plain"]]
    assert scaler.overflow_report() == [("wide", 2), ("table", 2), ("plain", 2)]


def test_several_optimizers_overflow_in_one_iteration():
    model = model_of()
    optimizers = [
        torch.optim.SGD([(f"{name}.{part}", param) for part, param in layer.named_parameters()], lr=0.1)
        for name, layer in model.items()
    ]
    scaler = LossScaler(8.0, device="cpu")
    for bad in (("first", "second"), ("second",), ()):
        for optimizer, name in zip(optimizers, model, strict=True):
            for param in model[name].parameters():
                param.grad = scaler.scale(torch.full_like(param, NAN if name in bad else 1.0))
            scaler.step(optimizer)
        scaler.update()
    assert [(step.iteration, len(step.parameters)) for step in scaler.overflow_history()] == [(1, 4), (2, 2)]
    assert scaler.overflow_report() == [("second.weight", 12), ("second.bias", 3)]
    assert scaler.overflow_steps == 3


def test_the_last_sixteen_steps_are_kept():
    param = torch.nn.Parameter(torch.ones(40))
    optimizer = torch.optim.SGD([("weight", param)], lr=0.1)
    scaler = LossScaler(8.0, min_scale=2.0**-60, device="cpu")
    for count in range(40):
        iterate(scaler, optimizer, [(0, 0, count, INF)])
    assert scaler.overflow_history() == [(count + 1, [("weight", count)]) for count in range(24, 40)]


def test_a_group_added_later_and_parameters_replaced():
    model = model_of()
    optimizer = torch.optim.SGD(model["first"].parameters(), lr=0.1)
    scaler = LossScaler(8.0, device="cpu")
    iterate(scaler, optimizer, [(0, 1, 2, INF)])
    optimizer.add_param_group({"params": list(model["second"].parameters())})
    iterate(scaler, optimizer, [(1, 0, 3, INF)])
    assert scaler.overflow_history() == [
        (1, [("group 0, parameter 1 (4,)", 2)]),
        (2, [("group 1, parameter 0 (3, 4)", 3)]),
    ]
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(7))]
    iterate(scaler, optimizer, [(0, 0, 5, INF)])
    assert scaler.overflow_report() == [("group 0, parameter 0 (7,)", 5)]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_the_history_survives_a_checkpoint(way, tmp_path):
    optimizer = torch.optim.SGD(model_of().named_parameters(), lr=0.1)
    scaler = LossScaler(8.0, device="cpu")
    iterate(scaler, optimizer, [(0, 1, 2, INF)])
    iterate(scaler, optimizer)
    if way == "state_dict":
        torch.save(scaler.state_dict(), tmp_path / "scaler.pt")
        twin = LossScaler(device="cpu")
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        iterate(twin, other, [(0, 0, 1, INF)])
        twin.load_state_dict(torch.load(tmp_path / "scaler.pt", weights_only=True))
    else:
        twin = copy.deepcopy(scaler) if way == "deepcopy" else pickle.loads(pickle.dumps(scaler))
    assert twin.state_dict() == scaler.state_dict()
    iterate(twin, optimizer, [(0, 0, 1, INF)])
    assert twin.overflow_history() == [(1, [("first.bias", 2)]), (3, [("first.weight", 1)])]


def at_the_floor(scaler, optimizer, iterations):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(iterations):
            iterate(scaler, optimizer, [(0, 2, 5, INF), (0, 3, 1, NAN)])
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def test_a_scale_that_stays_at_its_floor_is_reported_once_with_parameter_and_layer():
    optimizer = torch.optim.SGD(model_of().named_parameters(), lr=0.1)
    scaler = LossScaler(4.0, min_scale=1.0, patience=6, device="cpu")
    # Two overflows to the floor, and the count of six is up at the look after that.
    assert at_the_floor(scaler, optimizer, 7) == []
    (message,) = at_the_floor(scaler, optimizer, 30)
    assert "at its floor, 1, for 11 iterations" in message
    assert "second.weight of layer second (5 elements); second.bias of layer second (1 elements)" in message
    assert "keep the layer in FP32" in message


def test_no_warning_without_an_overflow_at_the_floor_or_after_leaving_it():
    optimizer = torch.optim.SGD(model_of().named_parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calm = LossScaler(1.0, min_scale=1.0, patience=2, device="cpu")
        recovering = LossScaler(2.0, min_scale=1.0, patience=4, growth_interval=2, device="cpu")
        static = LossScaler(1.0, min_scale=1.0, patience=2, dynamic=False, device="cpu")
        for iteration in range(20):
            iterate(calm, optimizer)
            iterate(recovering, optimizer, [(0, 0, 1, INF)] if iteration % 4 == 0 else [])
            iterate(static, optimizer, [(0, 0, 1, INF)])
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == []
    assert [scaler.overflow_steps for scaler in (calm, recovering, static)] == [0, 5, 20]


def test_a_disabled_scaler_reports_nothing():
    scaler = LossScaler(enabled=False, device="cpu")
    assert scaler.overflow_report() == scaler.overflow_history() == []


def add_one(params):
    params.append(torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(("edit", "name"), [(add_one, "group 0, parameter 1 (4,)"), (list.pop, "first.bias")])
@pytest.mark.parametrize("make", UNSCALING)
def test_a_list_of_named_parameters_that_was_edited(make, edit, name):
    model = model_of()
    optimizer = make(model.named_parameters(), lr=1e-3)
    scaler = LossScaler(8.0, device="cpu")
    iterate(scaler, optimizer, [(0, 1, 2, INF)])
    assert scaler.overflow_report() == [("first.bias", 2)]
    edit(optimizer.param_groups[0]["params"])
    iterate(scaler, optimizer, [(0, 1, 3, INF)])
    assert scaler.overflow_report() == [(name, 3)]
