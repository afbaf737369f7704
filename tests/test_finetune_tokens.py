"""Texts that a tokenizer makes nothing of: named before anything is written; special tokens are enough for it."""

import json

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv
from tiny_causal import save_tiny_causal, write_documents

from mixft.cli import main
from mixft.cli.errors import InputError
from mixft.cli.model_folder import load_tokenizer, quiet_transformers
from mixft.cli.tokens import check_tokens

DROPPED = "\u200b\u2060"  # of no width; BERT's normalizer takes them out, str.strip() does not

pytestmark = pytest.mark.usefixtures("without_interpreter")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Its tokenizer adds no special tokens, and drops what BERT's drops."""
    from tokenizers import Tokenizer, normalizers

    folder = save_tiny_causal(tmp_path_factory.mktemp("gpt2") / "model", "gpt2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder)(DROPPED)["input_ids"] == []
    return folder


def refused(capsys, arguments, *named):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for words in (repr(DROPPED), "makes no token", *named):
        assert words in captured.err


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_finetune_names_the_file_and_the_text(gpt2, tmp_path, capsys, task, where):
    files = {}
    for name in ("train", "eval"):
        if task == "causal-lm":
            files[name] = write_documents(tmp_path / f"{name}.txt", 1200)
            lines = files[name].read_text(encoding="utf-8").splitlines()
            if name == where:
                lines[1100:1100] = [DROPPED, f" {DROPPED} "]
            files[name].write_text("\n".join(lines), encoding="utf-8")
        else:
            content = rows(1200)
            if name == where:
                content[1100:1102] = [(DROPPED, content[1100][1]), (f"{DROPPED} ", content[1101][1])]
            files[name] = write_csv(tmp_path / f"{name}.csv", content)
    options = ["--task", task, "--train", files["train"], "--eval", files["eval"], "--output", tmp_path / "out"]
    refused(capsys, ["finetune", "--model", gpt2, *options], f"{files[where]}: ", "2 of the texts", "text 1101,")
    assert not (tmp_path / "out").exists()


def test_predict_names_the_sentence(gpt2, tmp_path, capsys):
    transformers = quiet_transformers()
    classifier = tmp_path / "classifier"
    transformers.AutoModelForSequenceClassification.from_pretrained(gpt2, num_labels=2).save_pretrained(classifier)
    load_tokenizer(gpt2).save_pretrained(classifier)
    for folder in (gpt2, classifier):
        refused(capsys, ["predict", folder, "fog", DROPPED, "--device", "cpu"], "SENTENCE", "text 2,")


def test_special_tokens_count_where_they_are_added(tmp_path):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path / "model"))
    check_tokens(tokenizer, "train.csv", ["film", DROPPED], special=True)
    with pytest.raises(InputError, match=r"^train.txt: .* no token of 1 of the texts, the first of them text 2,"):
        check_tokens(tokenizer, "train.txt", ["film", DROPPED], special=False)


def test_special_tokens_are_enough(tmp_path, capsys):
    """A BERT sees [CLS] and [SEP] whatever the text is, and learns from those."""
    folder, out = save_tiny_bert(tmp_path / "model"), tmp_path / "out"
    content = [(DROPPED, label) for _, label in rows(24)]
    train = write_csv(tmp_path / "train.csv", content)
    options = ["--precision", "fp32", "--max-steps", "1", "--device", "cpu", "--output", out]
    assert main(["finetune", "--model", str(folder), "--train", str(train), *map(str, options)]) == 0
    assert json.loads((out / "report.json").read_text())["runs"][0]["steps"] == 1
    capsys.readouterr()
    assert main(["predict", str(out), DROPPED, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith(f"\t{DROPPED}\n")
