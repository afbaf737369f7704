"""Attention with dropout for training on a CPU, where torch's own draws a random number for every weight."""

import torch
from torch import Tensor

from .dropout import Dropout


def dropout_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
    """``dropout(softmax(scale query key^T + mask)) value``, as ``F.scaled_dot_product_attention`` has it.

    The scale and the mask go into the first product, dropout is :class:`mixft.nn.Dropout`; nothing is rounded more
    than in FP32.

    Args:
        query: floating [batch, heads, length, size].
        key: [batch, heads, source length, size].
        value: [batch, heads, source length, value size].
        mask: added to the products, broadcastable to [batch, heads, length, source length]; None adds nothing.
        p: probability of a weight to be dropped.
        scale: of the products.

    Returns:
        [batch, heads, length, value size].
    """
    batch, heads, length, _ = query.shape
    source = key.shape[2]
    products = (batch * heads, length, source)
    added = query.new_zeros(()) if mask is None else mask.to(query.dtype).expand(batch, heads, length, source)
    scores = torch.baddbmm(
        added.expand(products) if mask is None else added.reshape(products),
        query.reshape(batch * heads, length, -1),
        key.reshape(batch * heads, source, -1).transpose(1, 2),
        beta=0 if mask is None else 1,
        alpha=scale,
    )
    weights = Dropout(p)(scores.softmax(-1))
    return torch.bmm(weights, value.reshape(batch * heads, source, -1)).view(batch, heads, length, -1)
