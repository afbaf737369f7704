"""ONNX: exported models hold standard operators and int8 weights, and give mixft's values in onnxruntime."""

import logging
import sys
from collections import Counter

import onnxruntime
import pytest
import torch
from huggingface_models import VOCABULARY, bert
from torch import nn
from torch.export import Dim

import mixft
import mixft.onnx
from mixft.nn import Linear, QuantLinear
from mixft.ops import int8_matmul

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
STEEPEST = 1.13  # the largest slope of any of them, GELU's


# torch's exporter calls what torch deprecates, and two inputs here share the name of a dimension.
pytestmark = [
    pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6's exporter takes other tables of translations"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*axis name:UserWarning"),
]


@pytest.fixture(autouse=True)
def native(without_interpreter, monkeypatch):
    # torch's exporter warns of operators of torchvision, which is not installed.
    monkeypatch.setattr(logging.getLogger("torch.onnx._internal.exporter._registration"), "disabled", True)


def exported(model, inputs, shapes, path):
    """The path's session, and the graph."""
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            custom_translation_table=mixft.onnx.translation_table(),
            verbose=False,
        )
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), program.model.graph


def run(session, **inputs):
    return [torch.from_numpy(out) for out in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


class Layers(nn.Module):
    """Odd layers of both modes, one for each activation."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.ModuleList(
            QuantLinear.from_linear(Linear(67, 33, bias=name != "silu", activation=name).to(dtype), mode)
            for mode in ("weight_only", "dynamic")
            for name in ACTIVATIONS
        )

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def tie_allowance(layer, x):
    """How far the output may be when values of x within 2^-14 of a tie are rounded to the other neighbour."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    quotient = x.double() / scale
    near = ((quotient - quotient.floor() - 0.5).abs() < 2**-14).double()
    return STEEPEST * scale * (near @ layer.weight.double().abs().t()) * layer.weight_scale.double().view(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_give_the_same_integers_and_the_same_values_to_rounding(tmp_path, dtype):
    model = Layers(dtype)
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    session, graph = exported(model, {"x": torch.randn(3, 5, 67, dtype=dtype)}, shapes, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in graph)
    assert {node.domain for node in graph} == {""}
    # Torch's exporter lets the layers share the quantized input.
    assert (kinds["MatMulInteger"], kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (5, 1, 5)
    matrices = [tensor for tensor in graph.initializers.values() if tensor.const_value.size == 67 * 33]
    assert [tensor.dtype.name for tensor in matrices] == ["INT8"] * 2 * len(ACTIVATIONS)
    x = torch.randn(17, 3, 67).to(dtype)
    x[2] = 0
    x[3] *= 1e-4
    epsilon = 2.0**-10 if dtype == torch.float16 else 2.0**-20
    with torch.no_grad():
        expected = model(x)
    for layer, ours, theirs in zip(model.layers, expected, run(session, x=x), strict=True):
        assert theirs.dtype == dtype
        allowed = epsilon * ours.double().abs().amax()
        if layer.mode == "dynamic":
            allowed = allowed + tie_allowance(layer, x)
        assert ((theirs.double() - ours.double()).abs() <= allowed).all()


class Mixed(nn.Module):
    """A layer that shows what its input is rounded to, a floating-point one, and a product that is no layer."""

    def __init__(self):
        super().__init__()
        self.rounding = QuantLinear(67, 67, bias=False)
        self.rounding.weight = torch.eye(67, dtype=torch.int8)
        self.dense = Linear(67, 33, activation="gelu")
        self.static = QuantLinear.from_linear(nn.Linear(67, 33))
        self.static.to_static(0.5, -7)
        self.outliers = QuantLinear.from_linear(nn.Linear(67, 33), outlier_threshold=100.0)
        self.register_buffer("b", torch.randint(-127, 128, (20, 33), dtype=torch.int8))

    def forward(self, x, a, a_scale, zero_points):
        b, scales = self.b, (a_scale, torch.tensor(0.25))
        y = int8_matmul(a, b, *scales, activation="relu", out_dtype=torch.float32)
        affine = int8_matmul(a, b, *scales, out_dtype=torch.float32, a_zero_point=zero_points)
        return self.rounding(x), self.dense(x), self.static(x), self.outliers(x), y, affine


def test_exact_ties_round_to_even_and_other_ops_are_translated(tmp_path):
    model = Mixed()
    x = torch.arange(17 * 67).view(17, 67) % 126 - 62.5
    x[:, 5] = 127.0  # a scale of 1
    inputs = {
        "x": x,
        "a": torch.randint(-127, 128, (17, 33), dtype=torch.int8),
        "a_scale": torch.rand(17, 1) / 100,
        "zero_points": torch.randint(-128, 128, (17, 1), dtype=torch.int32),
    }
    session, _ = exported(model, inputs, None, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(**inputs)
    found = run(session, **inputs)
    assert torch.equal(found[0], x.round())
    assert torch.equal(expected[0], x.round())
    for ours, theirs in zip(expected[1:], found[1:], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)


def test_a_language_model_in_onnxruntime(tmp_path):
    model, reference = bert(layers=1), bert(layers=1)
    reference.load_state_dict(model.state_dict())
    mixft.quantize_(model)
    tokens = torch.randint(0, VOCABULARY, (5, 11))
    mask = torch.ones_like(tokens)
    mask[2, 7:] = 0
    shape = {0: Dim("batch"), 1: Dim("length", max=32)}
    example = {"input_ids": tokens[:3, :9], "attention_mask": mask[:3, :9]}
    session, graph = exported(model, example, dict.fromkeys(example, shape), tmp_path / "model.onnx")
    assert Counter(node.op_type for node in graph)["MatMulInteger"] == 7
    (theirs,) = run(session, input_ids=tokens, attention_mask=mask)
    with torch.no_grad():
        ours, exact = (found(tokens, attention_mask=mask).logits for found in (model, reference))
    # A value rounded to the other side of a tie is one of the thousands of roundings that the int8 error is made of.
    assert (theirs - ours).abs().max() < 0.05 * (ours - exact).abs().max()


def test_a_layer_that_trains_is_refused_with_what_to_do(tmp_path):
    model = QuantLinear(128, 128, mode="train", shape_gating=False)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"mode 'train', of which mixft\.quantize_"):
        exported(model, {"input": torch.randn(4, 128)}, None, tmp_path / "model.onnx")


def test_without_onnxscript_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[onnx\]' in mixft's checkout"):
        mixft.onnx.translation_table()
