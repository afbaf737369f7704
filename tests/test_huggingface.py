"""Int8Config in from_pretrained and save_pretrained: what is quantized, exact round trips, files that do not fit."""

import importlib
import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from huggingface_models import MODELS, bert, llama, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.utils import logging as transformers_logging

import mixft
import mixft.huggingface.lora
from mixft.huggingface import mark_quantized
from mixft.nn import QuantLinear

AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(autouse=True)
def quiet(without_interpreter):
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@pytest.fixture
def saved(tmp_path):
    """The folder of a floating-point model by name."""

    def save(name, **options):
        folder = tmp_path / name
        MODELS[name](**options).save_pretrained(folder)
        return folder

    return save


def int8_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_loading_with_a_configuration_is_loading_and_then_quantizing(saved, native_device, name, mode):
    folder = saved(name)
    model = AUTO[name].from_pretrained(folder, quantization_config=mixft.Int8Config(mode)).to(native_device)
    reference = AUTO[name].from_pretrained(folder)
    mixft.quantize_(reference, mode)
    assert int8_layers(model).keys() == int8_layers(reference).keys()
    assert len(int8_layers(model)) == {"bert": 13, "llama": 14, "gpt2": 8}[name]
    assert all(layer.mode == mode for layer in int8_layers(model).values())
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(reference.to(native_device)))


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "train"])
def test_a_tied_head_of_another_name_stays_tied(tmp_path, mode):
    """RoBERTa's is ``lm_head.decoder``, and its weight is tied only after the layers were chosen."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForMaskedLM(RobertaConfig(vocab_size=150, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path)
    model = RobertaForMaskedLM.from_pretrained(tmp_path, quantization_config=mixft.Int8Config(mode))
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    reference = RobertaForMaskedLM.from_pretrained(tmp_path)
    report = mixft.quantize_(reference, mode)
    assert list(int8_layers(model)) == [layer.name for layer in report.quantized]
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_plainly_to_the_same_bits(saved, tmp_path, name, mode):
    model = AUTO[name].from_pretrained(saved(name), quantization_config=mixft.Int8Config(mode))
    model.save_pretrained(tmp_path / "int8", max_shard_size="150KB")
    assert len(list((tmp_path / "int8").glob("model-*.safetensors"))) > 1
    loaded = AUTO[name].from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.mode == mode
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_weights_that_the_checkpoint_had_joined_are_saved_apart_with_their_scales(tmp_path, mode):
    parts = [f"attention.self.{part}.weight" for part in ("query", "key", "value")]
    joined = [WeightConverter("attention.self.qkv.weight", parts, [Chunk(dim=0)])]
    model = bert()
    model._weight_conversions = joined
    model.save_pretrained(tmp_path / "floats")
    name = "bert.encoder.layer.0.attention.self.qkv.weight"
    assert load_file(tmp_path / "floats" / "model.safetensors")[name].shape == (384, 128)
    mixft.quantize_(model, mode)
    mark_quantized(model).save_pretrained(tmp_path / "int8")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))


def test_files_hold_one_byte_a_weight_and_no_floating_point_copy(saved, tmp_path):
    model = AutoModel.from_pretrained(saved("bert"), quantization_config=mixft.Int8Config(exclude="pooler*"))
    model.save_pretrained(tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    stored = {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    assert stored == {f"{name}.weight" for name in int8_layers(model)}
    assert all(tensors[name].dtype == torch.int8 for name in stored)
    assert all(tensors[f"{name}_scale"].shape == (len(tensors[name]), 1) for name in stored)
    description = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert description["quant_method"] == "mixft"
    assert "pooler.dense" not in description["layers"]
    assert "encoder.layer.1.output.dense" in description["layers"]


def test_a_head_is_added_to_and_taken_from_a_saved_model(saved, tmp_path):
    base = AutoModel.from_pretrained(saved("bert"), quantization_config=mixft.Int8Config())
    base.save_pretrained(tmp_path / "base")
    with_head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert type(with_head.classifier) is nn.Linear
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(with_head.bert(tokens).pooler_output, base(tokens).pooler_output)
    with_head.save_pretrained(tmp_path / "head")
    again = AutoModel.from_pretrained(tmp_path / "head")
    assert int8_layers(again).keys() == int8_layers(base).keys()
    assert torch.equal(again(tokens).pooler_output, base(tokens).pooler_output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_asked_for_is_that_of_all_but_weights_and_scales(saved, tmp_path, dtype):
    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=mixft.Int8Config(), dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.float_dtype) == (torch.int8, torch.float32, dtype)
    assert model.model.norm.weight.dtype == dtype
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert loaded.model.layers[0].mlp.up_proj.float_dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_a_layer_that_the_checkpoint_lacks_is_new_and_stays_in_floats(saved, tmp_path):
    folder = saved("bert", initializer_range=0.5)
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = AutoModel.from_pretrained(folder, quantization_config=mixft.Int8Config(), dtype=torch.bfloat16)
    assert type(model.pooler.dense) is nn.Linear
    assert model.pooler.dense.weight.dtype == torch.bfloat16
    assert 0.4 < model.pooler.dense.weight.std() < 0.6
    assert not model.pooler.dense.bias.any()
    model.save_pretrained(tmp_path / "int8")
    loaded = AutoModel.from_pretrained(tmp_path / "int8")
    assert torch.equal(loaded.pooler.dense.weight, model.pooler.dense.weight)
    assert len(int8_layers(loaded)) == 12


def test_layers_may_lie_on_disk(saved, tmp_path):
    model = AUTO["llama"].from_pretrained(saved("llama"), quantization_config=mixft.Int8Config())
    model.save_pretrained(tmp_path / "int8")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AUTO["llama"].from_pretrained(
        tmp_path / "int8", device_map=device_map, offload_folder=tmp_path / "disk", offload_buffers=True
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(loaded), logits(model))


def test_a_configuration_serves_several_models(saved):
    config = mixft.Int8Config(exclude=["*query", "*value"])
    # Not the Auto classes, which copy what they are given.
    first = BertModel.from_pretrained(saved("bert"), quantization_config=config)
    layers = list(first.config.quantization_config.layers)
    BertForSequenceClassification.from_pretrained(saved("bert", layers=1), quantization_config=config)
    assert first.config.quantization_config.layers == layers
    assert config.layers is None
    assert not any("query" in name or "value" in name for name in layers)


def test_dequantize_gives_linear_layers_and_a_folder_that_needs_no_mixft(saved, tmp_path):
    model = AUTO["bert"].from_pretrained(saved("bert"), quantization_config=mixft.Int8Config("weight_only"))
    before = logits(model)
    model.dequantize()
    assert not int8_layers(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(AUTO["bert"].from_pretrained(tmp_path / "plain")), logits(model))


def test_training_options_travel(saved, tmp_path):
    config = mixft.Int8Config("train", backward="16bit", min_sqnr=None)
    model = AutoModel.from_pretrained(saved("bert"), quantization_config=config)
    model.save_pretrained(tmp_path / "train")
    loaded = AutoModel.from_pretrained(tmp_path / "train")
    options = {layer.int8_training.options for layer in int8_layers(loaded).values()}
    assert [(found.backward, found.min_sqnr, found.stochastic) for found in options] == [("16bit", None, False)]
    mixft.dequantize_(loaded)
    mixft.quantize_(loaded, "train", stochastic=True)
    mark_quantized(loaded).save_pretrained(tmp_path / "stochastic")
    again = AutoModel.from_pretrained(tmp_path / "stochastic")
    assert again.pooler.dense.int8_training.options.stochastic
    again.pooler.dense = QuantLinear(128, 128, mode="train")
    with pytest.raises(ValueError, match="several options"):
        mark_quantized(again)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_train_mode_folder_holds_the_floating_point_weights(saved, tmp_path, name):
    model = AUTO[name].from_pretrained(saved(name), quantization_config=mixft.Int8Config("train"))
    model.save_pretrained(tmp_path / "train")
    tensors = load_file(tmp_path / "train" / "model.safetensors")
    original = load_file(tmp_path / name / "model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in original.items())


def test_outlier_columns_travel(saved, tmp_path):
    config = mixft.Int8Config(outlier_threshold=1.5)
    model = AUTO["bert"].from_pretrained(saved("bert"), quantization_config=config)
    mark_quantized(model).save_pretrained(tmp_path / "int8")
    loaded = AUTO["bert"].from_pretrained(tmp_path / "int8")
    assert {layer.outlier_threshold for layer in int8_layers(loaded).values()} == {1.5}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "train", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_of_quantize_saves_as_one_of_from_pretrained(tmp_path, name, mode):
    model = MODELS[name]()
    mixft.quantize_(model, "dynamic" if mode == "static" else mode, exclude=["*v_proj", "*c_proj"][name == "gpt2"])
    if mode == "static":
        mixft.calibrate(model, [torch.arange(20).view(4, 5)])
    mark_quantized(model).save_pretrained(tmp_path / "int8")
    loaded = AUTO[name].from_pretrained(tmp_path / "int8")
    assert int8_layers(loaded).keys() == int8_layers(model).keys()
    assert torch.equal(logits(loaded), logits(model))
    assert logits(model.dequantize()).isfinite().all()
    assert not int8_layers(model)


def calibrated(model):
    mixft.calibrate(model, [{"input_ids": torch.randint(0, 100, (2, 9))}])


CHANGES = {
    "calibrated": calibrated,
    "dequantized": mixft.dequantize_,
    "one layer less": lambda model: setattr(
        model.bert.encoder.layer[0].attention.self, "query", model.get_submodule(QUERY).to_linear()
    ),
    "trained, then dynamic": lambda model: (
        mixft.dequantize_(model),
        mark_quantized(mixft.quantize_(model, "train") and model),
        mixft.quantize_(model, "dynamic"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_has_become_since_it_was_loaded_is_saved(saved, tmp_path, change):
    model = BertForSequenceClassification.from_pretrained(
        saved("bert"), quantization_config=mixft.Int8Config("dynamic")
    )
    CHANGES[change](model)
    model.save_pretrained(tmp_path / "changed")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "changed")
    assert torch.equal(logits(again), logits(model))
    assert {name: layer.mode for name, layer in int8_layers(again).items()} == {
        name: layer.mode for name, layer in int8_layers(model).items()
    }
    again.save_pretrained(tmp_path / "again")
    configuration = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ("quantization_config" in configuration) == (change != "dequantized")


def test_a_model_with_layers_of_two_modes_is_not_saved(saved, tmp_path):
    model = BertForSequenceClassification.from_pretrained(
        saved("bert"), quantization_config=mixft.Int8Config("dynamic")
    )
    model.get_submodule(QUERY).to_static(0.1, 0)
    with pytest.raises(ValueError, match=r"layers of the modes dynamic, static; config\.json holds one mode"):
        model.save_pretrained(tmp_path / "mixed")


def test_what_cannot_be_marked_is_refused():
    with pytest.raises(TypeError, match=r"must be a transformers\.PreTrainedModel; it is a Linear"):
        mark_quantized(nn.Linear(4, 4))
    model = llama()
    with pytest.raises(ValueError, match="no QuantLinear layers"):
        mark_quantized(model)
    mixft.quantize_(model, "dynamic", include="*mlp*")
    mixft.quantize_(model, "weight_only", include="*self_attn*")
    with pytest.raises(ValueError, match="modes dynamic, weight_only; config"):
        mark_quantized(model)


NORM = "bert.encoder.layer.0.output.LayerNorm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.weight_scale"), f"'{QUERY}.weight' of the checkpoint is I8 .* its scale missing"),
        (lambda t: t.pop(f"{QUERY}.weight"), f"no tensor '{QUERY}.weight' to its scale"),
        (lambda t: [t.pop(f"{QUERY}.weight{end}") for end in ("", "_scale")], f"no int8 weight and scale of '{QUERY}'"),
        (lambda t: t.update({f"{QUERY}.weight": torch.zeros(128, 128)}), f"'{QUERY}.weight' of the checkpoint is F32"),
        (lambda t: t.update({f"{QUERY}.weight": torch.zeros(64, 128, dtype=torch.int8)}), r"is I8 \[64, 128\]"),
        (lambda t: t.update({f"{QUERY}.weight_scale": torch.ones(128)}), r"its scale \('F32', \[128\]\)"),
        (lambda t: t.update({f"{QUERY}.weight_scale": torch.ones(128, 1).half()}), "its scale .'F16'"),
        (lambda t: t.update({f"{NORM}.weight": torch.ones(128, dtype=torch.int8)}), f"'{NORM}.weight'.* is I8"),
        (
            lambda t: t.update(
                {"classifier.weight": torch.ones(2, 128).char(), "classifier.weight_scale": torch.ones(2, 1)}
            ),
            "'classifier.weight' is int8 in the checkpoint; quantization_config in config.json has no such layer",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, change, message):
    folder = tmp_path / "int8"
    AUTO["bert"].from_pretrained(saved("bert"), quantization_config=mixft.Int8Config()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AUTO["bert"].from_pretrained(folder)


@pytest.mark.parametrize(
    "weight", [torch.full((128, 128), float("nan")), torch.zeros(64, 128)], ids=["nan", "another shape"]
)
def test_weights_that_cannot_be_quantized_are_refused_by_name(saved, caplog, weight):
    folder = saved("bert")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{QUERY}.weight"] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AUTO["bert"].from_pretrained(folder, quantization_config=mixft.Int8Config())
    transformers_logging.disable_propagation()
    assert f"{QUERY}.weight" in caplog.text
    assert "NaN" in caplog.text or "has shape (64, 128)" in caplog.text


def test_arguments_are_refused_by_name(saved):
    with pytest.raises(ValueError, match="mode must be one of"):
        mixft.Int8Config("int4")
    with pytest.raises(TypeError, match="exclude must be a glob or several; it is 3"):
        mixft.Int8Config(exclude=3)
    with pytest.raises(ValueError, match="stochastic is for mode 'train'"):
        mixft.Int8Config("dynamic", stochastic=True)
    with pytest.raises(ValueError, match="backward must be one of int8, 16bit, exact"):
        mixft.Int8Config("dynamic", backward="weight_grad_16bit")
    with pytest.raises(ValueError, match="calibrate"):
        mixft.Int8Config("static")
    with pytest.raises(ValueError, match="needs mode 'dynamic'"):
        mixft.Int8Config("weight_only", outlier_threshold=6.0)
    with pytest.raises(TypeError, match="forward"):
        mixft.Int8Config("train", forward="16bit")
    with pytest.raises(ValueError, match=r"\['bits'\], which this version of mixft does not know"):
        mixft.Int8Config.from_dict({"quant_method": "mixft", "mode": "dynamic", "bits": 4})
    folder = saved("bert")
    with pytest.raises(ValueError, match="'layer99' matches none"):
        AutoModel.from_pretrained(folder, quantization_config=mixft.Int8Config(include="layer99"))
    with pytest.raises(ValueError, match="no layer to quantize"):
        AutoModel.from_pretrained(folder, quantization_config=mixft.Int8Config(exclude="*"))


def test_models_are_built_that_differ():
    # The comparisons above would hold for any two models if the tokens did not matter.
    assert not torch.equal(logits(bert()), logits(bert()))
    assert not torch.equal(logits(llama())[0], logits(llama())[1])


def test_without_transformers_mixft_imports_and_the_error_says_what_to_install():
    source = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
from mixft import *
assert "transformers" not in sys.modules
import mixft
mixft.Int8Config
"""
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert "ImportError: mixft.huggingface needs transformers, which is not installed; pip install" in run.stderr


@pytest.mark.parametrize(
    ("library", "module", "version", "message"),
    [
        (transformers, mixft.huggingface, "4.57.1", "transformers 5.12 or newer; 4.57.1 is installed"),
        (transformers, mixft.huggingface, "5.9.0.dev0", "transformers 5.12 or newer; 5.9.0.dev0 is"),
        (peft, mixft.huggingface.lora, "0.19.1", "PEFT 0.20 or newer, or none; 0.19.1 is installed"),
    ],
)
def test_old_libraries_are_refused(monkeypatch, library, module, version, message):
    monkeypatch.setattr(library, "__version__", version)
    with pytest.raises(ImportError, match=message):
        importlib.reload(module)
