"""Texts of which a tokenizer makes no token: refused by name, since no model says anything of an empty row."""

from mixft.cli.errors import InputError

CHUNK = 1000  # texts
SHOWN = 40  # characters


def check_tokens(tokenizer, source: str, texts: list[str], special: bool) -> None:
    """Hold every text to a token at least: one of characters that the tokenizer drops has none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: where the texts are from, for the message.
        texts: to be looked at.
        special: whether the tokenizer's special tokens are added, which are enough.

    Raises:
        InputError: a text has no token.
    """
    if special and tokenizer.num_special_tokens_to_add() > 0:
        return
    empty = []
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(texts[start : start + CHUNK], add_special_tokens=special, verbose=False)["input_ids"]
        empty += [start + offset for offset, tokens in enumerate(encoded) if not tokens]
    if empty:
        first = texts[empty[0]][:SHOWN]
        raise InputError(
            f"{source}: the model's tokenizer makes no token of {len(empty)} of the texts, the first of them text "
            f"{empty[0] + 1}, {first!r}; remove them, or write what its vocabulary has"
        )
