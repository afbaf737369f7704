"""`mixft quantize`: the values of quantize_, whatever the source's files; in little memory; whole or not at all."""

import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import rows, save_tiny_bert, write_csv

import mixft
from mixft.cli import main
from mixft.cli.model_folder import quiet_transformers
from mixft.cli.new_folder import new_folder
from mixft.nn import QuantLinear

WIDTH = 128  # the least at which quantize_ takes a layer unasked


@pytest.fixture(autouse=True)
def cpu_routines(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def tiny_llama(folder, dtype=torch.float32, max_shard_size="5GB", **settings):
    transformers = quiet_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH + 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_text("not of the model")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def quantize(*arguments):
    return main(["quantize", *map(str, arguments)])


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def expected(folder, **arguments):
    """The state dict that quantize_ makes of the folder's model, and its report."""
    model = quiet_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    report = mixft.quantize_(model, **arguments)
    return model.state_dict(), report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("source_shards", "shards"), [("5GB", "5GB"), ("200KB", "70KB")])
def test_tensors_are_those_of_quantize_(tmp_path, capsys, dtype, source_shards, shards):
    source = tiny_llama(tmp_path / "model", dtype, source_shards)
    assert ((source / "model.safetensors.index.json").exists()) == (source_shards != "5GB")
    assert quantize(source, tmp_path / "out", "--mode", "dynamic", "--max-shard-size", shards) == 0
    state, report = expected(source, mode="dynamic")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert str(report) in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "optimizer.pt" not in files
    assert {"config.json", "generation_config.json", "tokenizer.json"} < files
    assert ("model.safetensors" in files) == (shards == "5GB")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    settings = after.pop("quantization_config")
    assert before == after
    assert (settings["quant_method"], settings["mode"]) == ("mixft", "dynamic")
    assert [f"model.{name}" for name in settings["layers"]] == [layer.name for layer in report.quantized]


