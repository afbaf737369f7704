"""A training step of LoRA adapters by PEFT on a frozen model: in int8 by mixft and bitsandbytes, in floats by torch."""

import importlib
from functools import partial

import torch
from torch import nn

import mixft
from mixft.benchmarks.case import Case
from mixft.benchmarks.peers import peer, quiet

from .int8 import bitsandbytes_layer
from .models import BERT_BASE, BERT_SMALL, LLAMA, LLAMA_SMALL, Shape, replace_linear
from .training_step import MAX_NORM, OPTIONS, Recipe, step_case

RANK = 8
# Adapters take a higher rate, and the losses of the checked steps have to fall by more than the bound.
LORA_OPTIONS = OPTIONS | {"lr": 3e-3}


def lora_step(shape: Shape, **options) -> Case:
    """int8 weights under adapters of rank ``RANK``, and mixft's AdamW, against FP32 weights and torch's."""
    recipes = {"mixft": _mixft, "torch": _torch, "torch AMP": _amp, "bitsandbytes": _bitsandbytes}
    return step_case("lora_step", shape, "int8", recipes, exact=_torch, memory=True, trains_all=False, **options)


def _adapted(model: nn.Module) -> nn.Module:
    """PEFT's model, its adapters drawn as in every other provider."""
    library = peer("peft")
    torch.manual_seed(0)
    task = "SEQ_CLS" if hasattr(model, "classifier") else "CAUSAL_LM"
    config = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=task)
    with quiet():
        return library.get_peft_model(model, config)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _torch(model: nn.Module, autocast: torch.dtype | None = None) -> Recipe:
    model = _adapted(model)
    return Recipe(model, torch.optim.AdamW(_trained(model), fused=True, **LORA_OPTIONS), autocast)


_amp = partial(_torch, autocast=torch.bfloat16)


def _mixft(model: nn.Module) -> Recipe:
    peer("peft")
    importlib.import_module("mixft.huggingface")  # teaches PEFT what an int8 layer is
    on_gpu = next(model.parameters()).is_cuda
    mixft.quantize_(model)
    model = _adapted(model)
    optimizer = mixft.optim.AdamW(_trained(model), max_grad_norm=MAX_NORM, **LORA_OPTIONS)
    return Recipe(model, optimizer, autocast=torch.bfloat16 if on_gpu else None, clips=True)


def _bitsandbytes(model: nn.Module) -> Recipe:
    model = replace_linear(model, bitsandbytes_layer)
    model.is_loaded_in_8bit = True  # what PEFT asks
    return _amp(model)


CASES = (
    lora_step(BERT_SMALL),
    lora_step(LLAMA_SMALL),
    lora_step(BERT_BASE),
    lora_step(LLAMA),
)
