"""``mixft.ops.quantize``: int8 quantization along a dimension, by groups along it, or of a whole tensor.

    symmetric   S = max|x| / 127                   Z = 0                       Q = round(x / S)      in [-127, 127]
    affine      S = (max(x, 0) - min(x, 0)) / 255  Z = round(-128 - min(x) / S)  Q = round(x / S + Z)  in [-128, 127]

(Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018.)
"""

from math import prod
from typing import Literal

import torch
from torch import Tensor

from mixft.cpu.quantize import SMALLEST_SCALE as SMALLEST_SCALE  # for the layers, which quantize by other code

from .registration import define_op, without_dispatch
from .validation import FLOATS, check_dtype

LARGEST_SEED = 2**63 - 1


@define_op("quantize", name="quantize")
def _quantize(
    x: Tensor, symmetric: bool, seed: Tensor | None, factor: Tensor | None = None, propagate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    outer, _, inner = x.shape
    shape = (outer, 1, inner)
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(0 if symmetric else shape, dtype=torch.int32, device=x.device),
    )


def quantize(
    x: Tensor,
    *,
    dim: int | None = -1,
    group_size: int | None = None,
    symmetric: bool = True,
    stochastic: bool = False,
    nonfinite: Literal["saturate", "error"] = "saturate",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize ``x`` to int8; the formulas head this module.

    Products with the rounded inverse of S stand for the quotients, so a value whose exact quotient lies within 2^-15 of
    a tie may go to either neighbour. S is at least 2^-126: a group of zeros gets that scale, and dequantizes to zeros.

    Args:
        x: FP16, BF16 or FP32, any shape and strides. No gradient flows through the result.
        dim: the dimension that shares a scale, as the one that ``torch.amax`` reduces: -1 gives one scale a row of a
            matrix, 0 one a column, None one for the tensor.
        group_size: elements along ``dim`` that share a scale, a divisor of that dimension; None for all of them.
        symmetric: the formula.
        stochastic: round x/S + Z up or down at random, such that the mean is x/S + Z (to 2^-16), with a seed drawn
            from torch's generator of x's device; False rounds to the nearest, ties to even. For one seed every device
            draws the same numbers, a CPU where its routines are compiled.
        nonfinite: "saturate" takes ranges over finite values, turns NaN into the representation of zero and
            an infinity into 127 or the lowest value; "error" raises instead, which waits for the device.

    Returns:
        ``values``, int8 of x's shape, contiguous; ``scale``, FP32 with 1, or the number of groups, in place of ``dim``
        (1 everywhere when it is None); ``zero_point``, int32 of scale's shape, or None when ``symmetric``.

    Raises:
        TypeError: x is not a floating tensor of these dtypes, or ``dim`` or ``group_size`` is no whole number.
        IndexError: x has no dimension ``dim``.
        ValueError: ``group_size`` does not divide the dimension or comes with ``dim=None``; an unknown ``nonfinite``;
            NaN or infinity in x under ``nonfinite="error"``.
    """
    check_dtype("x", x, FLOATS)
    if nonfinite not in ("saturate", "error"):
        raise ValueError(f"nonfinite must be 'saturate' or 'error'; it is {nonfinite!r}")
    grouped, scale_shape = grouped_shapes(x, dim, group_size)
    if nonfinite == "error" and x.numel():
        extremes = torch.stack(torch.aminmax(x.detach()))
        if not extremes.isfinite().all():
            raise ValueError("x holds NaN or infinity; nonfinite='saturate' accepts them")
    seed = torch.randint(LARGEST_SEED, (), device=x.device) if stochastic else None
    x = x.detach()
    values, scale, zero_point = without_dispatch(_quantize, x)(x.reshape(grouped), symmetric, seed)
    return (
        values.view(x.shape),
        scale.view(scale_shape),
        None if symmetric else zero_point.view(scale_shape),
    )


def grouped_shapes(
    tensor: Tensor, dim: int | None, group_size: int | None
) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The 3-D shape (outer, group, inner) that the ops see, and the scale's shape, for ``tensor``."""
    for name, value in (("dim", dim), ("group_size", group_size)):
        if value is not None and not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be None or a whole number; it is {value!r}")
    shape = tuple(tensor.shape)
    if dim is None:
        if group_size is not None:
            raise ValueError("group_size needs a dim to group along; dim is None, so flatten the tensor or name one")
        return (1, prod(shape), 1), (1,) * len(shape)
    rank = max(len(shape), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"dim must be None or from {-rank} to {rank - 1} for shape {shape}; it is {dim}")
    if not shape:
        shape = (1,)
    dim %= rank
    length = shape[dim]
    size = length if group_size is None else group_size
    if group_size is not None and (group_size < 1 or length % group_size):
        raise ValueError(f"group_size must divide dimension {dim} of size {length}; it is {group_size}")
    groups = 1 if group_size is None else length // group_size
    before, after = shape[:dim], shape[dim + 1 :]
    scale_shape = (*before, groups, *after) if tensor.dim() else ()
    return (prod(before) * groups, size, prod(after)), scale_shape


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}; it has shape {tuple(tensor.shape)}")