def test_include_exclude_and_the_json_report(llama, tmp_path):
    """A head, too, where it is included: its 99 rows are no multiple of what keeps the file's alignment."""
    patterns = ["--include", "*.gate_proj", "--include", "lm_head", "--exclude", "*.1.*"]
    options = ["--mode", "weight_only", "--json", tmp_path / "report.json"]
    assert quantize(llama, tmp_path / "out", *patterns, *options) == 0
    state, report = expected(llama, mode="weight_only", include=["*.gate_proj", "lm_head"], exclude="*.1.*")
    found = tensors_of(tmp_path / "out")
    assert [name for name, tensor in found.items() if tensor.dtype == torch.int8] == [
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["mode"] == "weight_only"
    for row, layer in zip(written["layers"], report.layers, strict=True):
        assert row == {**vars(layer), "error": pytest.approx(layer.error, rel=1e-5)}


def test_a_model_saved_without_its_head_and_a_tied_head(tmp_path, capsys):
    """The files name the tensors of the base model, config.json the model with the head, whose weight is nowhere."""
    source = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    stored = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in stored
    bare = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    assert quantize(source, tmp_path / "out") == 0
    found = tensors_of(tmp_path / "out")
    assert found["layers.1.self_attn.q_proj.weight"].dtype == torch.int8
    assert found.keys() - bare.keys() == {name + "_scale" for name, t in found.items() if t.dtype == torch.int8}
    assert "its weight is shared with another module" in capsys.readouterr().out


MEASURE = """
import sys
from pathlib import Path
from mixft.cli import model_folder, quantize_folder

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

plan = quantize_folder.plan(Path(sys.argv[1]), "weight_only", None, None)
quantize_folder.int8_weight_of(__import__("torch").zeros(8, 8))  # what loads at first use
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
quantize_folder.write(plan, Path(sys.argv[2]), 5 * 10**9)
print(status("VmHWM") - before)
"""


def test_memory_holds_a_few_tensors_and_not_the_model(tmp_path):
    """Peak of the resident set above its start, in a process of its own: 100 MB in one shard, tensors of 4 MB."""
    transformers = quiet_transformers()
    width, layers = 1024, 4
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        outline = transformers.LlamaForCausalLM(config)
    source, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    config.save_pretrained(source)
    square = torch.randn(width, width)
    shapes = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
    tensors = {
        name: (square if shape == (width, width) else torch.ones(shape)).clone() for name, shape in shapes.items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    del tensors
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", MEASURE, str(source), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert size > 110e6
    assert int(done.stdout) < size / 2
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < size / 3


def refused(capsys, arguments, *named):
    assert quantize(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mixft: ")
    assert captured.err.count("\n") == 1
    for words in named:
        assert words in captured.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--mode", "train"], ["--mode", "'train'", "weight_only", "dynamic"]),
        (["--include", "nothing.*"], ["--include", "'nothing.*'", "lm_head"]),
        (["--exclude", "*"], ["no layer to quantize", "in exclude"]),
        (["--max-shard-size", "big"], ["--max-shard-size", "'big'", "5GB"]),
        (["--json", "/nowhere/report.json"], ["--json", "/nowhere/report.json"]),
    ],
)
def test_bad_options_are_named_and_write_nothing(llama, tmp_path, capsys, options, named):
    refused(capsys, [llama, tmp_path / "out", *options], *named)
    assert os.listdir(tmp_path) == []


def without_weights(source):
    (source / "model.safetensors").unlink()


def pickled(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def edit_config(**changes):
    def edit(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_weight(name, change):
    def edit(source):
        tensors = load_file(source / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, source / "model.safetensors", {"format": "pt"})

    return edit


def drop_weight(source):
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def cut_short(source):
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-4])


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_weights, ["no weights", "model.safetensors"]),
        (pickled, ["pytorch_model.bin", "save_pretrained"]),
        (cut_short, ["model.safetensors", "truncated"]),
        (drop_weight, ["'model.layers.1.mlp.up_proj.weight'", "--exclude"]),
        (lambda source: (source / "config.json").write_text("{"), ["config.json"]),
        (lambda source: (source / "config.json").write_text("[]"), ["config.json"]),
        (edit_config(architectures=["LlamaForTelepathy"]), ["LlamaForTelepathy"]),
        (edit_config(quantization_config={"quant_method": "mixft"}), ["quantized already"]),
        (edit_config(intermediate_size=130), ["'model.layers.0.mlp.gate_proj.weight'", "(258, 128)", "(130, 128)"]),
        (edit_weight(f"{QUERY}.weight", lambda weight: weight.to(torch.int32)), [f"{QUERY}.weight", "int32"]),
        (edit_weight(f"{QUERY}.weight", lambda weight: weight * float("nan")), [QUERY, "NaN or Inf"]),
    ],
)
def test_a_bad_source_is_named_and_leaves_no_trace(llama, tmp_path, capsys, damage, named):
    source = shutil.copytree(llama, tmp_path / "model")
    damage(source)
    old = tmp_path / "out"
    assert quantize(llama, old) == 0
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    capsys.readouterr()
    assert quantize(source, old, "--overwrite") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(words in error for words in named), error
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_weights_that_may_not_be_read(llama, tmp_path, capsys, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mixft.cli.stored_weights.open_tensors", denied)
    refused(capsys, [llama, tmp_path / "out"], str(llama), "Permission denied")


def test_the_output_folder(llama, tmp_path, capsys):
    refused(capsys, [llama, llama], "lie in one another")
    refused(capsys, [llama, llama / "int8"], "lie in one another")
    refused(capsys, [llama, llama.parent], "lie in one another")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    refused(capsys, [llama, tmp_path / "notes"], "no int8 model of mixft")
    refused(capsys, [llama, tmp_path / "notes", "--overwrite"], "no int8 model of mixft")
    refused(capsys, [llama, tmp_path / "notes" / "mine.txt"], "no int8 model of mixft")
    (tmp_path / "out").mkdir()
    assert quantize(llama, tmp_path / "out") == 0
    refused_without_overwrite = [llama, tmp_path / "out", "--mode", "weight_only"]
    capsys.readouterr()
    refused(capsys, refused_without_overwrite, "--overwrite")
    assert quantize(*refused_without_overwrite, "--overwrite") == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["mode"] == "weight_only"
    assert sorted(os.listdir(tmp_path)) == ["notes", "out"]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "notes").stat().st_mode
    assert "10" in capsys.readouterr().err  # the lines of progress


