"""Causal language models small enough to train in a second, and a text whose every word follows from the one before."""

import random
from pathlib import Path

from mixft.cli.model_folder import quiet_transformers

WORDS = ["sun", "rain", "snow", "wind", "fog", "hail", "frost", "cloud"]
WIDTH = 32


def save_tokenizer(folder: Path) -> None:
    """A word a token, and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "<?>", *WORDS])}, "<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = quiet_transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<?>")
    fast.save_pretrained(folder)


def save_tiny_causal(folder: Path, kind: str, width: int = WIDTH) -> Path:
    """A "gpt2" or a "llama" of two layers, without dropout, for up to 32 tokens."""
    import torch

    transformers = quiet_transformers()
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 2 + len(WORDS)}
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            n_positions=32, n_embd=width, n_layer=2, n_head=2, initializer_range=0.1, **dropout, **ends
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.1,
            **ends,
        )
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 12 words in their order, from any of them on."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        start, length = generator.randrange(len(WORDS)), generator.randint(1, 12)
        made.append(" ".join(WORDS[(start + offset) % len(WORDS)] for offset in range(length)))
    return made


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    path.write_text("\n".join(documents(count, seed)) + "\n", encoding="utf-8")
    return path
