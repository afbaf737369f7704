"""A model folder and labelled texts small enough to train in a second: three classes told apart by one word."""

import csv
import random
from pathlib import Path

from mixft.cli.model_folder import quiet_transformers

CLASSES = {"good": "ja, gern", "bad": "nein", "dull": "na ja"}
FILLER = ["film", "scene", "actor", "plot", "the", "a", "of", "and"]


def save_tiny_bert(folder: Path, tokenizer: bool = True, hidden_size: int = 32) -> Path:
    """Two layers, of width 32 where none is given, without dropout, so that precisions can be compared loss by loss."""
    import torch

    transformers = quiet_transformers()
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CLASSES, *FILLER]
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return folder


def rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 1 to 20 words with their labels, the classes in turn."""
    generator = random.Random(seed)
    words = list(CLASSES)
    made = []
    for number in range(count):
        word = words[number % len(words)]
        text = [*generator.choices(FILLER, k=generator.randrange(20)), word]
        generator.shuffle(text)
        made.append((" ".join(text), CLASSES[word]))
    return made


def write_csv(path: Path, content: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *content])
    return path
