"""What ``mixft quantize`` does: choose the layers, stream the weights, and let the new folder appear whole.

The layers are chosen by the rules of ``mixft.quantize_`` on the model's outline, which has shapes and no weights. The
new folder has the tensors of the old one under their names, but for each quantized layer ``X`` the int8 ``X.weight``
[out, in] and the FP32 ``X.weight_scale`` [out, 1], and its config.json says which layers these are. The weight of a
``Conv1D``, which GPT-2 and its like have as [in, out], is turned on the way.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from mixft.cli import stored_weights
from mixft.cli.errors import InputError
from mixft.cli.model_folder import SAFETENSORS
from mixft.cli.output_file import write_whole
from mixft.cli.progress import ByteProgress
from mixft.huggingface import Int8Config
from mixft.huggingface.quantizer import choose_unread_layers
from mixft.nn.conv1d import features, is_conv1d
from mixft.nn.int8_weight import int8_weight_of
from mixft.nn.quantization import why_none
from mixft.nn.quantization_report import LayerReport, QuantizationReport
from mixft.nn.shards import TensorSet, split, write_shards
from mixft.nn.tensor_file import Entry
from mixft.ops.validation import FLOATS

COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Plan:
    """What is to become of a model folder.

    Attributes:
        folder: the model.
        saved: its tensors.
        names: what each of them is called in the files, by its name in the model.
        settings: of config.json's ``quantization_config``.
        layers: the tensor that is the weight of each layer to quantize, by the layer's name in the model.
        reasons: why each other linear layer is left.
        outline: the model's layers and shapes, on the meta device.
    """

    folder: Path
    saved: TensorSet
    names: dict[str, str]
    settings: dict
    layers: dict[str, str]
    reasons: dict[str, str]
    outline: torch.nn.Module

    def entries(self) -> list[Entry]:
        """The tensors of the new folder."""
        layers = {weight: self.outline.get_submodule(layer) for layer, weight in self.layers.items()}
        made = []
        for name, entry in self.saved.entries.items():
            if name in layers:
                inputs, outputs = features(layers[name])
                made += [
                    Entry(name, torch.int8, (outputs, inputs)),
                    Entry(_scale(name), torch.float32, (outputs, 1)),
                ]
            else:
                made.append(entry)
        return made

    def bytes_after(self) -> int:
        """Of all tensors of the new folder."""
        return sum(entry.nbytes for entry in self.entries())


def plan(folder: Path, mode: str, include: list[str] | None, exclude: list[str] | None) -> Plan:
    """Choose the layers; reads no weight.

    Raises:
        InputError: a damaged file, a model that is quantized already or that transformers has no outline of, a pattern
            that matches nothing, no layer to quantize, or a layer whose weight is not in the files or does not fit.
    """
    saved = stored_weights.open_weights(folder)
    outline = stored_weights.outline(folder)
    try:
        reasons = choose_unread_layers(outline, mode, include=include or None, exclude=exclude or None)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    chosen = [name for name, reason in reasons.items() if not reason]
    if not chosen:
        raise InputError(f"the model in {folder} has no layer to quantize ({why_none(reasons)})")
    prefix = f"{outline.base_model_prefix}."
    names = stored_weights.names_in_files(saved, outline)
    layers = {name: _weight_of(name, outline.get_submodule(name), prefix, names, saved) for name in chosen}
    relative = [name.removeprefix(prefix) for name in chosen]
    settings = Int8Config(mode, include or None, exclude or None, relative).to_dict()
    left = {name: reason for name, reason in reasons.items() if reason}
    return Plan(folder, saved, names, settings, layers, left, outline)


def _weight_of(name: str, layer: torch.nn.Module, prefix: str, names: dict[str, str], saved: TensorSet) -> str:
    """The name of the layer's weight in the files."""
    found = _stored(f"{name}.weight", prefix, names)
    if found is None:
        raise InputError(
            f"{saved.source} has no tensor {name + '.weight'!r}, which config.json calls for; --exclude {name}"
        )
    entry, shape = saved.entries[found], tuple(layer.weight.shape)
    if entry.shape != shape:
        raise InputError(
            f"tensor {found!r} has shape {entry.shape} in {saved.source} and {shape} by config.json; save the model "
            "again"
        )
    if entry.dtype not in FLOATS:
        raise InputError(f"tensor {found!r} in {saved.source} is {entry.dtype}; FP32, FP16 or BF16 would do")
    return found


