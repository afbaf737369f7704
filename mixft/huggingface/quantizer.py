"""The quantizer that transformers calls: it swaps layers on the meta device and quantizes each weight as it is read."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from mixft.nn import QuantLinear
from mixft.nn.conv1d import features, is_conv1d
from mixft.nn.int8_weight import int8_weight_of
from mixft.nn.quant_linear import Mode
from mixft.nn.quantization import SHARED, choose_layers, dequantize_, quantize_, replace_modules, why_none

from .config import QUANT_METHOD, Int8Config
from .files import check_files


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

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args) -> tuple[None, dict]:
        """Called by ``save_pretrained`` first: what ``model`` has become since it was loaded goes into its
        configuration; ValueError where its layers are of several modes or options."""
        # With adapters in it, only these are saved.
        if not getattr(model, "_hf_peft_config_loaded", False):
            if any(isinstance(module, QuantLinear) for module in model.modules()):
                mark_quantized(model)
                _keep_apart(model)
            else:
                _unmark(model)
        return None, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            check_files(kwargs.get("checkpoint_files") or [])
        else:
            reasons = choose_unread_layers(
                model, config.mode, include=config.include, exclude=config.exclude, **config.training
            )
            chosen = [name for name, reason in reasons.items() if not reason]
            if not chosen:
                raise ValueError(f"model has no layer to quantize ({why_none(reasons)})")
            config.layers = [_relative(name, model) for name in chosen]
        if config.mode != "train":
            replace_modules(model, {layer: self._empty_like(layer) for layer in _configured(model, config).values()})

    def _empty_like(self, linear: nn.Module) -> QuantLinear:
        """A layer of the configured mode for ``linear``, an ``nn.Linear`` or ``Conv1D``, on the meta device."""
        layer = QuantLinear(
            *features(linear),
            linear.bias is not None,
            self.quantization_config.mode,
            device="meta",
            dtype=linear.weight.dtype,
            outlier_threshold=self.quantization_config.outlier_threshold,
            transposed=is_conv1d(linear),
            **self.quantization_config.training,
        )
        if not self.pre_quantized:
            # transformers before 5.23 casts what it reads to the dtype found here, and only then has it quantized.
            layer.weight = linear.weight.detach()
        return layer

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

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        config = self.quantization_config
        if config.mode == "train":
            quantize_(model, "train", include=_configured(model, config), **config.training)
            return model
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.int8:
                raise ValueError(
                    f"{name!r} is int8 in the checkpoint; quantization_config in config.json has no such layer"
                )
        unread = _unread(model)
        if unread and self.pre_quantized:
            raise ValueError(
                f"the checkpoint has no int8 weight and scale of {next(iter(unread))!r}, which quantization_config in "
                "config.json names; save the model again"
            )
        # A layer that the checkpoint lacks is new, and is left to be trained.
        replace_modules(model, {layer: _initialized(layer, model) for layer in unread.values()})
        new = {_relative(name, model) for name in unread}
        config.layers = [name for name in config.layers if name not in new]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_(model)
        # A configuration that has been saved holds the name of its dtype.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)


def choose_unread_layers(model: PreTrainedModel, mode: Mode, **options) -> dict[str, str]:
    """:func:`mixft.nn.quantization.choose_layers` for a model before its weights are read, and only then tied."""
    reasons = choose_layers(model, mode, **options)
    for weight in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
        layer = weight.removesuffix(".weight")
        if reasons.get(layer) == "":
            reasons[layer] = SHARED
    return reasons


def mark_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``save_pretrained`` of a model that ``mixft.quantize_`` changed write what ``from_pretrained`` reads.

    ``from_pretrained`` with an :class:`Int8Config` does so itself. From then on ``save_pretrained`` writes what the
    model has become by then: after ``mixft.calibrate``, another ``mixft.quantize_`` or ``mixft.dequantize_`` too.

    Returns:
        ``model``, with a quantization_config in its configuration.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ValueError: it has no QuantLinear layers, or some of several modes or options.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel; it is a {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    modes = sorted({layer.mode for layer in layers.values()})
    if not modes:
        raise ValueError("model has no QuantLinear layers; call mixft.quantize_(model) first, or save it as usual")
    if len(modes) > 1:
        raise ValueError(f"model has layers of the modes {', '.join(modes)}; config.json holds one mode")
    options = {_options(layer) for layer in layers.values()}
    if len(options) > 1:
        raise ValueError("model has layers of several options; config.json holds one set of them")
    config = Int8Config(modes[0], layers=[_relative(name, model) for name in layers], **dict(options.pop()))
    model.hf_quantizer = Int8Quantizer(config, pre_quantized=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    return model


def _keep_apart(model: PreTrainedModel) -> None:
    """Have ``model`` saved under its own names where int8 weights would else be joined or split as its checkpoint has
    them, which leaves their scales behind; transformers reads either form."""
    if model.hf_quantizer.quantization_config.mode == "train":
        return
    steps = getattr(model, "_weight_conversions", None)
    if steps is None:
        steps = get_model_conversion_mapping(model, add_legacy=False)
    back = [step.reverse_transform() for step in steps if isinstance(step, WeightConverter)]
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if any(step.rename_source_key(weight)[1] is not None for step in back for weight in weights):
        model._weight_conversions = []


def _unmark(model: PreTrainedModel) -> None:
    """Take what :func:`mark_quantized` sets from a model without int8 layers."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.__dict__.pop("quantization_method", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _options(layer: QuantLinear) -> tuple[tuple[str, object], ...]:
    """The options of :class:`Int8Config` that ``layer`` was made with."""
    training = tuple(layer.training_options().items())
    return training if layer.mode == "train" else (("outlier_threshold", layer.outlier_threshold), *training)


class QuantizeWeight(ConversionOps):
    """A floating-point weight [N, K] to int8 values and the scale of each row."""

    def convert(self, input_dict: dict[str, Tensor | list[Tensor]], model: nn.Module, **kwargs) -> dict[str, Tensor]:
        """``{"X.weight": ...}`` to ``{"X.weight": ..., "X.weight_scale": ...}``; ValueError for NaN, Inf, a shape."""
        converted = {}
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            layer = model.get_submodule(name.rpartition(".")[0])
            matrix = weight.t() if layer.transposed else weight
            if matrix.shape != (layer.out_features, layer.in_features):
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, which does not fit {layer}")
            converted[name], converted[f"{name}_scale"] = int8_weight_of(matrix)
        return converted


def _relative(name: str, model: PreTrainedModel) -> str:
    """``name`` without the prefix of the base model, so that it is the same with a head and without."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _configured(model: PreTrainedModel, config: Int8Config) -> dict[str, nn.Module]:
    """The modules of ``model`` that ``config`` names, by their names in it."""
    layers = set(config.layers)
    return {name: module for name, module in model.named_modules() if _relative(name, model) in layers}


def _unread(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """The int8 layers whose weight or scale the checkpoint lacks, of which transformers only warns."""
    if len(getattr(model, "hf_device_map", {})) > 1:
        return {}  # tensors have moved since, without transformers' mark on those that were read
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear)
        and not all(getattr(tensor, "_is_hf_initialized", False) for tensor in layer.buffers(recurse=False))
    }


def _initialized(layer: QuantLinear, model: PreTrainedModel) -> nn.Module:
    """A floating-point layer in the place of ``layer``, with the initial weights that ``model`` gives to new ones."""
    linear = layer.to_linear()
    with torch.no_grad():
        model._init_weights(linear)
    return linear