def test_what_a_killed_command_left_goes_and_what_a_running_one_writes_stays(llama, tmp_path):
    for name in (".out.killed00.part", ".out.running0.part", ".outer.killed00.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    # Its lock is gone when it is; one in this process counts as another's.
    running = os.open(tmp_path / ".out.running0.part", os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    with new_folder(tmp_path / "out", llama, False, 0) as draft:
        with new_folder(tmp_path / "out", llama, False, 0):
            assert draft.is_dir()
        shutil.rmtree(tmp_path / "out")
    os.close(running)
    assert sorted(os.listdir(tmp_path)) == [".out.running0.part", ".outer.killed00.part", "out"]


def test_from_pretrained_and_predict_take_the_folder_and_finetune_does_not(tmp_path, capsys):
    """A classifier; predict also finds a changed tensor, which transformers does not look for."""
    source, out = save_tiny_bert(tmp_path / "model", hidden_size=128), tmp_path / "out"
    transformers = quiet_transformers()
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_pretrained(source).save_pretrained(source)
    assert quantize(source, out, "--max-shard-size", "100KB") == 0
    importlib.import_module("mixft.huggingface")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    expected = transformers.AutoModelForSequenceClassification.from_pretrained(source)
    mixft.quantize_(expected)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    capsys.readouterr()
    assert main(["predict", str(out), "a good film", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\ta good film\n")
    train = write_csv(tmp_path / "train.csv", rows(20))
    assert main(["finetune", "--model", str(out), "--train", str(train), "--output", str(tmp_path / "runs")]) == 2
    assert "int8 weights, which do not train" in capsys.readouterr().err
    index = json.loads((out / "model.safetensors.index.json").read_text())
    name = "bert.encoder.layer.1.output.dense.weight"
    shard = out / index["weight_map"][name]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert main(["predict", str(out), "a good film", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not have its checksum" in captured.err


SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}


def roberta_and_input(transformers):
    """Its output head ``lm_head.decoder`` is tied to the embedding."""
    config = transformers.RobertaConfig(vocab_size=99, max_position_embeddings=32, **SIZES)
    return transformers.RobertaForMaskedLM(config), {"input_ids": torch.arange(2, 12)[None]}


def vit_and_input(transformers):
    """transformers calls its layers otherwise in files than in the model."""
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.mark.parametrize("make", [roberta_and_input, vit_and_input])
def test_models_whose_files_name_or_tie_weights_otherwise(tmp_path, make):
    model, inputs = make(quiet_transformers())
    model.save_pretrained(tmp_path / "model")
    assert quantize(tmp_path / "model", tmp_path / "out") == 0
    importlib.import_module("mixft.huggingface")
    loaded = type(model).from_pretrained(tmp_path / "out")
    expected = type(model).from_pretrained(tmp_path / "model")
    quantized = [layer.name for layer in mixft.quantize_(expected).quantized]
    assert [name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)] == quantized
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected(**inputs).logits)


def test_transformers_that_is_too_old_is_named(llama, tmp_path):
    check = (
        "import sys, transformers; transformers.__version__ = '4.57.1'; from mixft.cli import main; "
        f"sys.exit(main(['quantize', {str(llama)!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "4.57.1" in done.stderr


def test_a_full_disk_is_found_before_anything_is_written(llama, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(capsys, [llama, tmp_path / "out"], "1,000 left")
    assert os.listdir(tmp_path) == []
