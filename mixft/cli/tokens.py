"""Texts that a model cannot read: without a token, beyond its vocabulary, or of unknown words alone."""

import sys
from pathlib import Path

from mixft.cli.errors import InputError

CHUNK = 1000  # texts
SHOWN = 40  # characters
MANY = 0.2  # share of unknown tokens that is warned of; in its own language a tokenizer has a few in a thousand


def check_tokens(tokenizer, source: str, texts: list[str], special: bool, vocabulary: int | None = None) -> float:
    """Refuse a text without a token, as one of characters that the tokenizer drops, and a token that the model lacks.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: where the texts are from, for the message.
        texts: to be looked at.
        special: whether the tokenizer's special tokens are added, which are enough.
        vocabulary: tokens that the model has, as its configuration says; None where it does not.

    Returns:
        The share, 0 to 1, of the texts' tokens that stand for words unknown to the tokenizer; special tokens that it
        adds do not count, and 1 where there are no others.

    Raises:
        InputError: a text has no token, or the tokenizer gives one that the model does not have.
    """
    enough = special and tokenizer.num_special_tokens_to_add() > 0
    empty, tokens, unknown = [], 0, 0
    ends = [tokenizer.pad_token_id] if special else [tokenizer.pad_token_id, tokenizer.eos_token_id or 0]
    largest = max(tokenizer("", add_special_tokens=special)["input_ids"] + ends)
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(texts[start : start + CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
        empty += [start + offset for offset, row in enumerate(encoded) if not row]
        tokens += sum(map(len, encoded))
        largest = max(largest, *(max(row, default=0) for row in encoded))
        unknown += sum(row.count(tokenizer.unk_token_id) for row in encoded)
    if empty and not enough:
        first = texts[empty[0]][:SHOWN]
        raise InputError(
            f"{source}: the model's tokenizer makes no token of {len(empty)} of the texts, the first of them text "
            f"{empty[0] + 1}, {first!r}; remove them, or write what its vocabulary has"
        )
    if vocabulary is not None and largest >= vocabulary:
        raise InputError(
            f"{source}: the tokenizer gives token number {largest}, and the model's config.json has vocab_size "
            f"{vocabulary}; a tokenizer that the model was trained with would do"
        )
    return unknown / tokens if tokens else 1.0


def require_known(unknown: float, tokenizer, source: str, folder: Path) -> None:
    """Refuse texts that have nothing to teach, and warn of those that have little.

    Args:
        unknown: as `check_tokens` returned it.
        tokenizer: the one that it looked at.
        source: where the texts are from.
        folder: where the tokenizer is from.

    Raises:
        InputError: every token is unknown, so that all texts of a length are one to the model.
    """
    if unknown == 1.0:
        raise InputError(
            f"{source}: the tokenizer in {folder} knows no word of the texts: each is unknown to it or dropped; a "
            "model with a vocabulary of their language would do"
        )
    warn_of_unknown(unknown, tokenizer, source, folder)


def warn_of_unknown(unknown: float, tokenizer, source: str, folder: Path) -> None:
    """Say on standard error, in one line, that much of the texts is unknown; arguments as of `require_known`."""
    if unknown >= MANY:
        print(
            f"mixft: warning: {source}: {unknown:.1%} of the tokens are unknown ({tokenizer.unk_token}) to the "
            f"tokenizer in {folder}, and all one to the model; a model with a vocabulary of their language would do",
            file=sys.stderr,
        )
