"""The quantizer that transformers calls: it swaps layers on the meta device and quantizes each weight as it is read."""

import copy
from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from mixft.nn import QuantLinear
from mixft.nn.conv1d import features, is_conv1d
from mixft.nn.int8_weight import int8_weight_of
from mixft.nn.quantization import choose_layers, dequantize_, quantize_, replace_modules

from .config import QUANT_METHOD, Int8Config


@register_quantizer(QUANT_METHOD)
class Int8Quantizer(HfQuantizer):
    """Loads models in int8, from floating-point checkpoints and from those that it saved; transformers makes it.

    No floating-point copy of the model is made on the way: its layers are swapped before any weight is read, and each
    weight is quantized when it is, on its own device.
    """

    quantization_config: Int8Config

    def __init__(self, quantization_config: Int8Config, **kwargs):
        # The list of layers is the model's own, and a user may load several models with one configuration.
        super().__init__(copy.copy(quantization_config), **kwargs)

    @property
    def quantized_element_size(self) -> int:
        """Bytes of an element of a quantized weight."""
        return 1

    @property
    def is_trainable(self) -> bool:
        """Adapters train on frozen int8 weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """In ``train`` mode the weights themselves train."""
        return self.quantization_config.mode == "train"

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` takes the layers."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes every mode."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            reasons = choose_layers(
                model, config.mode, include=config.include, exclude=config.exclude, **config.training
            )
            chosen = [name for name, reason in reasons.items() if not reason]
            if not chosen:
                listing = (
                    "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no linear layers"
                )
                raise ValueError(f"model has no layer to quantize ({listing})")
            config.layers = [_relative(name, model) for name in chosen]
        if config.mode != "train":
            layers = {name: module for name, module in model.named_modules() if _relative(name, model) in config.layers}
            replace_modules(model, {module: _empty_like(module, config.mode) for module in layers.values()})

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        """Whether ``param_name`` is a weight to turn into int8 as it is read."""
        if self.pre_quantized:
            return False
        module_name, _, tensor_name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return isinstance(module, QuantLinear) and module.mode != "train" and tensor_name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a weight of the checkpoint into those of the layer."""
        return QuantizeWeight()

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a tensor of a quantized checkpoint to; ValueError where int8 meets floating point."""
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        if (stored in ("I8", "torch.int8")) != (dtype == torch.int8):
            raise ValueError(
                f"tensor {converter.target_patterns[0]!r} is {stored} in the checkpoint and {dtype} in the model: "
                "quantization_config in config.json does not fit the weights"
            )
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        config = self.quantization_config
        if config.mode == "train":
            names = [name for name, _ in model.named_modules() if _relative(name, model) in config.layers]
            quantize_(model, "train", include=names, **config.training)
        elif self.pre_quantized:
            _check_complete(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_(model)
        # A configuration that has been saved holds the name of its dtype.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)


def mark_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``save_pretrained`` of a model that ``mixft.quantize_`` changed write what ``from_pretrained`` reads.

    ``from_pretrained`` with an :class:`Int8Config` does so itself.

    Returns:
        ``model``, with a quantization_config in its configuration.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ValueError: it has no QuantLinear layers, or some of several modes or training options.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel; it is a {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    modes = sorted({layer.mode for layer in layers.values()})
    if not modes:
        raise ValueError("model has no QuantLinear layers; call mixft.quantize_(model) first, or save it as usual")
    if len(modes) > 1:
        raise ValueError(f"model has layers of the modes {', '.join(modes)}; config.json holds one mode")
    training = {layer.int8_training.options for layer in layers.values() if layer.mode == "train"}
    if len(training) > 1:
        raise ValueError("model has layers of several training options; config.json holds one set of them")
    config = Int8Config(
        modes[0],
        layers=[_relative(name, model) for name in layers],
        **{name: value for options in training for name, value in asdict(options).items()},
    )
    model.hf_quantizer = Int8Quantizer(config, pre_quantized=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    return model


class QuantizeWeight(ConversionOps):
    """A floating-point weight [N, K] to int8 values and the scale of each row."""

    def convert(self, input_dict: dict[str, Tensor | list[Tensor]], model: nn.Module, **kwargs) -> dict[str, Tensor]:
        """``{"X.weight": ...}`` to ``{"X.weight": ..., "X.weight_scale": ...}``; ValueError for NaN, Inf, a shape."""
        converted = {}
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            expected = model.get_buffer(name).shape
            if weight.shape != expected:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}; the model needs {tuple(expected)}")
            converted[name], converted[f"{name}_scale"] = int8_weight_of(weight)
        return converted


def _relative(name: str, model: PreTrainedModel) -> str:
    """``name`` without the prefix of the base model, so that it is the same with a head and without."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _check_complete(model: PreTrainedModel) -> None:
    """Raise ValueError for an int8 weight or a scale that the checkpoint lacks; transformers only warns of those."""
    if len(getattr(model, "hf_device_map", {})) > 1:
        return  # tensors have moved since, without transformers' mark on those that were read
    tensors = {
        f"{name}.{tensor}": getattr(module, tensor)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for tensor in ("weight", "weight_scale")
    }
    missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise ValueError(f"the checkpoint has no tensor {missing[0]!r}, which quantization_config in config.json names")


def _empty_like(linear: nn.Module, mode: str) -> QuantLinear:
    return QuantLinear(
        *features(linear),
        linear.bias is not None,
        mode,
        device="meta",
        dtype=linear.weight.dtype,
        transposed=is_conv1d(linear),
    )
