"""``mixft predict``: labels of sentences by a model that ``mixft finetune`` saved, in int8 or not."""

from pathlib import Path
from typing import Annotated

import typer

from mixft.cli import model_folder
from mixft.cli.errors import InputError

BATCH = 32


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, or the int8 folder in one.")],
    sentences: Annotated[list[str], typer.Argument(metavar="SENTENCE...", help="Texts to label.")],
    int8: Annotated[bool, typer.Option("--int8", help="Use the int8 copy in DIR.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default the GPU if there is one.")] = None,
) -> None:
    """Print label, probability and sentence, one sentence a line, tabs between."""
    for number, sentence in enumerate(sentences, start=1):
        if not sentence.strip():
            raise InputError(f"sentence {number} is empty; give some text")
    folder = _model_in(folder)
    if int8 and not model_folder.is_quantized(folder):
        folder = folder / model_folder.QUANTIZED
        if not model_folder.is_quantized(folder):
            raise InputError(f"--int8 needs {folder / model_folder.QUANTIZED_WEIGHTS}, which is not there")
    if model_folder.is_quantized(folder):
        model_folder.require_configuration(folder)

    import torch

    from mixft.cli.device import choose_device

    target = choose_device(device)
    tokenizer, config = model_folder.load_tokenizer(folder), model_folder.load_config(folder)
    load = model_folder.load_quantized_classifier if model_folder.is_quantized(folder) else _load
    model = load(folder, config).to(target).eval()
    length = model_folder.longest_input(tokenizer, config)
    for start in range(0, len(sentences), BATCH):
        batch = sentences[start : start + BATCH]
        inputs = tokenizer(batch, truncation=True, max_length=length, padding=True, return_tensors="pt").to(target)
        with torch.no_grad():
            probabilities = model(**inputs).logits.float().softmax(-1).cpu()
        for sentence, row in zip(batch, probabilities, strict=True):
            best = int(row.argmax())
            print(f"{config.id2label[best]}\t{row[best].item():.3f}\t{' '.join(sentence.split())}")


def _model_in(folder: Path) -> Path:
    """``folder``, or the one model in it where it is the output of ``mixft finetune``."""
    if folder.is_dir() and not (folder / "config.json").exists():
        models = sorted(path.parent for path in folder.glob("*/config.json"))
        if len(models) == 1:
            return models[0]
        if models:
            raise InputError(f"{folder} holds {len(models)} models; name one of them: {', '.join(map(str, models))}")
    if model_folder.is_quantized(folder):
        return folder
    return model_folder.find_model(str(folder))


def _load(folder: Path, config):
    from mixft.cli import stored_weights

    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise InputError(f"the model in {folder} has no classifier yet; mixft finetune --model {folder} trains one")
    if stored_weights.is_int8_folder(folder):
        stored_weights.prepare_int8(folder)
    return model_folder.load_classifier(folder)
