"""int8 weights packed ahead for oneDNN's product of unsigned by signed bytes.

    out[m, n] = scale[n] * sum_k (u[m, k] - 128) w[n, k]         u uint8 [M, K], w int8 [N, K], scale and out FP32

The packed copy of a weight lives as long as the weight and is made anew after a change in place, and where ``.data``
was given another tensor. A write that torch does not count, through ``.data`` or NumPy, is not seen.
"""

import functools
import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .instruction_set import has_int8_dot

ZERO = 128  # what stands for zero in an unsigned operand

# Elements summed at a time, for which torch makes 64-bit copies of them.
PIECE = 1 << 18


class PackedWeight:
    """The packed copy of one weight, made when it is asked for, with what depends on its scale."""

    def __init__(self, weight: Tensor):
        self.owner = weakref.ref(weight, functools.partial(_forget, id(weight)))
        self.state = _state(weight)
        # While it is held, no other storage can take this one's identity; its memory is free to go.
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.scale = self.terms = None

    @functools.cached_property
    def values(self) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(self.owner(), None)

    @functools.cached_property
    def column_sums(self) -> Tensor:
        pieces = self.owner().split(max(1, PIECE // self.owner().shape[1]))
        return torch.cat([rows.sum(1, dtype=torch.int64) for rows in pieces]).double()

    @functools.cached_property
    def zero_points(self) -> Tensor:
        return torch.zeros(self.column_sums.shape, dtype=torch.int64, device="cpu")

    def column_terms(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``scale`` [N, 1] as a contiguous [N], and what it makes of the offset of unsigned operands."""
        if self.scale is None or scale.is_inference() or self.scale_state != _state(scale):
            columns = scale.detach().reshape(-1).contiguous()
            self.terms = columns, (self.column_sums * columns * -ZERO).float()
            # Its memory is held, so that no other scale can come to lie there.
            self.scale, self.scale_state = scale.detach(), _state(scale)
        return self.terms


_packed: dict[int, PackedWeight] = {}


def _forget(key: int, owner: weakref.ref) -> None:
    if key in _packed and _packed[key].owner is owner:
        del _packed[key]


def _state(tensor: Tensor) -> tuple:
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.untyped_storage()._cdata, tensor.shape, tensor.stride()


def kept(weight: Tensor) -> PackedWeight | None:
    """What is kept of int8 ``weight`` [N, K] between calls.

    None for an empty or strided weight, and for an inference tensor, whose changes go uncounted.
    """
    found = _packed.get(id(weight))
    if found is not None and found.owner() is weight and found.state == _state(weight):
        return found
    if weight.numel() == 0 or not weight.is_contiguous() or weight.is_inference():
        return None
    found = _packed[id(weight)] = PackedWeight(weight)
    return found


def packed_weight(weight: Tensor) -> PackedWeight | None:
    """The copy of ``weight`` packed for oneDNN; None without VNNI, or where nothing is :func:`kept`."""
    return kept(weight) if packed_product_is_exact() else None


def packed_product(unsigned: Tensor, weight: PackedWeight, scale: Tensor, *, exact: bool) -> Tensor:
    """The product of the module docstring, FP32 [M, N]; ``scale`` is [N, 1].

    With ``exact`` the sum is exact in int32 and then rounded, which costs a pass over the weight. Without, the sum of
    ``u w`` is rounded and the offset of 128 subtracted in FP32.
    """
    columns, offset = weight.column_terms(scale)
    zero_point, bias = (ZERO, None) if exact else (0, offset)
    return torch.ops.onednn.qlinear_pointwise.default(
        unsigned,
        1.0,
        zero_point,
        weight.values,
        columns,
        weight.zero_points,
        bias,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


def packed_layer(
    unsigned: Tensor, weight: PackedWeight, weight_scale: Tensor, bias: Tensor | None, scale: float, zero_point: int
) -> Tensor:
    """``scale * weight_scale * ((u - zero_point) w^T) + bias`` in FP32, ``scale`` and ``zero_point`` for all of u."""
    columns, offset = weight.column_terms(weight_scale)
    # What the packed product adds in FP32 to the scaled sum of u w.
    added = offset * (scale * zero_point / ZERO)
    if bias is not None:
        added += bias
    return torch.ops.onednn.qlinear_pointwise.default(
        unsigned, scale, 0, weight.values, columns, weight.zero_points, added, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def packed_product_is_exact() -> bool:
    """Whether to use packed weights here: the first call holds both forms to exact products at the extremes."""
    if not (has_int8_dot() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    for M, K, N in ((1, 64, 32), (33, 257, 65)):
        unsigned = torch.randint(0, 256, (M, K), dtype=torch.uint8, device="cpu", generator=generator)
        weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, device="cpu", generator=generator)
        # Where products of bytes are added in 16 bits, these saturate.
        unsigned[0], weight[0], weight[1] = 255, 127, -128
        packed = PackedWeight(weight)
        one = torch.ones(N, 1, dtype=torch.float32, device="cpu")
        product = (unsigned.double() - ZERO) @ weight.double().t()
        if not all(
            torch.equal(packed_product(unsigned, packed, one, exact=exact), product.float()) for exact in (True, False)
        ):
            return False
    return True
