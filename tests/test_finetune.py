"""`mixft finetune` and `mixft predict` end to end, on a tiny model and file that the project has never seen."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny_bert import CLASSES, rows, save_tiny_bert, write_csv

from mixft.cli import main
from mixft.cli.dataset import load_dataset
from mixft.cli.model_folder import TOKENIZERS, quiet_transformers

PRECISIONS = ["fp32", "bf16", "fp16", "auto", "int8"]
ROWS, HELD_OUT, BATCH, EPOCHS = 193, 24, 8, 3
# As the installed command starts: without the current folder on the path.
START = "import sys; sys.path[:] = filter(None, sys.path); from mixft.cli import main; sys.exit(main())"
MIXFT = [sys.executable, "-c", START]
ENVIRONMENT = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
RUN_KEYS = {
    "precision",
    "seed",
    "steps",
    "train_seconds",
    "seconds_per_step_median",
    "tokens_per_second",
    "peak_memory_bytes",
    "model_bytes",
    "trained_parameters",
    "optimizer_bytes",
    "final_train_loss",
    "eval_accuracy",
    "eval_accuracy_int8",
    "eval_seconds",
    "eval_seconds_int8",
    "overflow_steps",
    "overflows",
    "precision_events",
    "losses",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    save_tiny_bert(folder / "model")
    write_csv(folder / "train.csv", rows(ROWS), header=("review", "verdict"))
    return folder


def command(folder, *more):
    return [
        *("finetune", "--model", str(folder / "model"), "--train", str(folder / "train.csv"), "--device", "cpu"),
        *("--text-column", "review", "--label-column", "verdict", "--batch-size", str(BATCH), "--max-length", "24"),
        *more,
    ]


@pytest.fixture(scope="module")
def finished(folder):
    """One run of every precision, by the installed command: its output folder, what it printed, its report."""
    (folder / "mixft" / "cli").mkdir(parents=True)  # as a checkout in the current folder: it must not be imported
    arguments = ("--precision", ",".join(PRECISIONS), "--epochs", str(EPOCHS), "--lr", "5e-3", "--seeds", "3")
    done = subprocess.run(
        [*MIXFT, *command(folder, *arguments, "--output", str(folder / "out"))],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done, json.loads((folder / "out" / "report.json").read_text())


def test_report(finished):
    _, _, report = finished
    assert set(report) == {"environment", "task", "runs"}
    assert report["environment"]["torch"] == torch.__version__
    assert report["task"]["labels"] == sorted(CLASSES.values())
    assert (report["task"]["train_examples"], report["task"]["eval_examples"]) == (ROWS - HELD_OUT, HELD_OUT)
    assert [run["precision"] for run in report["runs"]] == PRECISIONS
    for run in report["runs"]:
        assert set(run) == RUN_KEYS
        assert run["seed"] == 3
        assert run["steps"] == len(run["losses"]) == EPOCHS * math.ceil((ROWS - HELD_OUT) / BATCH)
        assert all(map(math.isfinite, run["losses"]))
        assert 0 < run["seconds_per_step_median"] < run["train_seconds"]
        assert run["peak_memory_bytes"] > run["model_bytes"] + run["optimizer_bytes"]


def test_every_precision_learns(finished):
    for run in finished[2]["runs"]:
        assert run["losses"][0] == pytest.approx(math.log(3), rel=0.5)
        assert run["final_train_loss"] < 0.2
        assert run["eval_accuracy"] == 1.0
        assert run["eval_accuracy_int8"] == 1.0
        assert 0 < run["eval_seconds"] < run["train_seconds"]
        assert 0 < run["eval_seconds_int8"] < run["train_seconds"]


def test_every_precision_sees_the_same_batches(finished):
    losses = {run["precision"]: run["losses"] for run in finished[2]["runs"]}
    for precision in PRECISIONS[1:]:
        count = 1 if precision in ("fp16", "auto") else 2  # its first steps are skipped until the loss scale fits
        assert losses[precision][:count] == pytest.approx(losses["fp32"][:count], abs=0.05)


def test_bytes_are_those_of_the_tensors(finished):
    runs = {run["precision"]: run for run in finished[2]["runs"]}
    model = quiet_transformers().AutoModelForSequenceClassification.from_pretrained(finished[0] / "fp32-seed3")
    count, tensors = model.num_parameters(), len(list(model.parameters()))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert runs["fp32"]["model_bytes"] == 4 * count + buffers
    assert runs["fp16"]["model_bytes"] == 2 * count + buffers
    assert runs["fp32"]["optimizer_bytes"] == 8 * count + 4 * tensors
    assert runs["fp16"]["optimizer_bytes"] >= 12 * count


@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_model_loads_and_is_the_trained_one(finished, folder, precision):
    transformers = quiet_transformers()
    saved = finished[0] / f"{precision}-seed3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {torch.nn.Linear}
    assert model.dtype == torch.float32
    _, held_out = load_dataset(str(folder / "train.csv"), None, "review", "verdict").split(3)
    with torch.no_grad():
        logits = model(**tokenizer(held_out.texts, padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[index] for index in logits.argmax(-1).tolist()] == held_out.labels


def test_table_and_curves(finished):
    out, done, _ = finished
    lines = done.stdout.splitlines()
    for precision in PRECISIONS:
        row = next(line for line in lines if line.startswith(precision))
        assert "x" in row
        assert row.count("100.0 ") == 2
    assert "1.00x" in next(line for line in lines if line.startswith("fp32"))
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "int8 seed 3" in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("options", [[], ["--int8"]])
def test_predict(finished, capsys, precision, options):
    saved = str(finished[0] / f"{precision}-seed3")
    assert main(["predict", saved, "the film of a bad\nscene", "good plot", *options, "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    label, probability, sentence = first.split("\t")
    assert (label, sentence) == ("nein", "the film of a bad scene")
    assert 0.5 < float(probability) <= 1
    assert second.startswith("ja, gern\t")


def test_predict_takes_the_int8_folder(finished, capsys):
    assert main(["predict", str(finished[0] / "int8-seed3" / "int8"), "a dull actor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("na ja\t")


def test_predict_names_the_models_of_an_output_folder(finished, capsys):
    assert main(["predict", str(finished[0]), "a dull actor"]) == 2
    assert "fp16-seed3" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [TOKENIZERS, ("model.safetensors",)], ids=["tokenizer", "weights"])
def test_predict_checks_the_only_model_of_an_output_folder(finished, tmp_path, capsys, missing):
    saved = shutil.copytree(finished[0] / "int8-seed3", tmp_path / "int8-seed3")
    assert main(["predict", str(tmp_path), "a dull actor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("na ja\t")
    for name in missing:
        (saved / name).unlink(missing_ok=True)
    assert main(["predict", str(tmp_path), "a dull actor", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert f"the model folder {saved} has no" in output.err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_existing_run_is_refused_untouched(finished, folder, capsys):
    before = contents(finished[0])
    assert main(command(folder, "--output", str(finished[0]))) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(command(folder, "--output", str(finished[0]), "--overwrite", "--max-length", "99")) == 2
    assert contents(finished[0]) == before


@pytest.mark.parametrize("missing", [("config.json",), TOKENIZERS], ids=["config", "tokenizer"])
def test_predict_needs_the_whole_int8_folder(finished, tmp_path, capsys, missing):
    saved = shutil.copytree(finished[0] / "int8-seed3" / "int8", tmp_path / "int8")
    for name in missing:
        (saved / name).unlink(missing_ok=True)
    assert main(["predict", str(saved), "a dull actor", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert str(saved) in output.err


@pytest.mark.parametrize(
    ("folder_name", "weights"), [("", "model.safetensors"), ("int8", "quantized.safetensors")], ids=["plain", "int8"]
)
@pytest.mark.parametrize("keep", [3, 1000, -1])
def test_predict_refuses_weights_cut_short(finished, tmp_path, capsys, folder_name, weights, keep):
    saved = shutil.copytree(finished[0] / "int8-seed3" / folder_name, tmp_path / "saved")
    content = (saved / weights).read_bytes()
    (saved / weights).write_bytes(content[:keep])
    assert main(["predict", str(saved), "a dull actor", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert str(saved) in output.err


def test_predict_refuses_weights_of_another_shape(finished, tmp_path, capsys):
    saved = shutil.copytree(finished[0] / "fp32-seed3", tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    for options, named in ([], "has shape (64,)"), (["--int8"], "does not load"):
        if options:
            shutil.copy(saved / "config.json", saved / "int8" / "config.json")
        assert main(["predict", str(saved), "a dull actor", "--device", "cpu", *options]) == 2
        output = capsys.readouterr()
        assert (output.out, output.err.count("\n")) == ("", 1)
        assert named in output.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run(folder, tmp_path, sent):
    (old := tmp_path / "fp32-seed1" / "train.log").parent.mkdir()
    old.write_text("old")
    options = ("--precision", "fp32", "--epochs", "200000", "--output", str(tmp_path), "--overwrite")
    arguments = command(folder, *options)
    # A job in a shell's background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*MIXFT, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FORCE_COLOR": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    shown = ""
    while "tokens/s" not in shown and process.poll() is None:
        shown += process.stderr.read(1)
    process.send_signal(sent)
    assert "stopped during fp32 seed 1" in process.stderr.read()  # ends once the run's process has let go of it
    assert process.wait() == 130
    assert contents(tmp_path) == {old: b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["fp32-seed1"]
