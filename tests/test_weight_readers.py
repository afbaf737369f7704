"""Layers whose weight the code around them reads are left alone: what is found in the source, and in real models."""

import pytest
import torch
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import mixft
from mixft.nn.weight_readers import layers_read_by, reader_of


class Inherited(nn.Module):
    def helper(self, x):
        return x @ self.third.weight.t()

    def unused(self):
        return self.fourth.weight


class Reader(Inherited):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth, self.fifth = (nn.Linear(128, 128) for _ in range(5))
        self.inner = nn.ModuleDict({"deep": nn.Linear(128, 128)})
        self.first.weight.data.mul_(2)

    def forward(self, x):
        if isinstance(self.fifth.weight, torch.Tensor):
            x = x.to(self.fifth.weight.device)
        x = self.helper(self.fifth(x)) * self.second.weight[0]
        x = x + self.inner.deep.weight.sum()
        self.fourth.weight = self.fourth.weight if False else self.fourth._parameters["weight"]
        return self.first(x)


class Extended(Reader):
    def forward(self, x):
        return super().forward(x) + 1


class Block(nn.TransformerEncoderLayer):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)


class Caster(nn.Module):
    def __init__(self):
        super().__init__()
        self.guarded, self.cast, self.asked = (nn.Linear(128, 128) for _ in range(3))

    def forward(self, x):
        if (dtype := self.asked.weight.dtype).is_floating_point:
            x = x.to(dtype)
        return self.helper(self.asked(x)) + self.project(x)

    def helper(self, x):
        if self.guarded.weight.dtype != torch.int8:
            x = x.to(self.guarded.weight.dtype)
        return self.guarded(x)

    def project(self, x):
        return self.cast(x.to(dtype=self.cast.weight.dtype))


class Replaced(Extended):
    def forward(self, x):
        return self.helper(x)


def test_what_a_forward_and_the_methods_that_it_calls_read_is_found():
    assert layers_read_by(Reader) == {"second", "third", "inner.deep", "fourth"}
    assert layers_read_by(Inherited) == set()
    assert layers_read_by(Extended) == layers_read_by(Reader)
    assert layers_read_by(Replaced) == {"third"}
    assert layers_read_by(nn.TransformerEncoderLayer) == layers_read_by(Block) == set()


def test_a_dtype_that_an_input_may_be_cast_to_is_read_unless_the_method_asks_for_integers():
    assert layers_read_by(Caster) == {"cast"}
    model = Caster().eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        exact = model(x)
        assert [layer.name for layer in mixft.quantize_(model, "dynamic").quantized] == ["guarded", "asked"]
        assert (model(x) - exact).norm() < 0.02 * exact.norm()


def test_the_module_that_reads_may_be_further_out():
    model = nn.Sequential(Reader())
    assert reader_of("0.inner.deep", model) == "Reader"
    assert reader_of("0.first", model) == ""
    assert reader_of("0", nn.Sequential(nn.Linear(2, 2))) == ""


def test_a_class_without_source_reads_nothing():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.dense.weight", namespace)
    assert layers_read_by(namespace["Made"]) == set()


@pytest.mark.parametrize("include", [None, "*"])
def test_such_layers_keep_their_weight_but_in_training(include):
    model = Reader()
    report = mixft.quantize_(model, "dynamic", include=include)
    assert [layer.name for layer in report.quantized] == ["first", "fifth"]
    assert {layer.reason for layer in report.left} == {"Reader reads its weight"}
    assert len(mixft.quantize_(Reader(), "train", include=include).quantized) == 6


@pytest.mark.parametrize(
    ("model", "config", "reader"),
    [
        (MobileBertForMaskedLM, MobileBertConfig(vocab_size=128, num_hidden_layers=1), "MobileBertLMPredictionHead"),
        (MambaForCausalLM, MambaConfig(vocab_size=100, hidden_size=256, num_hidden_layers=1), "MambaMixer"),
    ],
)
def test_models_of_transformers_that_read_weights_stay_right(model, config, reader):
    torch.manual_seed(0)
    model = model(config).eval()
    tokens = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        report = mixft.quantize_(model, "dynamic")
        found = model(input_ids=tokens).logits
    assert f"{reader} reads its weight" in {layer.reason for layer in report.left}
    assert report.quantized
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_a_model_that_casts_pixels_to_its_projection_sees_them():
    """SigLIP 2 casts its input to the dtype of a linear layer's weight: to int8, pixels are zeros."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16, patch_size=8)).eval()
    inputs = {
        "pixel_values": torch.rand(2, 16, 3 * 8 * 8) * 2 - 1,
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
    }
    with torch.no_grad():
        exact = model(**inputs).last_hidden_state
        report = mixft.quantize_(model, "dynamic")
        found = model(**inputs).last_hidden_state
    assert "Siglip2VisionEmbeddings reads its weight" in {layer.reason for layer in report.left}
    assert report.quantized
    assert (found - exact).norm() < 0.1 * exact.norm()
