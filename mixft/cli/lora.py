"""LoRA in ``mixft finetune``: a frozen model, in int8 or as it was, and PEFT's adapters, which alone are trained.

    y = W x + alpha / rank * B A x            A [rank, in], B [out, rank], beside every linear layer below the head

(Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.) A classifier's fresh head is trained whole. The
model's own dropout is off: it is there against the overfitting of weights that are frozen here. What a layer computed
is computed again in the backward pass where the model supports it, so that the memory is that of the weights, the
adapters and one layer.
"""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

import mixft
import mixft.huggingface  # teaches PEFT and transformers what an int8 layer is
from mixft.cli import model_folder
from mixft.cli.errors import InputError
from mixft.cli.precision import adapted_layers, quantize

TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
FROZEN = "dynamic"  # the mode of the frozen layers of an int8 run
FROZEN_KEY = "mixft_frozen"  # in the config.json beside saved adapters: the mode of the model that they were trained on


def add_adapters(model: torch.nn.Module, task: str, precision: str, rank: int, alpha: float) -> PeftModel:
    """Freeze ``model``, to int8 weights for precision "int8", and put adapters of ``rank`` into it."""
    names = adapted_layers(model)
    if precision == "int8" and not getattr(model, "is_quantized", False):
        quantize(model, FROZEN)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type=TASK_TYPES[task])
    return get_peft_model(model, settings)


def save_adapters(model: PeftModel, tokenizer, source: Path, precision: str, folder: Path) -> None:
    """Save the adapters and the head as PEFT does, with the configuration and the tokenizer."""
    trained = model.get_base_model()
    config = copy.deepcopy(trained.config)
    config.architectures = [type(trained).__name__]
    setattr(config, FROZEN_KEY, FROZEN if precision == "int8" else None)
    model.peft_config["default"].base_model_name_or_path = str(source.resolve())
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merged(model: PeftModel) -> torch.nn.Module:
    """The model that was trained, without adapters, all in floating point: ``model`` itself is used up.

    Adapters are added to the frozen weights as the forward pass saw them, dequantized where they are in int8.
    """
    changes = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            change = module.get_delta_weight("default")
            # An int8 layer has its weight as [out, in] even where it stands for a Conv1D, which has [in, out].
            changes[name] = change.t() if getattr(module.get_base_layer(), "transposed", False) else change
    plain = model.unload()
    mixft.dequantize_(plain)
    with torch.no_grad():
        for name, change in changes.items():
            plain.get_submodule(name).weight.add_(change)
    for attribute in ("quantization_config", FROZEN_KEY):
        if hasattr(plain.config, attribute):
            delattr(plain.config, attribute)
    return plain


def load_adapted(folder: Path, config, task: str) -> torch.nn.Module:
    """The adapters in ``folder`` on the model that they were trained on.

    Raises:
        InputError: that model is not where it was, or a file does not load.
    """
    source = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not Path(source).is_dir():
        raise InputError(f"the adapters in {folder} belong to the model in {source}, which is not there; put it back")
    if task == "causal-lm":
        model = model_folder.load_causal_lm(Path(source))
    else:
        model = model_folder.load_classifier(
            Path(source), [config.id2label[index] for index in sorted(config.id2label)]
        )
    if getattr(config, FROZEN_KEY, None) is not None and not getattr(model, "is_quantized", False):
        quantize(model, getattr(config, FROZEN_KEY))
    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the adapters in {folder} do not load: {error}; save them again") from error
