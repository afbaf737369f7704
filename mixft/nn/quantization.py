"""Swapping the linear layers of a model for int8 ones, and back."""

from collections import Counter
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from mixft.ops.validation import FLOATS

from .conv1d import is_conv1d
from .frozen_training import FrozenOptions
from .hooks import has_hooks, has_own_forward, share_hooks
from .int8_training import TrainingOptions
from .linear import Linear
from .quant_linear import Mode, QuantLinear, check_mode, check_outlier_threshold, training_options
from .quantization_report import LayerReport, QuantizationReport, bytes_of, relative_error
from .weight_readers import reader_of

# A product below this size costs less than quantizing its input.
SMALLEST_WEIGHT = 128 * 128
SMALLEST_SIDE = 32

# The last layer decides between tokens or classes by small differences, and is a small part of the work.
HEAD_NAMES = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")

SHARED = "its weight is shared with another module"


def quantize_(
    model: nn.Module,
    mode: Mode = "dynamic",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    outlier_threshold: float | None = None,
    **training,
) -> QuantizationReport:
    """Replace the ``nn.Linear`` layers of ``model``, and the ``Conv1D`` of transformers' GPT-2 and its like, by
    :class:`mixft.nn.QuantLinear`, in place.

    Left alone, with the reason in the report: output heads (by name: lm_head, classifier, score, qa_outputs,
    embed_out), weights shared with another module such as an embedding, layers so small that int8 would be slower,
    layers with hooks or a ``forward`` of their own, and subclasses of ``nn.Linear``, whose own code may read the
    weight; so does ``nn.TransformerEncoderLayer``, whose layers are taken in the modes that keep int8 weights only
    after ``torch.backends.mha.set_fastpath_enabled(False)``, which such a model needs wherever it runs. In those modes
    a layer stays too whose weight the forward of a module around it reads, as its source says (``self.dense.weight``),
    and one in an adapter of PEFT, which is to be added afterwards; where other code does so, name the layer in
    ``exclude``. ``include`` names layers that are to be quantized although they are heads or small.

    Before ``save_pretrained`` of a model of transformers call :func:`mixft.huggingface.mark_quantized`, or what is
    saved loads as floats.

    In mode "train" the parameters stay the model's own, and an optimizer that holds them goes on. In the other modes a
    quantized weight is no parameter any more: an optimizer built before still holds the old one, and its steps change
    nothing in the model; build it after.

    Args:
        model: changed in place. A layer in ``train`` mode may be quantized again into another mode.
        mode: ``"weight_only"``, ``"dynamic"`` or ``"train"``.
        include: a glob of module names, or several; only those layers are taken.
        exclude: a glob of module names, or several; those layers are left.
        outlier_threshold: for mode "dynamic", see :class:`mixft.nn.QuantLinear`.
        training: for mode "train" the fields of :class:`mixft.nn.int8_training.TrainingOptions`: ``backward``,
            ``stochastic``, ``shape_gating``, ``min_sqnr``; for the others those of
            :class:`mixft.nn.frozen_training.FrozenOptions`: ``backward``, ``min_sqnr``.

    Raises:
        TypeError: ``model`` is no module, or an option that there is not.
        ValueError: an unknown mode; an outlier threshold that is not positive; that or training options in another
            mode; a pattern that matches no linear layer; ``model`` is itself a linear layer; no layer is left to
            quantize; a weight holds NaN or Inf. The model is then as it was.
    """
    check_outlier_threshold(outlier_threshold, mode)
    reasons = choose_layers(model, mode, include=include, exclude=exclude, **training)
    candidates = {name: model.get_submodule(name) for name in reasons}
    for name, module in candidates.items():
        if not reasons[name] and module.weight.is_meta:
            reasons[name] = "its weight is on the meta device, without values"
    if all(reasons.values()):
        raise ValueError(f"model has no layer to quantize ({why_none(reasons)})")
    options = {**training, "outlier_threshold": outlier_threshold}
    layers = {name: _converted(name, candidates[name], mode, options) for name, reason in reasons.items() if not reason}
    report = QuantizationReport(
        mode, [_report(name, candidates[name], layers.get(name), reasons[name]) for name in candidates]
    )
    replace_modules(model, {candidates[name]: layer for name, layer in layers.items()})
    return report


def choose_layers(
    model: nn.Module,
    mode: Mode = "dynamic",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **training,
) -> dict[str, str]:
    """The rules of :func:`quantize_`, with its arguments: {name of each linear layer: why it is left, or ""}.

    No weight is read, so ``model`` may be on the meta device.

    Raises:
        TypeError: ``model`` is no module, or an option that there is not.
        ValueError: an unknown mode; training options in another mode; a pattern that matches no linear layer; ``model``
            is itself a linear layer.
    """
    check_mode(mode)
    options = training_options(mode, training)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}")
    if is_linear(model):
        raise ValueError(
            "model is itself a linear layer, which cannot be replaced in place; use QuantLinear.from_linear"
        )
    candidates = {name: module for name, module in model.named_modules() if is_linear(module)}
    included = _matching("include", include, candidates)
    excluded = _matching("exclude", exclude, candidates)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    reasons = {}
    for name, module in candidates.items():
        if include is not None and name not in included:
            reasons[name] = "not in include"
        elif name in excluded:
            reasons[name] = "in exclude"
        else:
            shared = owners[id(module.weight)] > 1
            reasons[name] = _reason_to_leave(name, module, mode, options, model, shared, explicit=name in included)
    return reasons


