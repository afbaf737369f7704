"""save_quantized and load_quantized of what a model has beside plain weights: extra state, ties and frozen layers."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mixft


class Stateful(nn.Module):
    """A layer, and extra state under a name of its own."""

    def __init__(self, value):
        super().__init__()
        self.layer = nn.Linear(128, 128)
        self.counter = Counter(value)


class Counter(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def quantized(model):
    mixft.quantize_(model, include="layer")
    return model


@pytest.mark.parametrize("value", [{"steps": 3}, None, 3])
def test_extra_state_that_is_no_tensor_is_named_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "model.safetensors"
    message = (
        rf"extra state 'counter\._extra_state', a {type(value).__name__}, .* a get_extra_state that returns a tensor"
    )
    with pytest.raises(ValueError, match=message):
        mixft.save_quantized(quantized(Stateful(value)), path)
    assert not list(tmp_path.iterdir())


def test_a_sparse_buffer_is_named_and_nothing_is_written(tmp_path):
    model = quantized(Stateful(torch.zeros(1)))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"model has 'graph', a torch\.sparse_coo tensor, .* holds dense ones only"):
        mixft.save_quantized(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_come_back(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    counts = torch.tensor([0, 1, torch.iinfo(dtype).max], dtype=dtype)
    mixft.save_quantized(quantized(Stateful(counts)), path)
    loaded = mixft.load_quantized(Stateful(torch.zeros(3, dtype=dtype)), path).counter.value
    assert loaded.dtype == dtype
    assert loaded.tolist() == counts.tolist()


@pytest.mark.parametrize("before", [torch.zeros(5, dtype=torch.uint8), torch.zeros(1), {"steps": 0}, None])
def test_extra_state_that_is_a_tensor_comes_back_in_its_own_shape_and_dtype(tmp_path, before):
    path = tmp_path / "model.safetensors"
    state = torch.arange(5, dtype=torch.uint8)
    mixft.save_quantized(quantized(Stateful(state)), path)
    loaded = mixft.load_quantized(Stateful(before), path)
    assert loaded.counter.value.dtype == state.dtype
    assert torch.equal(loaded.counter.value, state)


class Tied(nn.Module):
    """An embedding that a head may share, and a layer to quantize that may stand in two places."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(150, 128)
        self.layer = nn.Linear(128, 128)
        self.head = nn.Linear(128, 150, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_two_tensors_for_one_of_the_model_are_named_and_change_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(quantized(Tied(tied=False)), path)
    target = Tied(tied=True)
    before, modules = {name: tensor.clone() for name, tensor in target.state_dict().items()}, list(target.modules())
    with pytest.raises(
        ValueError, match=r"two different tensors 'embedding\.weight' and 'head\.weight', which are one"
    ):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_equal_tensors_for_one_of_the_model_are_taken(tmp_path, dtype):
    """Equal as the model holds them: the head is in 16 bits, as the target may be."""
    path = tmp_path / "model.safetensors"
    source = Tied(tied=False)
    source.head.weight = nn.Parameter(source.embedding.weight.detach().half())
    source.embedding.weight = nn.Parameter(source.head.weight.detach().float())
    mixft.save_quantized(quantized(source), path)
    assert {"embedding.weight", "head.weight"} <= load_file(path).keys()
    loaded = mixft.load_quantized(Tied(tied=True).to(dtype), path)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, source.head.weight.to(dtype))


def test_a_tied_model_loads_into_an_untied_one_and_one_layer_into_two_places(tmp_path):
    path = tmp_path / "model.safetensors"
    source = Tied(tied=True)
    source.again = source.layer
    mixft.save_quantized(quantized(source), path)
    target = Tied(tied=False)
    target.again = target.layer
    mixft.load_quantized(target, path)
    assert target.again is target.layer
    assert torch.equal(target.layer.weight, source.layer.weight)
    assert target.head.weight is not target.embedding.weight
    assert torch.equal(target.head.weight, source.embedding.weight)


@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.parametrize("mode", ["dynamic", "train"])
def test_frozen_layers_stay_frozen_and_others_train(tmp_path, mode, quantized_before):
    path = tmp_path / "model.safetensors"
    source = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    mixft.quantize_(source, mode)
    mixft.save_quantized(source, path)
    target = nn.Sequential(nn.Linear(128, 128).requires_grad_(False), nn.Linear(128, 128))
    if quantized_before:
        mixft.quantize_(target, mode)
    mixft.load_quantized(target, path)
    mixft.dequantize_(target)
    assert [parameter.requires_grad for parameter in target.parameters()] == [False, False, True, True]