def _stored(name: str, prefix: str, names: dict[str, str]) -> str | None:
    """The name in the files of the tensor ``name`` of the model: the base model may have been saved without a head."""
    candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((names[candidate] for candidate in candidates if candidate in names), None)


def write(plan: Plan, folder: Path, max_shard_size: int) -> QuantizationReport:
    """Stream the tensors of ``plan`` into the empty ``folder``, with all else that belongs to the model.

    Raises:
        InputError: a weight to quantize holds NaN or Inf, or a file of the source is damaged.
    """
    quantized = {weight: layer for layer, weight in plan.layers.items()}
    errors: dict[str, float] = {}
    waiting: dict[str, torch.Tensor] = {}  # scales whose weight is written, or the other way round

    def tensor(name: str) -> torch.Tensor:
        if name in waiting:
            return waiting.pop(name)
        weight = name if name in quantized else name.removesuffix("_scale")
        if weight not in quantized:
            return plan.saved.tensor(name)
        pair = _quantized(weight, quantized[weight], plan, errors)
        waiting.update(pair)
        return waiting.pop(name)

    with ByteProgress("quantizing", plan.bytes_after()) as bar:
        sizes = {entry.name: entry.nbytes for entry in plan.entries()}
        try:
            write_shards(
                folder / SAFETENSORS[0],
                split(plan.entries(), max_shard_size),
                tensor,
                {"format": "pt"},
                on_written=lambda name: bar.advance(sizes[name]),
            )
        except (ValueError, OSError) as error:
            raise InputError(f"the model in {plan.folder} was not quantized: {error}") from error
    _copy_the_rest(plan, folder)
    return _report(plan, errors)


def _quantized(weight: str, layer: str, plan: Plan, errors: dict[str, float]) -> dict[str, torch.Tensor]:
    stored = plan.saved.tensor(weight)
    original = stored.t() if is_conv1d(plan.outline.get_submodule(layer)) else stored
    try:
        values, scale = int8_weight_of(original)
    except ValueError as error:
        raise InputError(f"the weight of layer {layer!r} holds NaN or Inf; repair it or --exclude {layer}") from error
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    for rows in range(0, len(original), 256):  # in parts, as FP32 copies of it all would be the largest of the tensors
        part = slice(rows, rows + 256)
        exact = original[part].float()
        squares[0] += norm((values[part] * scale[part]).to(original.dtype).float() - exact) ** 2
        squares[1] += norm(exact) ** 2
    errors[layer] = (squares[0] / squares[1]).sqrt().item() if squares[1] > 0 else 0.0
    return {weight: values, _scale(weight): scale}


def _scale(weight: str) -> str:
    return f"{weight}_scale"


def _copy_the_rest(plan: Plan, folder: Path) -> None:
    for pattern in COPIED:
        for path in plan.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    config = json.loads((plan.folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = plan.settings
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _report(plan: Plan, errors: dict[str, float]) -> QuantizationReport:
    """A row for every linear layer of the model: its weight and bias, before and after."""
    prefix = f"{plan.outline.base_model_prefix}."
    layers = []
    for name, module in plan.outline.named_modules():
        if name not in plan.layers and name not in plan.reasons:
            continue
        names = [_stored(f"{name}.{kind}", prefix, plan.names) for kind, _ in module.named_parameters(recurse=False)]
        before = {stored: plan.saved.entries[stored].nbytes for stored in names if stored is not None}
        after = sum(before.values())
        if name in plan.layers:
            weight = plan.saved.entries[plan.layers[name]]
            after += weight.nbytes // weight.dtype.itemsize + 4 * features(module)[1] - weight.nbytes
        layers.append(LayerReport(name, plan.reasons.get(name, ""), sum(before.values()), after, errors.get(name, 0.0)))
    return QuantizationReport(plan.settings["mode"], layers)


def write_report(report: QuantizationReport, source: Path, out: Path, file: Path) -> None:
    """The report as JSON."""
    content = {
        "model": str(source),
        "output": str(out),
        "mode": report.mode,
        "layers": [asdict(l) for l in report.layers],
    }
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
