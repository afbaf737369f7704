"""A whole inference step: one forward pass of whole models, in int8 by mixft and others, and in floating point."""

import copy
import warnings

import torch
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Call, Case, Provider, Refused
from mixft.benchmarks.peers import peer

from .int8 import TORCHAO_COMPILE, bitsandbytes_layer, gemlite_layer
from .models import BERT_BASE, BERT_SMALL, LLAMA, LLAMA_SMALL, Inputs, Shape, memory_held, one_token, replace_linear


def inference_step(shape: Shape, mode: str = "dynamic", **options) -> Case:
    """``quantize_(model, mode)`` against the model in FP32 on a CPU and FP16 on a GPU, AMP and other int8 schemes."""
    suffix = "" if shape.length > 1 else "-decode"
    return Case(
        f"inference_step/{shape.kind}-{shape.layers}-layers-{mode}{suffix}",
        inputs=shape.inputs(labels=False),
        exact=lambda inputs: [copy.deepcopy(inputs[0]).double()(**inputs[1]).logits.detach()],
        providers={"mixft": _forward(lambda model: _mixft(model, mode)), **PEERS},
        bound=0.1,
        # One scale for a whole activation.
        own_bounds={"torch.ao": 0.2},
        bytes=shape.linear_parameters,
        operations=shape.operations,
        rate="int8",
        tokens=shape.tokens,
        devices=shape.devices,
        memory=True,
        **options,
    )


def _forward(convert, autocast: bool = False) -> Provider:
    """``convert`` of the model in FP32 on a CPU and FP16 on a GPU; with ``autocast`` in FP32, under torch's AMP."""

    def prepare(inputs: Inputs) -> Call:
        model, batch = inputs
        model = copy.deepcopy(model).requires_grad_(False)
        on_gpu = next(model.parameters()).is_cuda
        model = convert(model.half() if on_gpu and not autocast else model)
        dtype = torch.float16 if on_gpu else torch.bfloat16

        @torch.inference_mode()
        def run() -> list[Tensor]:
            with torch.autocast(batch["input_ids"].device.type, dtype, enabled=autocast):
                return [model(**batch).logits]

        return Call(run, held=lambda: memory_held(model))

    return prepare


def _mixft(model: nn.Module, mode: str) -> nn.Module:
    # The output head too, as torch.ao and torchao quantize it.
    mixft.quantize_(model, mode, include="*")
    return model


def _compiled(model: nn.Module, **options) -> nn.Module:
    model.compile(dynamic=False, **options)
    return model


def _torch_dynamic(model: nn.Module) -> nn.Module:
    if next(model.parameters()).is_cuda:
        raise Refused("torch.ao's quantized layers are for a CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and what CPU users have
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def _torchao(model: nn.Module) -> nn.Module:
    quantization = peer("torchao", "quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return _compiled(model, options=TORCHAO_COMPILE)


PEERS = {
    "torch": _forward(lambda model: model),
    "torch AMP": _forward(lambda model: model, autocast=True),
    "torch.compile": _forward(_compiled),
    "torch.ao": _forward(_torch_dynamic),
    "torchao+compile": _forward(_torchao),
    "bitsandbytes": _forward(lambda model: replace_linear(model, bitsandbytes_layer, head=True)),
    "gemlite": _forward(lambda model: replace_linear(model, gemlite_layer("A8W8_int8_dynamic"), head=True)),
}
SMALL_PRODUCTS = "in products this small quantizing the input is the larger part; torch.ao gives all of it one scale"

CASES = (
    inference_step(BERT_SMALL, reason_if_slower=SMALL_PRODUCTS),
    inference_step(LLAMA_SMALL, reason_if_slower=SMALL_PRODUCTS),
    inference_step(one_token(LLAMA_SMALL), reason_if_slower=SMALL_PRODUCTS),
    inference_step(BERT_BASE),
    inference_step(LLAMA),
    inference_step(one_token(LLAMA), "weight_only"),
)
