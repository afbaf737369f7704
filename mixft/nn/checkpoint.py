"""Quantized models as safetensors files.

The files hold the model's state dict, each stored tensor once. Their metadata names the format, the layers that are
:class:`mixft.nn.QuantLinear` with what is needed to rebuild them, the names that share another's tensor, and a checksum
of every tensor and of this description.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from mixft.ops.validation import FLOATS

from .conv1d import features, is_conv1d
from .int8_weight import SCALES
from .quant_linear import QuantLinear
from .quantization import is_linear, replace_modules
from .shards import TensorSet, open_tensors, parse_size, split, write_shards
from .tensor_file import CHECKSUMS, Entry

FORMAT = "mixft-quantized-2"
FIRST_FORMAT = "mixft-quantized-1"  # one file, without checksums; read, no longer written
EXTRA_STATE = "_extra_state"  # torch's name for what a module's get_extra_state gives
FIELDS = ("in_features", "out_features", "mode", "activation", "outlier_threshold")


def save_quantized(model: nn.Module, path: str | os.PathLike, max_shard_size: int | str | None = None) -> None:
    """Write the parameters and buffers of ``model`` to the safetensors file ``path``.

    Files are written under temporary names and renamed, so that ``path`` is never half a model.

    Args:
        model: with QuantLinear layers in it, on any device.
        path: the file.
        max_shard_size: bytes, or text such as "5GB"; a larger model is written to files such as
            ``model-00001-of-00003.safetensors`` and their index ``model.safetensors.index.json``, as Hugging Face does.

    Raises:
        ValueError: ``model`` has no QuantLinear or is one itself, or has extra state that is no tensor, or a sparse
            tensor; ``path`` is a folder or in one that does not exist; ``max_shard_size`` is no size. Nothing is
            written then.
    """
    path = Path(path)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("model has no QuantLinear layers; call mixft.quantize_(model) first, or save it as usual")
    if "" in layers:
        raise ValueError("model is itself a QuantLinear; save its state_dict as usual")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path must be a file in an existing folder; it is {str(path)!r}")
    tensors, aliases = _without_aliases(_tensors_of(model))
    description = {name: _described(layer) for name, layer in layers.items()}
    metadata = {
        "format": "pt",  # what transformers asks of a safetensors file
        "mixft": FORMAT,
        "layers": json.dumps(description),
        "aliases": json.dumps(aliases),
    }
    metadata["description_sha256"] = _description_checksum(metadata)
    entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
    write_shards(path, split(entries, limit), tensors.__getitem__, metadata)


def load_quantized(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load what :func:`save_quantized` wrote into ``model``, whose layers become int8 as they were saved.

    Every tensor is held to its checksum first, which finds damage and bytes changed by hand, at one to two GB/s.
    Checksums are no signature: whoever can rewrite the file can rewrite them.

    Args:
        model: built as the saved model was before ``quantize_``, on any device, with any weights; changed in place.
        path: as given to :func:`save_quantized`, whether it wrote one file or shards; or the index.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file and no index of its name.
        ValueError: a file is truncated, damaged, changed or foreign, a layer or tensor does not fit the model, two
            names of one tensor of the model have two different ones in the file, or the model is on the meta device;
            the message names it, and the model is as it was.
    """
    path = Path(path)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(f"model has {name!r} on the meta device; call model.to_empty(device=...) first")
    saved = open_tensors(path)
    layers, aliases = _description(saved)
    modules = dict(model.named_modules())
    entries = dict(saved.entries)
    replacements = {}
    try:
        for alias, name in aliases.items():
            entries[alias] = entries[name]
        for name, fields in layers.items():
            replacements[modules.get(name)] = _layer_like(modules.get(name), name, fields, saved.source)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{saved.source} has a damaged description of its layers: {error!r}") from error
    expected = _expected_state(model, replacements)
    _check_fit(expected, entries, saved.source)
    checksums = saved.checksums()
    tensors = {
        name: saved.tensor(name) if checksums is None else saved.verified(name, checksums[name])
        for name in saved.entries
    }
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    _check_ties(expected, tensors, saved.source)
    for original, layer in replacements.items():
        layer.to_empty(device=original.weight.device).train(original.training)
        _freeze_like(original, layer)
    replace_modules(model, replacements)
    model.load_state_dict(tensors)
    return model


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``; ValueError where something in it is no tensor."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model has the extra state {name!r}, a {type(value).__name__}, and a safetensors file holds tensors "
                "only; a get_extra_state that returns a tensor would do"
            )
        if value.layout != torch.strided:
            raise ValueError(
                f"model has {name!r}, a {value.layout} tensor, and a safetensors file holds dense ones only; keep its "
                "indices and values in buffers of their own, or make it persistent=False"
            )
    return state


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, each once, and {name: the name that its tensor is stored under} for the rest."""
    first, tensors, aliases = {}, {}, {}
    for name, tensor in state.items():
        # On the meta device no tensor has an address, and each is known by itself.
        key = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, aliases


def _description_checksum(metadata: dict) -> str:
    return hashlib.sha256(f"{metadata['layers']}\n{metadata['aliases']}".encode()).hexdigest()


def _description(saved: TensorSet) -> tuple[dict[str, dict], dict[str, str]]:
    """The layers and the aliases that the metadata holds."""
    metadata = saved.metadata
    found = metadata.get("mixft", metadata.get("format"))
    if found not in (FORMAT, FIRST_FORMAT):
        raise ValueError(f"{saved.source} is no file of mixft.save_quantized: its format is {found!r}, not {FORMAT!r}")
    try:
        if found == FORMAT and metadata["description_sha256"] != _description_checksum(metadata):
            raise ValueError("it does not have the checksum that it was saved with")
        layers, aliases = json.loads(metadata["layers"]), json.loads(metadata["aliases"])
        if found == FORMAT and CHECKSUMS not in metadata:
            raise KeyError(CHECKSUMS)
        if not all(isinstance(part, dict) for part in (layers, aliases)):
            raise TypeError("layers and aliases are to be objects")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{saved.source} has a damaged description of its layers: {error!r}") from error
    return layers, aliases


def _described(layer: QuantLinear) -> dict:
    fields = {field: getattr(layer, field) for field in FIELDS} | {"bias": layer.bias is not None}
    training = layer.training_options()
    return fields | {"training": training} if training else fields


def _layer_like(module: nn.Module | None, name: str, fields: dict, path: Path) -> QuantLinear:
    """An empty QuantLinear of the saved ``fields`` to stand in for ``module``."""
    if module is None or not is_linear(module):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{path} has an int8 layer {name!r}, where the model has {found}; build it as the saved one was"
        )
    found = (*features(module), module.bias is not None)
    saved = (fields["in_features"], fields["out_features"], fields["bias"])
    if found != saved:
        raise ValueError(
            f"layer {name!r} is (in, out, bias) = {saved} in {path} and {found} in the model; build it as the saved "
            "one was"
        )
    dtype = module.weight.dtype if module.weight.is_floating_point() else None
    if dtype not in (None, *FLOATS):
        raise ValueError(f"layer {name!r} is {dtype} in the model; torch.float32, float16 or bfloat16 would do")
    return QuantLinear(
        fields["in_features"],
        fields["out_features"],
        fields["bias"],
        fields["mode"],
        fields["activation"],
        device="meta",
        dtype=module.bias.dtype if module.bias is not None else dtype,
        outlier_threshold=fields.get("outlier_threshold"),
        transposed=is_conv1d(module) or getattr(module, "transposed", False),
        **fields.get("training", {}),
    )


def _expected_state(model: nn.Module, replacements: dict[nn.Module, QuantLinear]) -> dict[str, Tensor]:
    """The state dict that ``model`` will have once its layers are replaced, of its own tensors and not of views."""
    state = model.state_dict(keep_vars=True)
    for name, module in model.named_modules(remove_duplicate=False):
        if module in replacements:
            for key in module.state_dict():
                del state[f"{name}.{key}"]
            replaced = replacements[module].state_dict(keep_vars=True)
            state.update({f"{name}.{key}": tensor for key, tensor in replaced.items()})
    return state


def _check_fit(expected: dict[str, Tensor], found: dict[str, Entry], path: Path) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path} has no tensor {name!r}, which the model needs; build it as the saved one was")
        if _is_extra_state(name):
            continue
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} has shape {found[name].shape} in {path} and {tuple(tensor.shape)} in the model; "
                "build it as the saved one was"
            )
        # A floating-point tensor is cast to the model's dtype, but for scales, which are FP32 in any.
        floats = found[name].dtype.is_floating_point and tensor.dtype.is_floating_point
        if found[name].dtype != tensor.dtype and not (floats and name.rpartition(".")[2] not in SCALES):
            raise ValueError(
                f"tensor {name!r} is {found[name].dtype} in {path} and {tensor.dtype} in the model; build it as the "
                "saved one was"
            )
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise ValueError(f"{path} has a tensor {surplus[0]!r}, which the model lacks; build it as the saved one was")


def _check_ties(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError where two names of one tensor of the model have two different tensors in the file."""
    _, aliases = _without_aliases({name: tensor for name, tensor in expected.items() if not _is_extra_state(name)})
    for alias, name in aliases.items():
        if found[alias] is found[name]:
            continue
        dtype = expected[name].dtype
        if not torch.equal(found[alias].to(dtype), found[name].to(dtype)):
            raise ValueError(
                f"{path} has two different tensors {name!r} and {alias!r}, which are one in the model; build it as the "
                "saved one was, without the tie"
            )


def _is_extra_state(name: str) -> bool:
    """Whether ``name`` is what a module's ``get_extra_state`` gave, which may be of another shape from time to time."""
    return name.rpartition(".")[2] == EXTRA_STATE


def _freeze_like(original: nn.Module, layer: QuantLinear) -> None:
    """Let the parameters of ``layer`` require a gradient where those of ``original`` do, its weight once it has one."""
    requires_grad = getattr(original, "weight_requires_grad", original.weight.requires_grad)
    if layer.mode == "train":
        layer.weight.requires_grad_(requires_grad)
    else:
        layer.weight_requires_grad = requires_grad
    if layer.bias is not None:
        layer.bias.requires_grad_(original.bias.requires_grad)
