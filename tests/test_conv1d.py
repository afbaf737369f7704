"""GPT-2's Conv1D, whose weight is transposed: int8, training, files, and back to the state dict that it had."""

import copy

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import mixft
from mixft.huggingface.quantizer import mark_quantized
from mixft.nn import QuantLinear
from mixft.nn.quantization import choose_layers

TOKENS = torch.arange(14).view(2, 7)


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


def test_who_cannot_transpose_leaves_the_layers_with_a_reason():
    reasons = choose_layers(gpt2())
    assert "a Conv1D" in reasons["transformer.h.0.attn.c_attn"]
    assert "a Conv1D" not in choose_layers(gpt2(), conv1d=True)["transformer.h.0.attn.c_attn"]


def test_a_weight_with_nan_is_refused_by_name():
    model = gpt2()
    model.transformer.h[1].mlp.c_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'transformer\.h\.1\.mlp\.c_proj' holds NaN or Inf"):
        mixft.quantize_(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