def why_none(reasons: dict[str, str]) -> str:
    """The ``reasons`` of :func:`choose_layers` in a sentence: how many layers have each, and the first of them."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    shown = [
        f"{first!r} and {len(others)} more: {reason}" if others else f"{first!r}: {reason}"
        for reason, (first, *others) in layers.items()
    ]
    return "; ".join(shown) or "it has no linear layers"


def _as_globs(names: Iterable[str]) -> list[str]:
    """``names`` with a * for each number, once each: a hundred blocks in the few patterns that they are made of."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, of torch, of transformers or int8."""
    return isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module)


def dequantize_(model: nn.Module) -> list[str]:
    """Replace every :class:`mixft.nn.QuantLinear` of ``model`` by a plain ``nn.Linear``, in place.

    Weights kept in int8 come back in the dtype that they came from. A layer with a fused activation becomes a
    :class:`mixft.nn.Linear` with that activation, and one that was a ``Conv1D`` a ``Conv1D``: the state dict has the
    names and shapes that it had before :func:`quantize_`. Hooks go along. A weight that was frozen when it was
    quantized is frozen again; all others require a gradient.

    Returns:
        The names of the layers replaced.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is itself a QuantLinear, which cannot be replaced in place, or the ``forward`` of a layer
            was replaced on the layer itself. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}")
    if isinstance(model, QuantLinear):
        raise ValueError("model is itself a QuantLinear, which cannot be replaced in place; use its to_linear()")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in layers.items():
        if has_own_forward(layer):
            raise ValueError(
                f"the forward of layer {name!r} was replaced on the layer itself, which dequantize_ would lose; undo "
                "that first, after Accelerate with accelerate.hooks.remove_hook_from_module"
            )
    replace_modules(model, {layer: layer.to_linear() for layer in layers.values()})
    return list(layers)


def _matching(argument: str, patterns: str | Iterable[str] | None, names: Collection[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a glob or several; it is {patterns!r}")
    matched = set()
    for pattern in patterns:
        found = {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            listing = ", ".join(_as_globs(names))
            raise ValueError(f"{argument} pattern {pattern!r} matches none of the linear layers: {listing}")
        matched |= found
    return matched


def _reason_to_leave(
    name: str,
    module: nn.Module,
    mode: Mode,
    options: TrainingOptions | FrozenOptions,
    model: nn.Module,
    shared: bool,
    explicit: bool,
) -> str:
    if isinstance(module, QuantLinear):
        if module.mode == mode and (mode != "train" or module.int8_training.options == options):
            return f"already in mode {mode!r}"
        if module.mode != "train":
            return f"its weight is int8 ({module.mode}); dequantize_ the model first"
    elif type(module) not in (nn.Linear, Linear) and not is_conv1d(module):
        return f"a subclass of nn.Linear, {type(module).__name__}"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}"
    if has_hooks(module):
        return "it has hooks, which a replacement would lose"
    if has_own_forward(module):
        return "its forward was replaced on the layer itself, which a replacement would lose"
    if mode == "train" and getattr(module, "fuse_wgrad_accumulation", False):
        return "fuse_wgrad_accumulation is on, and int8 training gives weight.grad"
    if shared:
        return SHARED
    if mode != "train" and _is_in_adapter(name, model):
        return "an adapter of PEFT holds it, and may read its weight; quantize_ before get_peft_model"
    parent = model.get_submodule(name.rpartition(".")[0])
    if mode != "train" and isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight"
    if mode != "train" and isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return "nn.TransformerEncoderLayer reads its weight, unless torch.backends.mha.set_fastpath_enabled(False)"
    if mode != "train" and (reader := reader_of(name, model)):
        return f"{reader} reads its weight"
    if explicit or isinstance(module, QuantLinear):
        return ""
    if name.rsplit(".", 1)[-1] in HEAD_NAMES:
        return "an output head"
    if module.weight.numel() < SMALLEST_WEIGHT or min(module.weight.shape) < SMALLEST_SIDE:
        return f"too small to gain, {tuple(module.weight.shape)}"
    return ""


def _is_in_adapter(name: str, model: nn.Module) -> bool:
    """Whether a module around the layer ``name`` has a ``base_layer``, as every adapter of PEFT, and does not say that
    it takes an int8 one."""
    parts = name.split(".")
    for end in range(len(parts)):
        outer = model.get_submodule(".".join(parts[:end]))
        if "base_layer" in outer._modules:
            return parts[end:] != ["base_layer"] or not getattr(outer, "takes_int8_weight", False)
    return False


def _converted(name: str, module: nn.Linear | QuantLinear, mode: Mode, options: dict) -> QuantLinear:
    if not module.weight.isfinite().all():
        raise ValueError(f"the weight of layer {name!r} holds NaN or Inf; repair or exclude it")
    linear = module.to_linear() if isinstance(module, QuantLinear) else module
    layer = QuantLinear.from_linear(linear, mode, **options)
    layer.guard.name = name
    return layer


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands, with its hooks; a module in several places stays one."""
    for original, replacement in replacements.items():
        share_hooks(original, replacement)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


def _report(name: str, before: nn.Module, after: QuantLinear | None, reason: str) -> LayerReport:
    size = bytes_of(before)
    if after is None:
        return LayerReport(name, reason, size, size, 0.0)
    weight = before.weight.detach().float()
    if after.transposed:
        weight = weight.t()
    if after.mode == "train":
        after_weight = QuantLinear.from_linear(after.to_linear(), "dynamic").dequantized_weight()
    else:
        after_weight = after.dequantized_weight()
    return LayerReport(name, "", size, bytes_of(after), relative_error(after_weight.float(), weight))
