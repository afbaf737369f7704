"""Model folders that do not load, or would load as another model than was saved: refused in one line, exit code 2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import rows, save_tiny_bert, write_csv
from tiny_causal import save_tiny_causal

from mixft.cli import main, model_folder
from mixft.cli.errors import InputError
from mixft.cli.loading import Loading

LABELS = ["no", "yes"]


@pytest.fixture
def model(tmp_path):
    return save_tiny_bert(tmp_path / "model")


def set_config(model: Path, **settings) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


FILES = {
    "tokenizer of no JSON": ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "the tokenizer in"),
    "tokenizer of another kind": ("tokenizer.json", b'{"model": 1, "added_tokens": []}', "the tokenizer in"),
    "tokenizer settings in a list": ("tokenizer_config.json", b"[]", "the tokenizer in"),
    "words that are not UTF-8": ("vocab.txt", b"[PAD]\n[UNK]\ncaf\xe9\n", "the tokenizer in"),
    "no words": ("vocab.txt", b"", "the tokenizer in"),
    "settings in a list": ("config.json", b"[]", "does not load"),
    "settings that are not UTF-8": ("config.json", b'{"model_type": "b\xe9rt"}', "does not load"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(case, model, tmp_path, capsys):
    name, content, named = FILES[case]
    (model / name).write_bytes(content)
    refused(model, tmp_path, capsys, named)


@pytest.mark.parametrize(
    "settings", [{"num_attention_heads": 5}, {"hidden_size": "thirty-two"}, {"hidden_act": "nonesuch"}]
)
def test_settings_that_make_no_model(settings, model, tmp_path, capsys):
    set_config(model, **settings)
    refused(model, tmp_path, capsys, "does not load")


def refused(model, tmp_path, capsys, named):
    train, out = write_csv(tmp_path / "train.csv", rows(20)), tmp_path / "out"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = ["--model", str(model), "--train", str(train), "--device", "cpu", "--precision", "fp32"]
    assert main(["finetune", *arguments, "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert str(model) in error
    assert not out.exists()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("without_interpreter")
def test_weights_that_only_the_run_finds_damaged(model, tmp_path, capsys):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"junk")
    refused(model, tmp_path, capsys, "does not load")


def test_weights_of_other_shapes_are_not_made_up(model):
    set_config(model, hidden_size=64)
    with pytest.raises(InputError, match=r"shape .*32.* and .*64.* by its config.json"):
        model_folder.load_classifier(model, LABELS)


def test_weights_of_another_model_are_not_made_up(model, tmp_path):
    other = save_tiny_causal(tmp_path / "gpt2", "gpt2") / "model.safetensors"
    (model / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=r"another model .* 'bert'"):
        model_folder.load_classifier(model, LABELS)


def test_a_head_that_was_not_trained_labels_nothing(model):
    set_config(model, architectures=["BertForSequenceClassification"], id2label={"0": "no", "1": "yes"})
    with pytest.raises(InputError, match=r"no tensor 'classifier\.bias'"):
        model_folder.load_classifier(model)


def test_a_head_of_other_labels_is_replaced(model, tmp_path):
    model_folder.load_classifier(model, LABELS).save_pretrained(tmp_path / "trained")
    again = model_folder.load_classifier(tmp_path / "trained", ["a", "b", "c"])
    assert again.classifier.out_features == 3


def test_a_part_that_was_not_trained_may_be_missing(model):
    path = model / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("pooler")}
    save_file(kept, path, {"format": "pt"})
    loaded = model_folder.load_classifier(model, LABELS).bert
    assert torch.equal(loaded.embeddings.word_embeddings.weight, kept["embeddings.word_embeddings.weight"])


def test_a_fault_of_the_program_stays_one():
    for kind in (AssertionError, KeyboardInterrupt):
        with pytest.raises(kind), Loading("the model"):
            raise kind
    with pytest.raises(InputError, match=r"^the model does not load: EOFError$"), Loading("the model"):
        raise EOFError
