"""save_quantized and load_quantized: exact round trips, and files that do not fit leave the model as it was."""

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mixft
from mixft.nn import QuantLinear
from mixft.nn.shards import parse_size
from mixft.nn.tensor_file import DTYPES, Entry, storage_order, write_tensors


class Model(nn.Module):
    def __init__(self, hidden=160):
        super().__init__()
        self.embedding = nn.Embedding(150, 128)
        self.up = nn.Linear(128, hidden)
        self.down = nn.Linear(hidden, 128, bias=False)
        self.norm = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 150)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.down(torch.relu(self.up(self.embedding(tokens))))))


def state_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "train"])
def test_round_trip_is_exact(tmp_path, mode):
    model = Model().eval()
    tokens = torch.randint(0, 150, (9,))
    mixft.quantize_(model, mode)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    torch.manual_seed(1)
    loaded = mixft.load_quantized(Model().eval(), path)
    assert isinstance(loaded.up, QuantLinear)
    assert loaded.up.mode == mode
    assert not loaded.training
    assert not loaded.up.training
    assert loaded.head.weight is loaded.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_training_options_come_back_and_unknown_ones_are_named(tmp_path):
    model = Model()
    mixft.quantize_(model, "train", backward="16bit", min_sqnr=None)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    loaded = mixft.load_quantized(Model(), path)
    assert loaded.up.int8_training.options == model.up.int8_training.options
    rewritten(path, describe("up", training={"telepathy": True}))
    refused_unchanged(path, "damaged description of its layers.*telepathy")


def test_a_tied_tensor_is_stored_once(tmp_path):
    model = Model()
    mixft.quantize_(model)
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert ("embedding.weight" in stored) != ("head.weight" in stored)


