"""save_quantized and load_quantized: exact round trips, and files that do not fit leave the model as it was."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mixft
from mixft.nn import QuantLinear


class Model(nn.Module):
    def __init__(self, hidden=160):
        super().__init__()
        self.embedding = nn.Embedding(150, 128)
        self.up = nn.Linear(128, hidden)
        self.down = nn.Linear(hidden, 128, bias=False)
        self.norm = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 150)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.down(torch.relu(self.up(self.embedding(tokens))))))


def state_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_round_trip_is_exact(tmp_path, mode):
    model = Model().eval()
    tokens = torch.randint(0, 150, (9,))
    mixft.quantize_(model, mode)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    torch.manual_seed(1)
    loaded = mixft.load_quantized(Model().eval(), path)
    assert isinstance(loaded.up, QuantLinear)
    assert loaded.up.mode == mode
    assert not loaded.training
    assert not loaded.up.training
    assert loaded.head.weight is loaded.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_a_tied_tensor_is_stored_once(tmp_path):
    model = Model()
    mixft.quantize_(model)
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert ("embedding.weight" in stored) != ("head.weight" in stored)


def test_loading_into_an_already_quantized_model(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    other = Model()
    mixft.quantize_(other)
    mixft.load_quantized(other, path)
    assert torch.equal(other.up.weight, model.up.weight)


def rewritten(path, change):
    """Rewrite the file with its tensors and metadata changed by ``change``."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def replace(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def describe(name, **fields):
    def change(tensors, metadata):
        layers = json.loads(metadata["layers"])
        layers.setdefault(name, dict(layers["up"])).update(fields)
        metadata["layers"] = json.dumps(layers)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("down.weight_scale"), "has no tensor 'down.weight_scale'"),
        (replace("up.weight", torch.zeros(3, 128, dtype=torch.int8)), r"'up.weight' has shape \(3, 128\)"),
        (replace("up.weight", torch.zeros(160, 128)), "'up.weight' is torch.float32"),
        (replace("stranger", torch.zeros(1)), "has a tensor 'stranger', which the model lacks"),
        (describe("up", in_features=64), r"layer 'up' is \(in, out, bias\) = \(64, 160, True\)"),
        (describe("middle"), "'middle', where the model has no such module"),
        (describe("norm"), "'norm', where the model has a BatchNorm1d"),
        (lambda tensors, metadata: metadata.update(format="other"), "its format is 'other'"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    rewritten(path, change)
    target = Model()
    before, modules = state_bits(target), list(target.modules())
    with pytest.raises(ValueError, match=message):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_truncated_a_foreign_and_a_missing_file(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            mixft.load_quantized(Model(), path)
    path.write_text("not a model")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        mixft.load_quantized(Model(), path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mixft.load_quantized(Model(), tmp_path / "nowhere")


def test_saving_is_refused_by_name_and_an_old_file_survives_a_failure(tmp_path, monkeypatch):
    model = Model()
    with pytest.raises(ValueError, match="no QuantLinear layers"):
        mixft.save_quantized(model, tmp_path / "model.safetensors")
    mixft.quantize_(model)
    with pytest.raises(ValueError, match="path must be a file"):
        mixft.save_quantized(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_text("precious")

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("mixft.nn.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        mixft.save_quantized(model, path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: metadata.pop("layers"),
        lambda tensors, metadata: metadata.pop("aliases"),
        lambda tensors, metadata: metadata.update(layers="{"),
        lambda tensors, metadata: metadata.update(layers='{"up": {}}'),
        lambda tensors, metadata: metadata.update(aliases='{"head.weight": "nowhere"}'),
    ],
)
def test_a_damaged_description_is_named_and_changes_nothing(tmp_path, change):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    rewritten(path, change)
    target = Model()
    modules = list(target.modules())
    with pytest.raises(ValueError, match="damaged description of its layers"):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules


def test_meta_models_and_bare_layers_are_refused_and_frozen_biases_stay_frozen(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="model is itself a QuantLinear"):
        mixft.save_quantized(QuantLinear(4, 4), path)
    model = Model()
    mixft.quantize_(model)
    mixft.save_quantized(model, path)
    with pytest.raises(ValueError, match="on the meta device"):
        mixft.load_quantized(Model().to("meta"), path)
    frozen = Model().requires_grad_(False)
    mixft.load_quantized(frozen, path)
    assert not frozen.up.bias.requires_grad


def test_the_file_has_the_usual_permissions(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    mixft.save_quantized(model, path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
