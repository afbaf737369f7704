"""load_state_dict on QuantLinear: weights of its own kind, and those of the other kind named and refused untouched."""

import pytest
import torch
from torch import nn

import mixft
from mixft.nn import QuantLinear


def model(mode=None):
    made = nn.Sequential(nn.Linear(128, 160), nn.GELU(), nn.Linear(160, 128))
    if mode is not None:
        mixft.quantize_(made, mode)
    return made


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("given", "mode", "dtypes", "hint"),
    [
        (
            None,
            "dynamic",
            "torch.float32 in state_dict, and torch.int8 in mode 'dynamic'",
            "load it before mixft.quant",
        ),
        ("train", "weight_only", "torch.float32 in state_dict, and torch.int8 in mode 'weight_only'", "or after mixft"),
        (
            "dynamic",
            "train",
            "torch.int8 in state_dict, and torch.float32 in mode 'train'",
            r"call mixft.quantize_\(model, mode\) first",
        ),
    ],
)
def test_a_weight_of_the_other_kind_is_named_and_changes_nothing(given, mode, dtypes, hint, strict, assign):
    target = model(mode)
    before, parameters = bits(target), list(target.parameters())
    with pytest.raises(RuntimeError, match=f"the weight of layer '0' is {dtypes}; .*{hint}") as raised:
        target.load_state_dict(model(given).state_dict(), strict=strict, assign=assign)
    assert "the weight of layer '2' is" in str(raised.value)
    assert same(bits(target), before)
    assert all(new is old for new, old in zip(target.parameters(), parameters, strict=True))


def test_a_layer_by_itself_is_refused_too():
    layer = QuantLinear.from_linear(nn.Linear(64, 64), "dynamic")
    before = bits(layer)
    with pytest.raises(RuntimeError, match=r"the weight of this layer is torch\.bfloat16"):
        layer.load_state_dict(nn.Linear(64, 64).bfloat16().state_dict(), strict=False)
    assert same(bits(layer), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", ["dynamic", "train"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
def test_integers_that_a_cast_would_wrap_are_refused(dtype, mode, assign):
    target = QuantLinear(64, 64, mode=mode)
    before = bits(target)
    given = before | {"weight": torch.full((64, 64), 200).to(dtype)}
    with pytest.raises(RuntimeError, match=f"this layer is {dtype} in state_dict.*writes int8 weights as torch.int8"):
        target.load_state_dict(given, assign=assign)
    assert same(bits(target), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("given", "mode"), [("dynamic", "weight_only"), ("train", "train"), (None, "train")])
def test_a_weight_of_the_same_kind_is_loaded(given, mode, assign):
    source, target = model(given), model(mode)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert same(bits(target), bits(source))


def test_a_state_dict_without_weights_is_loaded():
    target = model("dynamic")
    before, bias = bits(target), torch.randn(160)
    assert "0.weight" in target.load_state_dict({"0.bias": bias}, strict=False).missing_keys
    assert same(bits(target), before | {"0.bias": bias})
