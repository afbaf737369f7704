"""``mixft.nn.attention`` in the models of transformers, where the version at hand lets a library bring its own."""

import torch
import transformers

from mixft.nn.attention import dropout_attention

NAME = "mixft"


def use_dropout_attention(model: torch.nn.Module) -> None:
    """Let ``model``, if it would call ``F.scaled_dot_product_attention``, train with ours on a CPU."""
    interfaces = [getattr(transformers, name, None) for name in ("AttentionInterface", "AttentionMaskInterface")]
    if None in interfaces or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    functions, masks = interfaces
    functions.register(NAME, _attention)
    masks.register(NAME, masks()["eager"])
    model.set_attn_implementation(NAME)


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """As transformers calls an attention function: [batch, heads, length, size] to [batch, length, heads, size]."""
    ours = dropout > 0 and query.device.type == "cpu" and query.shape[1] == key.shape[1]
    if not ours or options.get("position_bias") is not None:
        serve = transformers.AttentionInterface()["sdpa"]
        return serve(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return dropout_attention(query, key, value, attention_mask, dropout, scale).transpose(1, 2).contiguous(), None
