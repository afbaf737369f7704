"""Quantized copies that serve again: never a stale one."""

import gc
import weakref

import numpy as np
import pytest
import torch

import mixft
from mixft.nn import QuantLinear
from mixft.nn.int8_cache import shared_input
from mixft.ops.int8_operands import quantized_rows


@pytest.fixture
def quantizations(monkeypatch) -> list[torch.Size]:
    """The shape of each tensor that a layer quantizes outside of the products."""
    shapes = []
    original = mixft.nn.int8_cache.quantized_rows

    def counted(x):
        shapes.append(x.shape)
        return original(x)

    monkeypatch.setattr("mixft.nn.int8_cache.quantized_rows", counted)
    return shapes


def layer_of(device, inner=64, columns=48, **options):
    return QuantLinear(inner, columns, mode="train", shape_gating=False, min_sqnr=None, device=device, **options)


class DataSGD(torch.optim.Optimizer):
    """An optimizer that hides its writes from version counters."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                # Single elements, as far from what a sample sees as can be.
                param.data.view(-1)[1::64] -= 1.0


def test_a_weight_is_quantized_once_while_gradients_accumulate(native_device, quantizations):
    layer = layer_of(native_device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    counts = []
    for _ in range(3):
        for _ in range(4):
            quantizations.clear()
            x = torch.randn(5, 64, device=native_device)
            out = layer(x)
            assert torch.equal(out, mixft.ops.training_int8_linear(x, layer.weight, layer.bias))
            out.sum().backward()
            counts.append(quantizations.count(layer.weight.shape))
        optimizer.step()
        optimizer.zero_grad()
    # The first batch finds out that there are parts.
    assert counts == [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]


CHANGES = {
    "in place": lambda layer: layer.weight.detach().view(-1)[1].add_(3.0),
    "set": lambda layer: setattr(layer.weight, "data", layer.weight.detach() + 1),
    "torch": lambda layer: torch.optim.SGD(layer.parameters(), lr=0.5).step(),
    "mixft": lambda layer: mixft.optim.AdamW(layer.parameters(), lr=0.5).step(),
    "an optimizer through .data": lambda layer: DataSGD(layer.parameters()).step(),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_seen_while_gradients_accumulate(native_device, change):
    layer = layer_of(native_device)
    x = torch.randn(5, 64, device=native_device)
    for _ in range(3):
        before = layer(x)
        before.sum().backward()
    CHANGES[change](layer)
    after = layer(x)
    assert torch.equal(after, mixft.ops.training_int8_linear(x, layer.weight, layer.bias))
    assert not torch.equal(after, before)


def test_on_a_cpu_a_write_through_data_is_seen_too():
    layer = layer_of("cpu")
    x = torch.randn(5, 64)
    for _ in range(3):
        before = layer(x)
        before.sum().backward()
    layer.weight.data.neg_()
    layer.bias.data.neg_()
    assert torch.equal(layer(x), -before)


@pytest.mark.parametrize("inner", [64, 96, 512])
def test_on_a_cpu_a_write_through_data_to_half_of_the_columns_is_seen(inner):
    layer = layer_of("cpu", inner)
    x = torch.randn(5, inner)
    for _ in range(3):
        layer(x).sum().backward()
    layer.weight.data[:, 1::2] = 0
    assert torch.equal(layer(x), mixft.ops.training_int8_linear(x, layer.weight, layer.bias))


def test_on_a_cpu_an_input_that_numpy_writes_to_is_quantized_again():
    first, second = layer_of("cpu"), layer_of("cpu")
    memory = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    x = torch.from_numpy(memory)
    first(x)
    memory *= -2
    assert torch.equal(second(x), mixft.ops.training_int8_linear(x, second.weight, second.bias))


def test_without_accumulation_no_copy_is_kept(native_device):
    layer = layer_of(native_device)
    for _ in range(2):
        layer(torch.randn(5, 64, device=native_device)).sum().backward()
        layer.zero_grad()
    assert layer.int8_training.weight_cache.entry is None


def test_layers_that_read_one_tensor_quantize_it_once(native_device, quantizations):
    query, key, value = (layer_of(native_device) for _ in range(3))
    x = torch.randn(2, 5, 64, device=native_device)
    outputs = [layer(x) for layer in (query, key, value)]
    assert quantizations.count((10, 64)) == 1
    for layer, out in zip((query, key, value), outputs, strict=True):
        assert torch.equal(out, mixft.ops.training_int8_linear(x, layer.weight, layer.bias))


def test_another_forward_or_a_write_or_another_dtype_quantizes_again(native_device, quantizations):
    first, second = layer_of(native_device), layer_of(native_device)
    x = torch.randn(5, 64, device=native_device)
    first(x)
    x.data.neg_()
    assert torch.equal(first(x), mixft.ops.training_int8_linear(x, first.weight, first.bias))
    x.mul_(2)
    assert torch.equal(second(x), mixft.ops.training_int8_linear(x, second.weight, second.bias))
    with torch.autocast(native_device.type, torch.bfloat16):
        found = first(x)
    assert torch.equal(found, mixft.ops.training_int8_linear(x.bfloat16(), first.weight, first.bias))
    assert quantizations.count((5, 64)) == 4


@pytest.mark.parametrize("captured", ["forward", "step"])
def test_after_a_capture_no_copy_of_a_weight_serves_again(monkeypatch, captured):
    """A replay changes the weight and moves neither its version nor the count of steps, and a GPU has no sample."""
    monkeypatch.setattr("mixft.nn.int8_cache._probe", lambda tensor: None)
    layer, x = layer_of("cpu"), torch.randn(5, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).sum().backward()
    with monkeypatch.context() as graph:
        graph.setattr("mixft.nn.int8_cache._captured_steps", counted := [0])
        if captured == "forward":
            graph.setattr("mixft.nn.int8_cache.capturing", lambda device: True)
            layer(x).sum().backward()
            graph.setattr("mixft.nn.int8_cache.capturing", lambda device: False)
        else:
            graph.setattr(torch.cuda, "is_initialized", lambda: True)
            graph.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            optimizer.step()
            graph.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            assert counted == [1]
        for _ in range(3):
            layer.weight.data.mul_(-2)
            out = layer(x)
            assert torch.equal(out, mixft.ops.training_int8_linear(x, layer.weight, layer.bias))
            out.sum().backward()


def test_a_copy_serves_on_its_own_stream_only(monkeypatch, quantizations):
    streams = iter([1, 1, 2, 2])
    monkeypatch.setattr("mixft.nn.int8_cache.stream_of", lambda device: next(streams))
    query, key, value = (layer_of("cpu") for _ in range(3))
    monkeypatch.setattr(query.int8_training.weight_cache, "quantized", lambda weight, matrix: quantized_rows(matrix))
    for layer in (key, value):
        layer.int8_training.weight_cache = query.int8_training.weight_cache
    x = torch.randn(2, 5, 64)
    for layer in (query, key, value):
        layer(x)
    assert quantizations.count((10, 64)) == 2


def test_an_input_is_let_go_of(native_device):
    layer = layer_of(native_device)
    x = torch.randn(5, 64, device=native_device)
    with torch.no_grad():
        layer(x)
    values = weakref.ref(shared_input.entry.quantized[0])
    assert values() is not None
    del x
    gc.collect()
    assert values() is None
