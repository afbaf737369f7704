"""``define_op``: which code serves a call, what it says without Triton, and that nothing loads before a call."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import mixft
import mixft.nn
from mixft.ops.registration import cpu_routine, define_op, interpreting, launcher, without_dispatch

unused = (f"probe_{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def forget_loaded_code():
    launcher.cache_clear()
    cpu_routine.cache_clear()
    yield
    launcher.cache_clear()
    cpu_routine.cache_clear()


@pytest.fixture
def op(monkeypatch):
    """An op whose launcher adds 1 and whose CPU routine adds 2."""
    name = next(unused)
    for package, amount in (("kernels", 1), ("cpu", 2)):
        module = ModuleType(f"mixft.{package}.{name}")
        setattr(module, name, lambda x, amount=amount: x + amount)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def fake(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return define_op(name, name=name)(fake)


@pytest.mark.parametrize(("value", "added"), [("1", 1), ("0", 2), ("", 2), (None, 2)])
def test_the_interpreter_switch_chooses_the_code(op, monkeypatch, value, added):
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() == (added == 1)
    assert op(torch.zeros(2)).tolist() == [added, added]


def test_the_switch_is_read_at_every_call(op, monkeypatch):
    for value, added in [("1", 1), ("0", 2), ("1", 1)]:
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert op(torch.zeros(1)).item() == added


def test_a_fake_tensor_reaches_neither(op):
    with FakeTensorMode() as mode:
        result = op(mode.from_tensor(torch.zeros(3, 5)))
    assert result.shape == (3, 5)


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated")
def test_calls_that_others_have_to_see_go_through_the_dispatcher(op, monkeypatch):
    x, seen = torch.zeros(2), []

    def look(y: Tensor) -> Tensor:
        seen.append(without_dispatch(op, x, y))
        return y * 2

    for interpreted, added in (("0", 2), ("1", 1)):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        for plain in (x, torch.nn.Parameter(x), None):
            serve = without_dispatch(op, x, plain)
            assert serve is not op
            assert serve(x).tolist() == [added, added]
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    look(x.as_subclass(Subclass))
    torch.func.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    seen.append(without_dispatch(op, torch.zeros(2, device="meta")))
    assert len(seen) == 5
    assert all(serve is op for serve in seen)


def test_cpu_and_cuda_are_both_served(op):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._qualname, key)


def test_the_name_defaults_to_the_fake_s():
    def probe_named_by_its_fake(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    assert define_op("nowhere")(probe_named_by_its_fake)._qualname == "mixft::probe_named_by_its_fake"


def test_a_module_is_loaded_at_the_first_call_and_not_before():
    def probe_without_code(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    op = define_op("a_module_that_is_not_there")(probe_without_code)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        op(torch.zeros(1))


def test_mutated_arguments_are_in_the_schema():
    def probe_in_place(x: Tensor, y: Tensor) -> None:
        pass

    op = define_op("nowhere", mutates_args=("y",))(probe_in_place)
    x, y = op._opoverload._schema.arguments
    assert x.alias_info is None
    assert y.alias_info.is_write


def test_missing_triton_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mixft.kernels.quantize", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"mixft\.quantize .*needs Triton.*pip install triton.*torch \d") as caught:
        torch.ops.mixft.quantize(torch.ones(1, 4, 1), True, None)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_cpu_routine_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    values, _, _ = torch.ops.mixft.quantize(torch.ones(1, 4, 1), True, None)
    assert values.flatten().tolist() == [127] * 4


def test_another_missing_module_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_kernel"):
        launcher("no_such_kernel", "anything")


def test_code_that_lacks_the_op_is_an_error():
    with pytest.raises(AttributeError, match="no_such_routine"):
        cpu_routine("quantize", "no_such_routine")


def test_a_view_of_negated_numbers_keeps_its_sign(device):
    x = torch._neg_view(torch.randn(4, 6, device=device))
    assert x.is_neg()
    values, scale, _ = mixft.ops.quantize(x)
    expected, expected_scale, _ = mixft.ops.quantize(x.resolve_neg())
    assert torch.equal(values, expected)
    assert torch.equal(scale, expected_scale)


def frozen(x, bias):
    weight = torch.randint(-9, 9, (6, 6), generator=torch.Generator().manual_seed(1)).to(x.device, torch.int8)
    return mixft.ops.dynamic_int8_linear(x, weight, torch.ones(6, 1, device=x.device), bias)


def dropped(x, bias):
    torch.manual_seed(5)
    return mixft.nn.Dropout(0.5)(x) + bias


CALLS = {
    "matmul": lambda x, bias: mixft.ops.matmul(x, x.t() @ x, bias, "gelu", residual=bias.expand(x.shape)),
    "matmul with a plain bias": lambda x, bias: mixft.ops.matmul(x, x.t() @ x, bias + 0, residual=x),
    "mlp": lambda x, bias: mixft.ops.mlp(x, x.t() @ x, bias, x.t() @ x, bias, residual=x),
    "activation": lambda x, bias: mixft.nn.GELU()(x) * bias,
    "dropout": dropped,
    "dynamic layer": frozen,
    "training layer": lambda x, bias: mixft.ops.training_int8_linear(x, x.t() @ x, bias),
}


@pytest.mark.parametrize("negated", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_operands_and_gradients_of_negated_numbers_keep_their_sign(device, call, negated):
    torch.manual_seed(2)
    x, bias, grad = (torch.randn(size, device=device) for size in ((4, 6), (6,), (4, 6)))

    def results(turn, with_gradients=True):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = CALLS[call](*(turn(leaf) if place in negated else leaf for place, leaf in enumerate(leaves)))
        return (out, *torch.autograd.grad(out, leaves, turn(grad))) if with_gradients else (out,)

    turned = results(torch._neg_view)
    plain = results(lambda tensor: -tensor)
    with torch.no_grad():
        without_gradients = results(torch._neg_view, with_gradients=False)
    for found, expected in zip((*turned, *without_gradients), (*plain, plain[0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["dynamic layer", "training layer"])
def test_forward_mode_differentiation_is_refused(device, call):
    x, bias = torch.randn(4, 6, device=device), torch.randn(6, device=device)
    for place in (0, 1):
        operands = [x, bias]
        with forward_ad.dual_level():
            operands[place] = forward_ad.make_dual(operands[place], torch.ones_like(operands[place]))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                CALLS[call](*operands)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: CALLS[call](x, bias), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert CALLS[call](x, bias).shape == (4, 6)


def test_gradients_of_negated_numbers_behind_others_keep_their_sign(device):
    grads = [torch.ones(3, device=device), torch._neg_view(torch.tensor([1.0, 2.0, -torch.inf], device=device))]
    buffers = [torch.zeros(3, device=device) for _ in grads]
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    found_inf = torch.zeros((), device=device)
    mixft.ops.accumulate_(grads, buffers, found_inf=found_inf, nonfinite=counts, clear=True)
    assert buffers[1].tolist() == [-1.0, -2.0, torch.inf]
    assert counts.tolist() == [0, 1]
    assert not any(map(torch.any, grads))
    grads = [torch.ones(3, device=device), torch._neg_view(torch.full((3,), 3.0, device=device))]
    mixft.ops.unscale_(grads, torch.full((), 0.5, device=device), found_inf)
    assert [grad.tolist() for grad in grads] == [[0.5] * 3, [-1.5] * 3]
    params = [torch.zeros(2, device=device) for _ in range(2)]
    given = [torch.ones(2, device=device), torch._neg_view(torch.ones(2, device=device))]
    steps = [torch.zeros((), device=device) for _ in range(2)]
    mixft.ops.sgd_(params, given, [], [], steps, lr=torch.ones((), device=device))
    assert params[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "gaps"])
@pytest.mark.parametrize("change", ["unscale", "accumulate"])
def test_autograd_hears_of_gradients_changed_in_place(device, change, strided):
    grads = [torch.ones(4, 6, device=device)[:, :3] if strided else torch.ones(4, 3, device=device) for _ in range(2)]
    x = torch.ones(4, 3, device=device, requires_grad=True)
    losses = [(x * grad).sum() for grad in grads]
    one = torch.ones((), device=device)
    if change == "unscale":
        mixft.ops.unscale_(grads, one, torch.zeros_like(one))
    else:
        buffers = list(map(torch.zeros_like, grads))
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        mixft.ops.accumulate_(grads, buffers, found_inf=torch.zeros_like(one), nonfinite=counts, clear=True)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
