"""``mixft predict``: labels of sentences by a model that ``mixft finetune`` saved, in int8 or not."""

from pathlib import Path
from typing import Annotated

import typer

from mixft.cli import model_folder
from mixft.cli.device import Device, choose_device
from mixft.cli.errors import InputError
from mixft.cli.tokens import check_tokens, warn_of_unknown

BATCH = 32
NEW_TOKENS = 40


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, or the int8 or adapter folder in one.")],
    sentences: Annotated[list[str], typer.Argument(metavar="SENTENCE...", help="Texts to label or to go on with.")],
    int8: Annotated[bool, typer.Option("--int8", help="Use the int8 copy in DIR.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that a causal language model adds; default 40.")
    ] = None,
    device: Device = None,
) -> None:
    """Print label, probability and sentence, or the sentence and how it goes on, a line each, tabs between."""
    for number, sentence in enumerate(sentences, start=1):
        if not sentence.strip():
            raise InputError(f"sentence {number} is empty; give some text")
    folder = _model_in(folder)
    if int8 and not model_folder.has_quantized_file(folder):
        folder = folder / model_folder.QUANTIZED
        if not model_folder.has_quantized_file(folder):
            raise InputError(
                f"--int8 needs {folder / model_folder.QUANTIZED_WEIGHTS}, which is not there; leave --int8 out or "
                "name the folder of a run"
            )
    if model_folder.has_quantized_file(folder) or model_folder.has_adapters(folder):
        model_folder.require_configuration(folder)

    from mixft.cli import saved_model

    saved = saved_model.load(folder, choose_device(device))
    vocabulary = model_folder.vocabulary(folder)
    special = saved.task == "classification"
    unknown = check_tokens(saved.tokenizer, "SENTENCE...", sentences, special, vocabulary)
    warn_of_unknown(unknown, saved.tokenizer, "SENTENCE...", folder)
    if saved.task == "causal-lm":
        _go_on(saved, sentences, max_new_tokens or NEW_TOKENS)
    elif max_new_tokens is not None:
        raise InputError(f"--max-new-tokens is for a causal language model; the model in {folder} labels texts")
    else:
        _label(saved, sentences)


def _label(saved, sentences: list[str]) -> None:
    for start in range(0, len(sentences), BATCH):
        batch = sentences[start : start + BATCH]
        for sentence, row in zip(batch, saved.probabilities(batch), strict=True):
            best = int(row.argmax())
            print(f"{saved.config.id2label[best]}\t{row[best].item():.3f}\t{_on_one_line(sentence)}")


def _go_on(saved, sentences: list[str], new_tokens: int) -> None:
    for sentence in sentences:
        print(f"{_on_one_line(sentence)}\t{_on_one_line(saved.continuation(sentence, new_tokens))}")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _model_in(folder: Path) -> Path:
    """``folder``, or the one model in it where it is the output of ``mixft finetune``."""
    folder = model_folder.named_folder(str(folder))
    if not (folder / "config.json").exists():
        models = sorted(path.parent for path in folder.glob("[!.]*/config.json"))
        if len(models) > 1:
            raise InputError(f"{folder} holds {len(models)} models; name one of them: {', '.join(map(str, models))}")
        folder = models[0] if models else folder
    if model_folder.has_quantized_file(folder) or model_folder.has_adapters(folder):
        return folder
    return model_folder.find_model(str(folder))