def test_loading_into_an_already_quantized_model(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    other = Model()
    mixft.quantize_(other)
    mixft.load_quantized(other, path)
    assert torch.equal(other.up.weight, model.up.weight)


def rewritten(path, change):
    """Rewrite the file with its tensors and metadata changed by ``change``."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    if "layers" in metadata and "aliases" in metadata:  # as somebody would who can rewrite the file
        described = f"{metadata['layers']}\n{metadata['aliases']}"
        metadata["description_sha256"] = hashlib.sha256(described.encode()).hexdigest()
    save_file(tensors, path, metadata)


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def replace(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def describe(name, **fields):
    def change(tensors, metadata):
        layers = json.loads(metadata["layers"])
        layers.setdefault(name, dict(layers["up"])).update(fields)
        metadata["layers"] = json.dumps(layers)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("down.weight_scale"), "has no tensor 'down.weight_scale'"),
        (replace("up.weight", torch.zeros(3, 128, dtype=torch.int8)), r"'up.weight' has shape \(3, 128\)"),
        (replace("up.weight", torch.zeros(160, 128)), "'up.weight' is torch.float32"),
        (replace("up.weight_scale", torch.ones(160, 1).half()), "'up.weight_scale' is torch.float16"),
        (replace("up.weight_scale", torch.ones(160, 1).int()), "'up.weight_scale' is torch.int32"),
        (replace("norm.running_mean", torch.zeros(128).int()), "'norm.running_mean' is torch.int32"),
        (
            replace("stranger", torch.zeros(1)),
            "has a tensor 'stranger', which the model lacks; build it as the saved one was",
        ),
        (describe("up", in_features=64), r"layer 'up' is \(in, out, bias\) = \(64, 160, True\)"),
        (describe("middle"), "'middle', where the model has no such module"),
        (describe("norm"), "'norm', where the model has a BatchNorm1d"),
        (lambda tensors, metadata: metadata.update(mixft="other"), "its format is 'other'"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    rewritten(path, change)
    target = Model()
    before, modules = state_bits(target), list(target.modules())
    with pytest.raises(ValueError, match=message):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_truncated_a_foreign_and_a_missing_file(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            mixft.load_quantized(Model(), path)
    path.write_text("not a model")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        mixft.load_quantized(Model(), path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mixft.load_quantized(Model(), tmp_path / "nowhere")


def test_saving_is_refused_by_name_and_an_old_file_survives_a_failure(tmp_path, monkeypatch):
    model = Model()
    with pytest.raises(ValueError, match="no QuantLinear layers"):
        mixft.save_quantized(model, tmp_path / "model.safetensors")
    mixft.quantize_(model)
    with pytest.raises(ValueError, match="path must be a file"):
        mixft.save_quantized(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_text("precious")

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        mixft.save_quantized(model, path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: metadata.pop("layers"),
        lambda tensors, metadata: metadata.pop("aliases"),
        lambda tensors, metadata: metadata.update(layers="{"),
        lambda tensors, metadata: metadata.update(layers="[]"),
        lambda tensors, metadata: metadata.pop("sha256"),
        lambda tensors, metadata: metadata.update(layers='{"up": {}}'),
        lambda tensors, metadata: metadata.update(aliases='{"head.weight": "nowhere"}'),
    ],
)
def test_a_damaged_description_is_named_and_changes_nothing(tmp_path, change):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    rewritten(path, change)
    target = Model()
    modules = list(target.modules())
    with pytest.raises(ValueError, match="damaged description of its layers"):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules


def test_meta_models_and_bare_layers_are_refused_and_frozen_biases_stay_frozen(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="model is itself a QuantLinear"):
        mixft.save_quantized(QuantLinear(4, 4), path)
    model = Model()
    mixft.quantize_(model)
    mixft.save_quantized(model, path)
    with pytest.raises(ValueError, match="on the meta device"):
        mixft.load_quantized(Model().to("meta"), path)
    frozen = Model().requires_grad_(False)
    mixft.load_quantized(frozen, path)
    assert not frozen.up.bias.requires_grad


def test_the_file_has_the_usual_permissions(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    mixft.save_quantized(model, path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_file_of_the_first_format_loads(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    first = {"format": "mixft-quantized-1", "layers": metadata["layers"], "aliases": metadata["aliases"]}
    save_file(load_file(path), path, first)
    loaded = mixft.load_quantized(Model(), path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def refused_unchanged(path, message):
    """load_quantized refuses with ``message`` and leaves the model as it was, modules and bits."""
    target = Model()
    before, modules = state_bits(target), list(target.modules())
    with pytest.raises(ValueError, match=message):
        mixft.load_quantized(target, path)
    assert list(target.modules()) == modules
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_model_in_a_dtype_that_int8_layers_lack_is_refused(tmp_path):
    model = Model()
    mixft.quantize_(model)
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    target = Model().double()
    modules = list(target.modules())
    with pytest.raises(ValueError, match=r"layer 'up' is torch\.float64 in the model"):
        mixft.load_quantized(target, tmp_path / "model.safetensors")
    assert list(target.modules()) == modules


@pytest.mark.parametrize("checksums", ["[]", "{", "{}"])
def test_damaged_checksums(tmp_path, checksums):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    rewritten(path, lambda tensors, metadata: metadata.update(sha256=checksums))
    refused_unchanged(path, "damaged checksums")


@pytest.mark.parametrize("name", ["up.weight", "up.weight_scale", "norm.running_mean", "norm.num_batches_tracked"])
@pytest.mark.parametrize("limit", [None, "30KB"])
def test_one_flipped_bit_is_found_in_the_tensor_that_has_it(tmp_path, name, limit):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path, limit)
    if limit is not None:
        path = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + end) // 2] ^= 1
    path.write_bytes(data)
    refused_unchanged(tmp_path / "model.safetensors", f"tensor '{name}'.*does not have its checksum")


def test_a_changed_description_and_a_changed_dtype_are_found(tmp_path):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path)
    saved = path.read_bytes()
    path.write_bytes(saved.replace(b'\\"dynamic\\"', b'\\"weight_\\"', 1))
    refused_unchanged(path, "does not have the checksum that it was saved with")
    path.write_bytes(saved.replace(b'"norm.running_mean":{"dtype":"F32"', b'"norm.running_mean":{"dtype":"I32"', 1))
    refused_unchanged(path, r"tensor 'norm.running_mean' is torch.int32")
    # Two dtypes of one size that both fit a model are told apart by the checksum.
    halves = [Entry("mean", dtype, (4,)).checksum(memoryview(bytes(8))) for dtype in (torch.float16, torch.bfloat16)]
    assert halves[0] != halves[1]


@pytest.mark.parametrize("mode", ["dynamic", "train"])
def test_shards_hold_every_tensor_once_within_the_limit_and_load(tmp_path, mode):
    model = Model().eval()
    mixft.quantize_(model, mode)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path, max_shard_size=90_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(os.listdir(tmp_path)) == [*shards, "model.safetensors.index.json"]
    assert len(shards) > 1
    found = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 90_000
        assert {index["weight_map"][name] for name in tensors} == {shard}
        found |= tensors
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for given in (path, tmp_path / "model.safetensors.index.json"):
        loaded = mixft.load_quantized(Model().eval(), given)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_of_many_tensors_is_opened_a_few_times(tmp_path, monkeypatch):
    """To open a file takes time for every tensor in it."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(50)))
    mixft.quantize_(model)
    mixft.save_quantized(model, tmp_path / "model.safetensors")
    opened = []
    monkeypatch.setattr("mixft.nn.tensor_file.safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    mixft.load_quantized(nn.Sequential(*(nn.Linear(128, 128) for _ in range(50))), tmp_path / "model.safetensors")
    assert 0 < len(opened) <= 3


def edit_index(path, change):
    index = path.with_name(f"{path.name}.index.json")
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shard_of(path, "up.weight").unlink(), "which is not there; it has '"),
        (lambda path: shard_of(path, "up.weight").write_bytes(b"short"), "truncated or no safetensors file"),
        (lambda path: edit_index(path, lambda index: index["weight_map"].pop("up.bias")), "no tensor 'up.bias'"),
        (lambda path: edit_index(path, lambda index: index.pop("weight_map")), "damaged index"),
        (lambda path: edit_index(path, lambda index: index.update(metadata=3)), "damaged index"),
        (
            lambda path: edit_index(path, lambda index: index["weight_map"].update({"up.bias": "../other"})),
            "tensor 'up.bias' is in '../other', which is no file name",
        ),
        (lambda path: path.with_name(f"{path.name}.index.json").write_text("{"), "damaged index"),
        (lambda path: save_file({"stranger": torch.zeros(1)}, shard_of(path, "up.weight")), "has no tensor '"),
    ],
)
def test_damaged_shards_are_named_and_change_nothing(tmp_path, damage, message):
    model = Model()
    mixft.quantize_(model)
    path = tmp_path / "model.safetensors"
    mixft.save_quantized(model, path, "30KB")
    damage(path)
    refused_unchanged(path, message)


