"""The tensors of a model folder as they lie in its files, int8 or not, and the layers that they belong to."""

import importlib
import json
from pathlib import Path

import torch

from mixft.cli import model_folder
from mixft.cli.errors import InputError
from mixft.cli.loading import Loading
from mixft.nn.shards import TensorSet, open_tensors

QUANT_METHOD = "mixft"  # in config.json's quantization_config, as mixft.huggingface writes it


def find_weights(name: str) -> Path:
    """The folder of ``minilm`` or of a path, with a configuration and safetensors in it.

    Raises:
        InputError: the folder or one of these is missing.
    """
    folder = model_folder.named_folder(name)
    model_folder.require_file(folder, ("config.json",), "config.json")
    if not any((folder / weights).is_file() for weights in model_folder.SAFETENSORS):
        pickled = next((weights for weights in model_folder.WEIGHTS if (folder / weights).is_file()), None)
        if pickled is None:
            raise InputError(f"the model folder {folder} has no weights (model.safetensors); save the model into it")
        raise InputError(
            f"the model in {folder} has {pickled}, a pickle, which is not read tensor by tensor; "
            "load it with from_pretrained and save it with save_pretrained, which writes safetensors"
        )
    return folder


def open_weights(folder: Path) -> TensorSet:
    """The headers of the folder's safetensors.

    Raises:
        InputError: a file is damaged, missing or not for this user to read.
    """
    try:
        return open_tensors(folder / model_folder.SAFETENSORS[0])
    except (ValueError, OSError) as error:
        raise InputError(f"the weights in {folder} do not load: {error}") from error


def prepare_int8(folder: Path) -> None:
    """Let transformers load an int8 folder, and hold each of its tensors to its checksum first, where it has one.

    Raises:
        InputError: a tensor has another; the message names it.
    """
    importlib.import_module("mixft.huggingface")  # registers mixft with transformers
    saved = open_weights(folder)
    try:
        for name, checksum in (saved.checksums() or {}).items():
            saved.verified(name, checksum)
    except ValueError as error:
        raise InputError(f"the weights in {folder} do not load: {error}") from error


def quantization_method(folder: Path) -> str | None:
    """The ``quant_method`` that the folder's config.json names; None where it names none.

    Raises:
        InputError: config.json is no JSON object.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        return settings.get("quant_method")
    except (ValueError, AttributeError) as error:
        raise InputError(f"config.json in {folder} does not load: {error}") from error


def is_int8_folder(folder: Path) -> bool:
    """True for a folder that ``mixft quantize`` or ``save_pretrained`` of an int8 model wrote."""
    return (folder / "config.json").is_file() and quantization_method(folder) == QUANT_METHOD


def names_in_files(saved: TensorSet, model: torch.nn.Module) -> dict[str, str]:
    """What ``saved`` calls the tensors of ``model``, by the model's own names, which transformers changes in time.

    It renames them as it loads. A tensor that it makes of others has no name here.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, loading.WeightRenaming)]
    conversions = [step for step in mapping if isinstance(step, loading.WeightConverter)]
    names = {}
    for name in saved.entries:
        renamed, conversion = loading.rename_source_key(name, renamings, conversions)
        if conversion is None:
            names[renamed] = name
    return names


def outline(folder: Path) -> torch.nn.Module:
    """The layers and shapes of the model that was saved in the folder, with no memory behind its weights.

    Raises:
        InputError: transformers has no such model, or it is quantized already.
    """
    method = quantization_method(folder)
    if method is not None:
        raise InputError(f"the model in {folder} is quantized already ({method}); give the one that it was made from")
    transformers = model_folder.quiet_transformers()
    with Loading(f"config.json in {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        if architecture is None:
            raise ValueError(f"transformers {transformers.__version__} has no {config.architectures[0]}")
        with torch.device("meta"):
            return architecture(config) if config.architectures else architecture.from_config(config)
