"""torch.export of quantized models: the program gives eager's bits for every batch, and survives its file."""

import pytest
import torch
from huggingface_models import VOCABULARY, bert, llama
from torch import nn
from torch.export import Dim

import mixft
from mixft.nn import QuantLinear

pytestmark = pytest.mark.usefixtures("native_device")

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def layers(mode, device):
    model = nn.Sequential(
        QuantLinear.from_linear(mixft.nn.Linear(67, 33, activation="gelu"), mode),
        QuantLinear.from_linear(nn.Linear(33, 50, bias=False), mode),
    )
    return model.eval().to(device)


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_a_program_with_a_dynamic_batch_is_eager_and_loads_from_its_file(native_device, tmp_path, mode):
    model = layers(mode, native_device)
    example = torch.randn(3, 5, 67, device=native_device)
    with torch.no_grad():
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},), strict=False
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        for shape in ((3, 5, 67), (1, 17, 67), (66, 2, 67)):
            x = torch.randn(shape, device=native_device)
            assert torch.equal(loaded.module()(x), model(x))
    calls = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mixft.")]
    assert len(calls) == 2
    assert program.state_dict["0.weight"].dtype == torch.int8


@pytest.mark.parametrize("shape_gating", [True, False])
def test_a_layer_in_training_makes_one_program_for_every_number_of_rows(native_device, shape_gating):
    plain = nn.Linear(67, 33)
    model = QuantLinear.from_linear(plain, "train", shape_gating=shape_gating).to(native_device)
    ungated = QuantLinear.from_linear(plain, "train", shape_gating=False).to(native_device)
    example = torch.randn(3, 5, 67, device=native_device)
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False).module()
        for shape in ((3, 5, 67), (1, 17, 67), (66, 2, 67)):
            x = torch.randn(shape, device=native_device)
            assert torch.equal(program(x), ungated(x))


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_gradients_flow_through_a_program(native_device, mode):
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(67, 33), mode)).to(native_device)
    x = torch.randn(4, 67, device=native_device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False).module()
    inputs = [torch.randn(7, 67, device=native_device).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for function, rows in zip((model, program), inputs, strict=True):
        function(rows).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 does not export transformers' models, quantized or not")
@pytest.mark.parametrize("make", [bert, llama])
def test_a_language_model_with_dynamic_batch_and_length(native_device, make):
    model = make(layers=1)
    model.config.use_cache = False
    mixft.quantize_(model)
    model.to(native_device)

    def inputs(rows, length):
        mask = torch.ones(rows, length, dtype=torch.int64, device=native_device)
        mask[0, length - 2 :] = 0
        tokens = torch.randint(0, VOCABULARY, (rows, length), device=native_device)
        return {"input_ids": tokens, "attention_mask": mask}

    shape = {0: Dim("batch"), 1: Dim("length", max=32)}
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs(3, 9), dynamic_shapes=dict.fromkeys(inputs(3, 9), shape), strict=False
        )
        other = inputs(5, 17)
        assert torch.equal(program.module()(**other).logits, model(**other).logits)
