"""GPT-2's Conv1D, whose weight is transposed: int8, training, files, and back to the state dict that it had."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import mixft
from mixft.cli import main
from mixft.huggingface.quantizer import mark_quantized
from mixft.nn import QuantLinear

TOKENS = torch.arange(14).view(2, 7)

pytestmark = pytest.mark.usefixtures("without_interpreter", "one_thread")


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=128, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@torch.no_grad()
def relative_error(model, expected):
    return ((model(TOKENS).logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_int8_and_back_to_the_state_dict_it_had(mode):
    model = gpt2()
    before, expected = shapes(model), model(TOKENS).logits.detach()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    report = mixft.quantize_(model, mode)
    assert len(report.quantized) == 8
    assert {layer.name.rsplit(".", 1)[-1] for layer in report.quantized} == {"c_attn", "c_proj", "c_fc"}
    assert all(0.001 < layer.error < 0.02 for layer in report.quantized)
    assert [layer.reason for layer in report.left] == ["its weight is shared with another module"]
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight.shape == (512, 128)
    assert "transposed=True" in repr(layer)
    assert 0 < relative_error(model, expected) < 0.05
    assert len(mixft.dequantize_(model)) == 8
    assert shapes(model) == before
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    restored = model.transformer.h[0].mlp.c_fc.weight
    assert ((restored - weight).abs() <= weight.abs().amax(0) / 254 * 1.001).all()
    model.load_state_dict(gpt2().state_dict())
    assert relative_error(model, expected) < 1e-6


def test_training_keeps_the_parameters_and_their_shapes():
    model = gpt2()
    parameters = dict(model.named_parameters())
    twin = copy.deepcopy(model)
    mixft.quantize_(model, "train", shape_gating=False)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for network in (model, twin):
        for _ in range(3):
            network(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in twin.named_parameters():
        found = dict(model.named_parameters())[name].grad
        assert (found - parameter.grad).norm() <= 0.1 * parameter.grad.norm()
    layer = model.transformer.h[1].attn.c_attn
    assert layer.int8_training.weight_cache.entry is not None
    assert mixft.quantize_(model, "dynamic").quantized
    mixft.dequantize_(model)
    assert shapes(model) == shapes(twin)


def test_training_layers_come_back_as_they_went():
    model = gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight
    mixft.quantize_(model, "train")
    mixft.dequantize_(model)
    assert model.transformer.h[0].attn.c_attn.weight is weight
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D


def test_files_of_both_kinds(tmp_path):
    model = gpt2()
    mixft.quantize_(model)
    expected = model(TOKENS).logits.detach()
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    loaded = mixft.load_quantized(gpt2(), tmp_path / "model.safetensors")
    assert relative_error(loaded, expected) == 0
    mixft.dequantize_(loaded)
    assert shapes(loaded) == shapes(gpt2())
    mark_quantized(model).save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert isinstance(again.transformer.h[0].mlp.c_fc, QuantLinear)
    assert relative_error(again, expected) == 0


@pytest.fixture
def folder(tmp_path):
    """A model folder of two shards or more, as `save_pretrained` leaves it."""
    gpt2().save_pretrained(tmp_path / "gpt2", max_shard_size="400KB")
    assert (tmp_path / "gpt2" / "model.safetensors.index.json").exists()
    return tmp_path / "gpt2"


def quantize_folder(source, out, *options):
    assert main(["quantize", str(source), str(out), *options]) == 0
    found = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_folder_is_quantized_to_what_quantize_makes_of_the_model(folder, tmp_path, capsys, mode):
    found = quantize_folder(folder, tmp_path / "int8", "--mode", mode, "--max-shard-size", "100KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    report = mixft.quantize_(model, mode)
    state = model.state_dict()
    assert state.keys() - found.keys() == {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    printed = capsys.readouterr().out
    assert all(line in printed for line in str(report).splitlines()[1:9])  # each int8 layer's bytes and error
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert loaded.transformer.h[0].attn.c_attn.transposed
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert relative_error(loaded, model(TOKENS).logits.detach()) == 0
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert relative_error(again, loaded(TOKENS).logits.detach()) == 0
    assert shapes(again.dequantize()) == shapes(gpt2())


def test_a_folder_by_globs_and_without_the_names_of_the_head(folder, tmp_path):
    """The files of the first GPT-2 name the tensors of the base model, and also hold its causal masks."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    found = quantize_folder(folder, tmp_path / "int8", "--include", "*.mlp.*", "--exclude", "*.1.*")
    int8 = {name for name, tensor in found.items() if tensor.dtype == torch.int8}
    assert int8 == {"h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"}
    assert found["h.0.mlp.c_fc.weight"].shape == (512, 128)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    model = gpt2()
    mixft.quantize_(model, include="*.mlp.*", exclude="*.1.*")
    assert relative_error(loaded, model(TOKENS).logits.detach()) == 0


def test_a_folder_whose_weight_is_not_transposed_is_refused(folder, tmp_path, capsys):
    for file in folder.glob("*.safetensors"):
        stored = load_file(file)
        turned = {name: t.t().contiguous() if name.endswith("h.0.mlp.c_fc.weight") else t for name, t in stored.items()}
        save_file(turned, file, {"format": "pt"})
    assert main(["quantize", str(folder), str(tmp_path / "int8")]) == 2
    assert "h.0.mlp.c_fc.weight' has shape (512, 128)" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()


def test_a_weight_with_nan_is_refused_by_name():
    model = gpt2()
    model.transformer.h[1].mlp.c_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'transformer\.h\.1\.mlp\.c_proj' holds NaN or Inf"):
        mixft.quantize_(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D


def test_a_frozen_weight_comes_back_frozen():
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mixft.quantize_(model)
    mixft.dequantize_(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
