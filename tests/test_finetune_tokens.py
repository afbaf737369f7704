"""Texts that a tokenizer makes nothing of, or knows little of: named before anything is written.

Special tokens are enough for a text, but not for all texts.
"""

import json

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv
from tiny_causal import documents, save_tiny_causal, write_documents

from mixft.cli import main
from mixft.cli.errors import InputError
from mixft.cli.model_folder import load_classifier, load_tokenizer, quiet_transformers
from mixft.cli.tokens import check_tokens, warn_of_unknown

DROPPED = "\u200b\u2060"  # of no width; BERT's normalizer takes them out, str.strip() does not
FOREIGN = "le petit prince"

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
            content = [(text, label) for text, (_, label) in zip(documents(1200), rows(1200), strict=True)]
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
    """A BERT sees [CLS] and [SEP] whatever the text is, and learns from those; of unknown words one line warns."""
    folder, out = save_tiny_bert(tmp_path / "model"), tmp_path / "out"
    content = [("petit film" if number < 6 else DROPPED, label) for number, (_, label) in enumerate(rows(24))]
    train = write_csv(tmp_path / "train.csv", content)
    options = ["--precision", "fp32", "--max-steps", "1", "--device", "cpu", "--output", out]
    assert main(["finetune", "--model", str(folder), "--train", str(train), *map(str, options)]) == 0
    assert json.loads((out / "report.json").read_text())["runs"][0]["steps"] == 1
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith(f"mixft: warning: {train}: 50.0% of the tokens are unknown ([UNK]) to the tokenizer in ")
    assert f" in {folder}, " in warning
    assert main(["predict", str(out), "film", DROPPED, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(f"\t{DROPPED}\n")
    assert captured.err == ""
    assert main(["predict", str(out), "film", "le petit", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\tle petit\n")
    assert captured.err.startswith("mixft: warning: SENTENCE...: 66.7% of the tokens are unknown ([UNK]) to the token")
    assert captured.err.count("\n") == 1
    assert str(out) in captured.err


@pytest.mark.parametrize("text", [FOREIGN, DROPPED])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_file_of_unknown_words_alone_teaches_nothing(tmp_path, capsys, where, text):
    folder, files = save_tiny_bert(tmp_path / "model"), {}
    for name in ("train", "eval"):
        content = [(text, label) for _, label in rows(24)] if name == where else rows(24)
        files[name] = write_csv(tmp_path / f"{name}.csv", content)
    options = ["--train", files["train"], "--eval", files["eval"], "--output", tmp_path / "out"]
    assert main(["finetune", "--model", str(folder), *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mixft: {files[where]}: the tokenizer in {folder} knows no word of the texts")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("unknown", "warned"), [(1, False), (2, True), (9, True)])
def test_the_share_of_unknown_tokens(gpt2, capsys, unknown, warned):
    """Of all tokens, over every chunk of texts; special tokens are not among them."""
    tokenizer = load_tokenizer(gpt2)
    texts = ["petit"] * (unknown * 150) + ["fog fog"] * ((10 - unknown) * 75)
    share = check_tokens(tokenizer, "train.txt", texts, special=False)
    assert share == unknown / 10
    warn_of_unknown(share, tokenizer, "train.txt", gpt2)
    error = capsys.readouterr().err
    expected = f"mixft: warning: train.txt: {unknown}0.0% of the tokens are unknown (<?>) to the tokenizer in {gpt2}"
    assert error.startswith(expected) if warned else error == ""


def test_special_tokens_are_no_known_words(tmp_path):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path / "model"))
    assert check_tokens(tokenizer, "train.csv", ["petit film"], special=True) == 0.5
    assert check_tokens(tokenizer, "train.csv", [DROPPED, DROPPED], special=True) == 1.0


def test_a_tokenizer_without_an_unknown_token_knows_all(gpt2):
    tokenizer = load_tokenizer(gpt2)
    tokenizer.unk_token = None
    assert tokenizer.unk_token_id is None
    assert check_tokens(tokenizer, "train.txt", ["fog petit"], special=False) == 0.0


def test_tokens_that_the_model_lacks_are_refused_and_words_that_no_text_has_are_not(tmp_path, capsys):
    folder = save_tiny_bert(tmp_path / "model")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "\nnew")
    tokenizer = load_tokenizer(folder)
    assert check_tokens(tokenizer, "train.csv", ["film", "plot"], special=True, vocabulary=size) == 0.0
    with pytest.raises(InputError, match=f"^train.csv: .* token number {size}, .* vocab_size {size};"):
        check_tokens(tokenizer, "train.csv", ["film", "new plot"], special=True, vocabulary=size)
    train = write_csv(tmp_path / "train.csv", [*rows(20), ("a new film", "nein")])
    arguments = ["finetune", "--model", folder, "--train", train, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    assert f"token number {size}," in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    load_classifier(folder, ["no", "yes"]).save_pretrained(folder)
    assert main(["predict", str(folder), "a new film", "--device", "cpu"]) == 2
    assert f"token number {size}," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("special", "token", "word"),
    [
        (True, "sep_token", "[SEP]"),
        (True, "pad_token", "film"),
        (False, "pad_token", "fog"),
        (False, "eos_token", "fog"),
    ],
)
def test_tokens_that_are_added_count(gpt2, tmp_path, special, token, word):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path / "model") if special else gpt2)
    setattr(tokenizer, token, word)
    number = getattr(tokenizer, f"{token}_id")
    check_tokens(tokenizer, "train.csv", [], special=special, vocabulary=number + 1)
    with pytest.raises(InputError, match=f"token number {number},"):
        check_tokens(tokenizer, "train.csv", [], special=special, vocabulary=number)
