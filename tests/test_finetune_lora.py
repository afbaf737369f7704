"""`mixft finetune --lora`: what is trained and what is frozen, what is saved, and that predict takes all of it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_bert import rows, save_tiny_bert, write_csv
from tiny_causal import WORDS, save_tiny_causal, write_documents

from mixft.cli import main, model_folder, saved_model
from mixft.cli.job import Job, Recipe
from mixft.cli.lora import add_adapters
from mixft.cli.model_folder import quiet_transformers
from mixft.cli.training import run
from mixft.nn import QuantLinear

RANK = 4


pytestmark = pytest.mark.usefixtures("without_interpreter", "one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_tiny_bert(folder / "bert")
    for kind in ("gpt2", "llama"):
        save_tiny_causal(folder / kind, kind)
    write_csv(folder / "train.csv", rows(193))
    write_documents(folder / "train.txt", 150)
    return folder


def trained(folder, output, kind, precision, **changes):
    """A run in this process: its entry in the report."""
    causal = kind != "bert"
    fields = {
        "task": "causal-lm" if causal else "classification",
        "model": str(folder / kind),
        "train": str(folder / ("train.txt" if causal else "train.csv")),
        "eval": None,
        "text_column": None if causal else "text",
        "label_column": None if causal else "label",
        "epochs": 8,
        "max_steps": None,
        "batch_size": 8,
        "grad_accumulation": 1,
        "max_length": 16,
        "learning_rate": 2e-2,
        "master_weights": "auto",
        "state_dtype": "fp32",
        "lora": RANK,
        "lora_alpha": 2.0 * RANK,
        "device": "cpu",
    }
    return run(Job(Recipe(**{**fields, **changes}), precision, 1, str(output)), lambda *_, **__: None)


def expected_trained(folder, kind):
    """Of A and B beside each linear layer below the head, and of a classifier's head."""
    config = quiet_transformers().AutoConfig.from_pretrained(folder / kind)
    width = 32
    if kind == "bert":
        inner, outer = 2 * width, width
        layer = 4 * (width + width) + 2 * (inner + outer)
        return RANK * (2 * layer + (width + width)) + 3 * (width + 1)  # the pooler too
    if kind == "gpt2":
        return RANK * 2 * ((width + 3 * width) + (width + width) + 2 * (width + 4 * width))
    half = width * config.num_key_value_heads // config.num_attention_heads
    return RANK * 2 * (2 * (width + width) + 2 * (width + half) + 3 * (width + 2 * width))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("bert", "fp32"),
        ("bert", "bf16"),
        ("bert", "int8"),
        ("llama", "fp32"),
        ("llama", "int8"),
        ("gpt2", "fp32"),
        ("gpt2", "int8"),
    ],
)
def test_adapters_learn_on_frozen_weights_and_what_is_saved_predicts(folder, tmp_path, capsys, kind, precision):
    output = tmp_path / "out"
    entry = trained(folder, output, kind, precision)
    assert entry["trained_parameters"] == expected_trained(folder, kind)
    if kind == "bert":
        assert entry["eval_accuracy"] > 0.9
        assert entry["optimizer_bytes"] < 9 * entry["trained_parameters"]
        text, answer = "the plot of a bad scene", "nein\t"
    else:
        assert entry["eval_perplexity"] < 3.5
        text, answer = "rain snow wind", f"rain snow wind\t{WORDS[4]}"
    loader = "AutoModelForSequenceClassification" if kind == "bert" else "AutoModelForCausalLM"
    plain = getattr(quiet_transformers(), loader).from_pretrained(output)
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    assert not hasattr(plain.config, "quantization_config")
    options = ["--max-new-tokens", "1"] if kind != "bert" else []
    for saved in (output, output / "adapter", *([output / "int8"] if (output / "int8").is_dir() else [])):
        assert main(["predict", str(saved), text, *options, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith(answer), saved


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_merged_model_is_the_trained_one(folder, tmp_path, kind, precision):
    """Against W + alpha / rank B A in FP64, from the files: W dequantized where it was frozen in int8."""
    from safetensors.torch import load_file

    output = tmp_path / "out"
    trained(folder, output, kind, precision, max_steps=12)
    adapters = {
        name: tensor.double() for name, tensor in load_file(output / "adapter/adapter_model.safetensors").items()
    }
    before, after = load_file(folder / kind / "model.safetensors"), load_file(output / "model.safetensors")
    if kind == "bert":
        before = {f"bert.{name}": tensor for name, tensor in before.items()}
    changed = 0
    for name, weight in before.items():
        a = adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        if a is None:
            assert torch.equal(after[name], weight), name
            continue
        exact = weight.double()
        if precision == "int8":
            scale = exact.abs().amax(1, keepdim=True) / 127
            exact = (exact / scale).round() * scale
        exact += 2 * b @ a
        # A weight halfway between two steps may be rounded to either.
        close = (after[name].double() - exact).abs() <= 1e-6 * exact.abs().max()
        assert close.double().mean() > 0.999, name
        changed += not torch.equal(after[name], weight)
    assert changed == sum("lora_A" in name for name in adapters)
    adapted = saved_model.load(output / "adapter", "cpu").model
    assert any(isinstance(module, QuantLinear) for module in adapted.modules()) == (precision == "int8")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_frozen_model_s_own_dropout_is_off(folder, kind):
    causal = kind == "gpt2"
    path = folder / kind
    model = model_folder.load_causal_lm(path) if causal else model_folder.load_classifier(path, ["no", "yes"])
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 0.5
    adapted = add_adapters(model, "causal-lm" if causal else "classification", "fp32", RANK, 2.0 * RANK).train()
    assert dropouts
    tokens = torch.tensor([[2, 7, 5, 9, 4]])
    assert torch.equal(adapted(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


@pytest.fixture(scope="module")
def finished(folder):
    """By the installed command: int8 adapters on a folder of mixft quantize, whose weights were never in FP32 here."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    start = "import sys; from mixft.cli import main; sys.exit(main())"
    save_tiny_bert(folder / "wide", hidden_size=128)
    assert main(["quantize", str(folder / "wide"), str(folder / "frozen")]) == 0
    arguments = ["--model", str(folder / "frozen"), "--train", str(folder / "train.csv"), "--precision", "int8"]
    arguments += ["--epochs", "5", "--batch-size", "8", "--lr", "5e-3", "--lora", str(RANK), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", start, "finetune", *arguments, "--output", str(folder / "out")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_adapters_on_an_int8_folder(finished, capsys):
    report = json.loads((finished / "report.json").read_text())
    assert (report["task"]["lora"], report["task"]["lora_alpha"]) == (RANK, 2 * RANK)
    assert report["runs"][0]["eval_accuracy"] > 0.9
    for saved in (finished, finished / "int8-seed1" / "adapter", finished / "int8-seed1" / "int8"):
        assert main(["predict", str(saved), "the plot of a bad scene", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.startswith("nein\t"), saved
    assert "quantization_config" not in json.loads((finished / "int8-seed1" / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "rate"), [([], 1e-4), (["--lora", "8"], 1e-3), (["--lora", "8", "--lr", "2e-4"], 2e-4)]
)
def test_adapters_have_a_learning_rate_of_their_own_by_default(folder, tmp_path, monkeypatch, options, rate):
    rates = []
    monkeypatch.setattr("mixft.cli.runs.run_all", lambda jobs, *_: rates.append(jobs[0].recipe.learning_rate) or 0)
    files = ["--model", str(folder / "bert"), "--train", str(folder / "train.csv"), "--output", str(tmp_path / "out")]
    assert main(["finetune", *files, "--precision", "int8", *options]) == 0
    assert rates == [rate]


def refused(capsys, arguments, *named):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for words in named:
        assert words in captured.err


def test_adapters_without_their_model_and_damaged_ones(finished, folder, tmp_path, capsys):
    saved = shutil.copytree(finished / "int8-seed1" / "adapter", tmp_path / "adapter")
    settings = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere"}))
    refused(capsys, ["predict", saved, "a film", "--device", "cpu"], str(saved), "/nowhere")
    (saved / "adapter_config.json").write_text(json.dumps(settings))
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(capsys, ["predict", saved, "a film", "--device", "cpu"], str(saved))
    (saved / "config.json").unlink()
    refused(capsys, ["predict", saved, "a film", "--device", "cpu"], str(saved), "config.json")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lora", "0"], ["--lora", "'0'"]),
        (["--lora-alpha", "8"], ["--lora-alpha", "--lora RANK"]),
        (["--lora", "4", "--lora-alpha", "-1"], ["--lora-alpha", "'-1'"]),
        (["--lora", "4", "--precision", "fp32,fp16"], ["--lora", "fp16", "bf16"]),
        (["--lora", "4", "--precision", "auto"], ["--lora", "auto", "int8"]),
    ],
)
def test_bad_options_are_named(folder, tmp_path, capsys, options, named):
    arguments = ["finetune", "--model", folder / "bert", "--train", folder / "train.csv", "--output", tmp_path / "out"]
    refused(capsys, [*arguments, *options], *named)
    assert not (tmp_path / "out").exists()


def test_an_int8_folder_takes_adapters_in_int8_alone(finished, folder, tmp_path, capsys):
    arguments = [
        "finetune",
        "--model",
        folder / "frozen",
        "--train",
        folder / "train.csv",
        "--output",
        tmp_path / "out",
    ]
    for options in ([], ["--lora", "4"], ["--precision", "int8"]):
        refused(capsys, [*arguments, *options], "--lora 8 --precision int8")


def test_missing_peft_is_named(folder, capsys, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else find_spec(name))
    arguments = ["finetune", "--model", folder / "bert", "--train", folder / "train.csv", "--lora", "4"]
    refused(capsys, arguments, "peft", "pip install")
