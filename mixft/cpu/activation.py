"""The activations of ``mixft.kernels.activation``: as torch functions by the same names, and after a matrix product.

Compiled, a product is activated, added to and cast in one pass over it.
"""

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

# Those of native/activation.h.
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

compiled = native.Routine(
    "finish_product",
    *(c_void_p, c_int, c_int64, c_int),
    *(c_void_p, c_int),
    *(c_void_p, c_int),
    *(c_void_p, c_int),
)


def finish_product(
    product: Tensor,
    activation: str,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    preactivation_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``activation(product) + residual`` in ``out_dtype``, and ``product`` in ``preactivation_dtype``, if given.

    ``product`` is contiguous and the caller's own: its memory may become that of a result. ``residual`` has as many
    elements. Computed in FP32, each result rounded once; without the compiled routine an activation of a 16-bit product
    is rounded before the residual is added.
    """
    keep = preactivation_dtype is not None
    serves = product.dtype == preactivation_dtype
    if activation == "none" and residual is None and product.dtype == out_dtype and (serves or not keep):
        return product, product.clone() if keep else None
    if not native.available():
        preactivation = product.to(preactivation_dtype) if keep else None
        out = ACTIVATIONS[activation](product)
        if residual is not None:
            out = out + residual.float()
        return out.to(out_dtype, copy=out is preactivation), preactivation
    in_place = product.dtype == out_dtype and not serves
    out = product if in_place else torch.empty(product.shape, dtype=out_dtype, device="cpu")
    preactivation = product if serves else None
    if keep and not serves:
        preactivation = torch.empty(product.shape, dtype=preactivation_dtype, device="cpu")
    written = preactivation is not None and not serves
    if residual is not None:
        residual = residual.contiguous()
    compiled(
        *(*native.typed(product), product.numel(), CODES[activation]),
        *(*native.typed(residual), *native.typed(out), *native.typed(preactivation if written else None)),
    )
    return out, preactivation
