"""LoRA of PEFT on int8 layers: values, gradients, merging and its error, files, and what is refused."""

import copy

import pytest
import torch
from conftest import assert_within_budget
from huggingface_models import bert, gpt2, llama, logits
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

import mixft
from mixft.huggingface import LoraQuantLinear
from mixft.nn import MLP, QuantLinear

MODES = ["weight_only", "dynamic", "static", "train"]


# transformers and PEFT call what transformers deprecates.
pytestmark = [
    pytest.mark.usefixtures("native_device"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]


class Layer(nn.Module):
    def __init__(self, mode, dtype=torch.float32, activation=None):
        super().__init__()
        training = {"shape_gating": False} if mode == "train" else {}
        self.dense = QuantLinear.from_linear(
            nn.Linear(66, 50).to(dtype), "dynamic" if mode == "static" else mode, **training
        )
        if mode == "static":
            self.dense.to_static(0.03, 5)
        self.dense.activation = activation

    def forward(self, x):
        return self.dense(x)


def lora(targets, rank=3, **options):
    return LoraConfig(r=rank, target_modules=targets, lora_alpha=6, **options)


def draw(model, std=0.05):
    """Adapters as after some training: B starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(mode, device, dtype=torch.float32):
    model = get_peft_model(Layer(mode, dtype).to(device), lora(["dense"]))
    return draw(model), model.base_model.model.dense


def exact_weight(layer):
    base = layer.base_layer
    weight = base.weight.double() if base.mode == "train" else base.weight.double() * base.weight_scale.double()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return weight, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_against_fp64(native_device, dtype):
    model, layer = adapted("weight_only", native_device, dtype)
    assert isinstance(layer, LoraQuantLinear)
    x = torch.randn(17, 66, device=native_device, dtype=dtype, requires_grad=True)
    out = model(x)
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()

    def reference(float_dtype):
        weight, a, b = (part.detach().to(float_dtype) for part in exact_weight(layer))
        a, b = a.requires_grad_(), b.requires_grad_()
        rows = x.detach().to(float_dtype).requires_grad_()
        y = rows @ weight.t() + layer.base_layer.bias.detach().to(float_dtype) + 2 * (rows @ a.t() @ b.t())
        (y * upstream.to(float_dtype)).sum().backward()
        return y, rows.grad, a.grad, b.grad

    ours = (out, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
    for actual, exact, torch_s in zip(ours, reference(torch.float64), reference(dtype), strict=True):
        assert_within_budget(actual, exact, torch_s, epsilon=2**-8 if dtype == torch.bfloat16 else 2**-20)
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2


@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "static"])
def test_biases_train_beside_the_adapters(native_device, mode):
    model = get_peft_model(Layer(mode).to(native_device), lora(["dense"], bias="lora_only"))
    model(torch.randn(4, 66, device=native_device)).sum().backward()
    layer = model.base_model.model.dense
    assert torch.equal(layer.base_layer.bias.grad, torch.full((50,), 4.0, device=native_device))
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_the_graph_keeps_no_floating_point_copy_of_a_weight(native_device, mode):
    model, layer = adapted(mode, native_device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.randn(5, 66, device=native_device, requires_grad=True))
    weights = [tensor for tensor in kept if tensor.numel() == layer.base_layer.weight.numel()]
    assert [tensor.data_ptr() for tensor in weights] == [layer.base_layer.weight.data_ptr()]


@pytest.mark.parametrize("mode", MODES)
def test_merging_is_within_half_a_step_and_unmerging_gives_the_bits_back(native_device, mode):
    model, layer = adapted(mode, native_device)
    base = layer.base_layer
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    weight, a, b = exact_weight(layer)
    exact = weight + 2 * b @ a
    model.merge_adapter()
    merged, _, _ = exact_weight(layer)
    step = 0.0 if mode == "train" else exact.abs().amax(1, keepdim=True) / 254
    assert ((merged - exact).abs() <= step + 1e-6).all()
    assert not torch.equal(base.weight, before["weight"])
    x = torch.randn(4, 66, device=native_device)
    assert torch.equal(model(x), base(x))
    if mode == "static":
        assert torch.equal(base.weight_sum, base.weight.sum(1, dtype=torch.int32))
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_adapters_merged_one_by_one_are_those_merged_at_once(native_device):
    model, layer = adapted("weight_only", native_device)
    model.add_adapter("second", lora(["dense"], rank=5))
    draw(model)
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    one_by_one = layer.base_layer.weight, layer.base_layer.weight_scale
    layer.unmerge()
    assert not layer.merged_adapters
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge(adapter_names=["default", "second"])
    assert all(map(torch.equal, one_by_one, (layer.base_layer.weight, layer.base_layer.weight_scale)))
    assert layer.merged_adapters == ["default", "second"]


def test_a_broken_adapter_is_refused_and_the_weight_stays(native_device):
    model, layer = adapted("dynamic", native_device)
    before = layer.base_layer.weight.clone()
    layer.lora_B["default"].weight.data[3, 1] = float("nan")
    with pytest.raises(ValueError, match="merging default gives NaN or Inf"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("mode", ["weight_only", "dynamic", "train"])
def test_adapters_go_on_after_dequantize(mode, make, merged):
    model = make(layers=1)
    mixft.quantize_(model, mode)
    plain = copy.deepcopy(model)
    mixft.dequantize_(plain)
    base = logits(plain)
    model = draw(get_peft_model(model, lora("all-linear"))).eval()
    if merged:
        model.merge_adapter()
    mixft.dequantize_(model)
    if merged:
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-6)
    adapted = logits(model)
    assert not torch.allclose(adapted, base)
    model = model.merge_and_unload()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)


def test_adapters_go_on_in_another_mode():
    model = bert(layers=1)
    mixft.quantize_(model, "train")
    model = draw(get_peft_model(model, lora("all-linear"))).eval()
    before = model.state_dict()["base_model.model.bert.pooler.dense.base_layer.weight"].clone()
    model.merge_adapter()
    mixft.quantize_(model, "dynamic")
    model.unmerge_adapter()
    layer = model.base_model.model.bert.pooler.dense.base_layer
    values, scale = layer.weight, layer.weight_scale
    assert layer.mode == "dynamic"
    assert ((values * scale - before).abs() <= before.abs().amax(1, keepdim=True) / 254 + 1e-7).all()


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (lora(["query"], rank=130), {"base_layer", "lora_A.default", "lora_B.default"}),
        (lora(["query"], rank=130, use_dora=True), {"base_layer", "lora_A.default", "lora_B.default"}),
        (HRAConfig(r=4, target_modules=["query"]), {"base_layer"}),
    ],
)
def test_layers_in_adapters_of_peft_stay_in_floats(config, left):
    model = draw(get_peft_model(bert(layers=1), config)).eval()
    before = logits(model)
    report = mixft.quantize_(model, "dynamic")
    reason = "an adapter of PEFT holds it, and may read its weight; quantize_ before get_peft_model"
    assert {layer.name.rpartition("query.")[2] for layer in report.left if layer.reason == reason} == left
    assert len(report.quantized) == 6
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.1 * before.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_the_merged_layer_computes_what_the_adapters_did(native_device, mode):
    model, _ = adapted(mode, native_device)
    x = torch.randn(9, 66, device=native_device)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=0.0, atol=0.1)
    with model.disable_adapter():
        assert (model(x) - before).abs().max() > 0.1


def test_every_int8_layer_is_all_linear_and_the_head_is_not(native_device):
    model = llama()
    mixft.quantize_(model, exclude="*down_proj")
    model = get_peft_model(model, lora("all-linear"))
    found = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if hasattr(part, "lora_A")}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    count = sum(isinstance(part, LoraQuantLinear) for part in model.modules())
    model.add_adapter("second", lora("all-linear"))
    assert sum(isinstance(part, LoraQuantLinear) for part in model.modules()) == count
    assert set(model.base_model.model.model.layers[0].mlp.up_proj.lora_A) == {"default", "second"}
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_adapters_travel_and_the_merged_model_is_saved_in_int8(native_device, tmp_path, mode):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    load = type(base).from_pretrained
    config = mixft.Int8Config(mode)
    model = draw(get_peft_model(load(tmp_path / "base", quantization_config=config), lora(["q_proj", "up_proj"])))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base", quantization_config=config), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert not any(hasattr(part, "lora_A") for part in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    assert (logits(merged) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("mode", ["weight_only", "train"])
def test_layers_that_were_conv1d_take_adapters(native_device, mode):
    model, reference = gpt2(), gpt2()
    reference.load_state_dict(model.state_dict())
    plain = logits(model)
    mixft.quantize_(model, mode)
    models = [get_peft_model(found, lora(["c_attn", "c_proj"], fan_in_fan_out=True)) for found in (model, reference)]
    assert isinstance(model.transformer.h[0].mlp.c_proj, LoraQuantLinear)
    draw(models[0], std=0.5)
    models[1].load_state_dict({k: v for k, v in models[0].state_dict().items() if "lora_" in k}, strict=False)
    adapted, expected = map(logits, models)
    models[0].merge_adapter()
    merged = logits(models[0])
    effect = (expected - plain).abs().max()
    assert (adapted - expected).abs().max() < 0.05 * effect
    assert (merged - expected).abs().max() < 0.05 * effect


def test_transformers_own_add_adapter_takes_int8_layers(native_device):
    model = bert()
    mixft.quantize_(model)
    model.add_adapter(lora(["query", "dense"]))
    assert isinstance(model.bert.encoder.layer[1].attention.self.query, LoraQuantLinear)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(native_device, reentrant):
    model = llama()
    mixft.quantize_(model, "dynamic")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = draw(get_peft_model(model, lora("all-linear"))).to(native_device).train()
    tokens = torch.randint(0, 150, (2, 9), device=native_device)

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(map(torch.equal, gradients(), plain))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal"])
def test_initial_adapters_are_those_of_a_floating_point_layer(native_device, mode, initial):
    layer, floats = Layer(mode), nn.Sequential()
    floats.add_module("dense", nn.Linear(66, 50))
    found = []
    for each in (layer, floats):
        torch.manual_seed(0)
        model = get_peft_model(each.to(native_device), lora(["dense"], rank=4, init_lora_weights=initial))
        adapters = model.base_model.model.dense
        found.append([part["default"].weight for part in (adapters.lora_A, adapters.lora_B)])
        assert adapters.get_base_layer() is adapters.base_layer
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not for int8 layers"),
        ({"lora_bias": True}, "lora_bias=True is not for int8 layers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the int8 weight"),
    ],
)
def test_what_needs_a_floating_point_weight_is_refused(native_device, options, message):
    layer = Layer("dynamic")
    weight = copy.deepcopy(layer.dense.weight)
    with pytest.raises(ValueError, match=message):
        get_peft_model(layer, lora(["dense"], **options))
    assert torch.equal(layer.dense.weight, weight)


def test_a_fused_activation_is_refused(native_device):
    with pytest.raises(ValueError, match="activation='gelu' takes no adapter"):
        get_peft_model(Layer("dynamic", activation="gelu"), lora(["dense"]))
    with pytest.raises(ValueError, match="a Linear with activation='gelu' takes no adapter"):
        get_peft_model(nn.Sequential(MLP(66, 50)), lora(["fc1"]))


def test_an_adapter_on_the_second_layer_of_a_block(native_device):
    block, x = MLP(66, 50), torch.randn(7, 66)
    before = block(x)
    model = get_peft_model(nn.Sequential(block), lora(["fc2"]))
    # At first B is zero.
    assert_within_budget(model(x), before.double(), before, 1e-6)
    adapted = model.base_model.model[0].fc2
    nn.init.normal_(adapted.lora_B["default"].weight)
    hidden = block.fc1(x)
    exact = before + adapted.scaling["default"] * adapted.lora_B["default"](adapted.lora_A["default"](hidden))
    assert_within_budget(model(x), exact.double(), exact, 1e-5)
    model(x).sum().backward()
    assert adapted.lora_B["default"].weight.grad.any()


def test_other_layers_keep_peft_s_own_adapters(native_device):
    model = bert()
    mixft.quantize_(model, include="*query")
    model = get_peft_model(model, lora(["query", "value"]))
    own = model.base_model.model.bert.encoder.layer[0].attention.self
    assert type(own.query).__name__ == "LoraQuantLinear"
    assert type(own.value).__name__ == "Linear"