def shard_of(path, name):
    return path.parent / json.loads(path.with_name(f"{path.name}.index.json").read_text())["weight_map"][name]


def test_a_shard_of_another_save_is_found(tmp_path):
    """Of the same model with other weights: names, shapes and lengths all fit."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model = Model()
        mixft.quantize_(model)
        mixft.save_quantized(model, tmp_path / name / "model.safetensors", "30KB")
    path = tmp_path / "a" / "model.safetensors"
    shard_of(tmp_path / "b" / "model.safetensors", "up.weight").replace(shard_of(path, "up.weight"))
    refused_unchanged(path, "tensor 'up.*of another save")


@pytest.mark.parametrize("limits", [(None, "30KB"), ("30KB", "60KB"), ("30KB", None), ("30KB", "30KB")])
def test_a_save_replaces_the_set_before_it_or_leaves_it_whole(tmp_path, monkeypatch, limits):
    old, new = Model(), Model()
    mixft.quantize_(old)
    mixft.quantize_(new)
    path = tmp_path / "model.safetensors"
    (tmp_path / "model-notes.safetensors").write_text("not of this set")
    mixft.save_quantized(old, path, limits[0])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    move = os.replace
    moves = []

    def failing(source, target):
        moves.append(target)
        if len(moves) == at:
            raise OSError("no space left on device")
        move(source, target)

    at = None
    monkeypatch.setattr("os.replace", failing)
    mixft.save_quantized(new, path, limits[1])
    total = len(moves)
    assert torch.equal(mixft.load_quantized(Model(), path).up.weight, new.up.weight)
    written = {name for name in os.listdir(tmp_path) if name != "model-notes.safetensors"}
    assert len(written) == 1 if limits[1] is None else "model.safetensors.index.json" in written
    mixft.save_quantized(old, path, limits[0])
    for at in range(1, total + 1):  # noqa: B007, read by failing
        moves.clear()
        with pytest.raises(OSError, match="no space left"):
            mixft.save_quantized(new, path, limits[1])
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_sizes(tmp_path):
    sizes = {"5GB": 5 * 10**9, "512MiB": 2**29, "1.5 kb": 1500, "7": 7, 90: 90}
    assert {given: parse_size(given) for given in sizes} == sizes
    model = Model()
    mixft.quantize_(model)
    for given in ("5 bananas", "", "-1GB", 0, True, 1.5):
        with pytest.raises(ValueError, match=f"{given!r} is no size"):
            mixft.save_quantized(model, tmp_path / "model.safetensors", given)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_safetensors_package_reads_what_is_written(tmp_path, dtype):
    """Odd sizes, none at all, a scalar and a transposed view, each beside bytes that would misalign it."""
    bits = {
        "odd": torch.randint(0, 256, (17, 3 * dtype.itemsize), dtype=torch.uint8),
        "one byte": torch.ones(3, dtype=torch.uint8),
        "none": torch.zeros(0, 4 * dtype.itemsize, dtype=torch.uint8),
    }
    if dtype == torch.bool:
        bits = {name: values % 2 for name, values in bits.items()}
    tensors = {name: values if name == "one byte" else values.view(dtype) for name, values in bits.items()}
    tensors["scalar"] = tensors["odd"][0, 0]
    tensors["transposed"] = tensors["odd"].t()
    entries = storage_order([Entry.of(name, tensor) for name, tensor in tensors.items()])
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, entries, (tensors[entry.name] for entry in entries), {"key": "value"})
    header = path.read_bytes()[8:]
    fields = json.JSONDecoder().raw_decode(header[: header.index(b"}}") + 2].decode())[0]
    for name, tensor in tensors.items():
        assert fields[name]["data_offsets"][0] % tensor.dtype.itemsize == 0
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        same = loaded[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*same)


def test_a_tensor_unlike_its_entry_and_a_dtype_without_a_name_are_refused(tmp_path):
    path = tmp_path / "tensors.safetensors"
    entry = Entry.of("a", torch.zeros(3))
    with pytest.raises(ValueError, match=r"'a' is torch\.float32"):
        write_tensors(path, [entry], [torch.zeros(4)], {})
    with pytest.raises(ValueError, match=r"'c' is torch\.complex128"):
        write_tensors(path, [Entry.of("c", torch.zeros(2, dtype=torch.complex128))], [], {})
