"""Quantized models as safetensors files.

The file holds the model's state dict, each stored tensor once. Its metadata names the format, the layers that are
:class:`mixft.nn.QuantLinear` with what is needed to rebuild them, and the names that share another's tensor.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .quant_linear import QuantLinear
from .quantization import replace_modules

FORMAT = "mixft-quantized-1"
FIELDS = ("in_features", "out_features", "mode", "activation")


def save_quantized(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the parameters and buffers of ``model`` to the safetensors file ``path``.

    The file is written under a temporary name and renamed, so that ``path`` is never half a model.

    Raises:
        ValueError: ``model`` has no QuantLinear or is one itself; ``path`` is a folder or in one that does not exist.
    """
    path = Path(path)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("model has no QuantLinear layers; call mixft.quantize_(model) first, or save it as usual")
    if "" in layers:
        raise ValueError("model is itself a QuantLinear; save its state_dict as usual")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path must be a file in an existing folder; it is {str(path)!r}")
    tensors, aliases = _without_aliases(model.state_dict())
    description = {
        name: {**{field: getattr(layer, field) for field in FIELDS}, "bias": layer.bias is not None}
        for name, layer in layers.items()
    }
    metadata = {"format": FORMAT, "layers": json.dumps(description), "aliases": json.dumps(aliases)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(usual)  # safetensors writes files that nobody else can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_quantized(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a file of :func:`save_quantized` into ``model``, whose layers become int8 as they were saved.

    Args:
        model: built as the saved model was before ``quantize_``, on any device, with any weights; changed in place.
        path: the safetensors file.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or foreign, a layer or tensor does not fit the model, or the model is
            on the meta device; the message names it, and the model is as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path {str(path)!r} is not a file; mixft.save_quantized(model, path) writes one")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"model has {name!r} on the meta device; call model.to_empty(device=...) first")
    metadata, tensors = _read(path)
    modules = dict(model.named_modules())
    replacements = {}
    try:
        for alias, name in json.loads(metadata["aliases"]).items():
            tensors[alias] = tensors[name]
        for name, fields in json.loads(metadata["layers"]).items():
            replacements[modules.get(name)] = _layer_like(modules.get(name), name, fields, path)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged description of its layers: {error!r}") from error
    _check_fit(_expected_state(model, replacements), tensors, path)
    for original, layer in replacements.items():
        layer.to_empty(device=original.weight.device).train(original.training)
        if layer.bias is not None:
            layer.bias.requires_grad_(original.bias.requires_grad)
    replace_modules(model, replacements)
    model.load_state_dict(tensors)
    return model


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors, each once, and {name: the name that its tensor is stored under} for the rest."""
    first, tensors, aliases = {}, {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            # A view of part of a larger storage would be refused by safetensors when another view of it is saved too.
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise ValueError(f"{path} is no file of mixft.save_quantized: its format is {found!r}, not {FORMAT!r}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _layer_like(module: nn.Module | None, name: str, fields: dict, path: Path) -> QuantLinear:
    """An empty QuantLinear of the saved ``fields`` to stand in for ``module``."""
    if not isinstance(module, (nn.Linear, QuantLinear)):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{path} has an int8 layer {name!r}, where the model has {found}")
    found = (module.in_features, module.out_features, module.bias is not None)
    saved = (fields["in_features"], fields["out_features"], fields["bias"])
    if found != saved:
        raise ValueError(f"layer {name!r} is (in, out, bias) = {saved} in {path} and {found} in the model")
    dtype = module.weight.dtype if module.weight.is_floating_point() else None
    return QuantLinear(
        fields["in_features"],
        fields["out_features"],
        fields["bias"],
        fields["mode"],
        fields["activation"],
        device="meta",
        dtype=module.bias.dtype if module.bias is not None else dtype,
    )


def _expected_state(model: nn.Module, replacements: dict[nn.Module, QuantLinear]) -> dict[str, Tensor]:
    """The state dict that ``model`` will have once its layers are replaced."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in replacements:
            for key in module.state_dict():
                del state[f"{name}.{key}"]
            state.update({f"{name}.{key}": tensor for key, tensor in replacements[module].state_dict().items()})
    return state


def _check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path} has no tensor {name!r}, which the model needs")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(found[name].shape)} in {path} and {tuple(tensor.shape)} in the model"
            )
        if (found[name].dtype == torch.int8) != (tensor.dtype == torch.int8):
            raise ValueError(f"tensor {name!r} is {found[name].dtype} in {path} and {tensor.dtype} in the model")
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise ValueError(f"{path} has a tensor {surplus[0]!r}, which the model lacks")
