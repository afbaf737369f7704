"""Optimizer state in fewer bits: FP32 weights as a 16-bit parameter and its remainder, moments as 8-bit codes."""

import torch
from torch import Tensor

from mixft.cpu.optimizer_state import GROUP_SIZE

from .layout import in_layout_of
from .optimizer_step import dense_copy
from .registration import define_op
from .validation import SIXTEEN_BITS, check_dtype, check_same_device


@define_op("optimizer_state")
def encode_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    groups = -(-values.numel() // GROUP_SIZE)
    codes = torch.empty_like(values, dtype=torch.int8 if signed else torch.uint8)
    return codes, values.new_empty(groups, dtype=torch.uint8)


@define_op("optimizer_state")
def decode_state(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@define_op("optimizer_state")
def split_weights(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)


@define_op("optimizer_state")
def join_weights(param: Tensor, remainder: Tensor) -> Tensor:
    return torch.empty_like(param, dtype=torch.float32)


@torch.no_grad()
def quantize_state(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Round optimizer state to block-wise 8-bit floating point, as the fused steps keep it.

    Thirty-two neighbours in storage share one scale, the exponent of the largest of them, as in the MX formats (Open
    Compute Project, "Microscaling formats", 2023). Relative to it a value has three mantissa bits and an exponent of
    four bits where ``signed`` (first moments, momenta: 16 octaves) and of five bits where not (second moments: 32).
    An unsigned value that is too small for that becomes the smallest code, never zero: a second moment that is zero
    by rounding would let the update explode. A signed one becomes zero. Rounding is to nearest, so that
    ``dequantize_state`` and this give the same codes again. (The fused steps round stochastically.)

    Args:
        values: dense FP32 tensor of any shape and strides. A NaN or Inf makes a NaN of its whole group.
        signed: whether values may be negative.

    Returns:
        ``(codes, scales)``: int8 (signed) or uint8, of the shape and storage order of ``torch.empty_like(values)``;
        and uint8 [ceil(values.numel() / 32)], biased exponents, in storage order.

    Raises:
        TypeError: ``values`` is not FP32.
    """
    check_dtype("values", values, (torch.float32,))
    return encode_state(dense_copy(values.detach()), signed)


@torch.no_grad()
def dequantize_state(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of :func:`quantize_state`'s codes, of their shape and storage order.

    Args:
        codes: int8 (signed) or uint8, filling its storage.
        scales: uint8 [ceil(codes.numel() / 32)].

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: ``scales`` does not fit ``codes``, or the two are on different devices.
    """
    check_dtype("codes", codes, (torch.int8, torch.uint8))
    check_dtype("scales", scales, (torch.uint8,))
    check_same_device(codes=codes, scales=scales)
    if scales.shape != (-(-codes.numel() // GROUP_SIZE),):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}; {codes.numel()} codes need one for each {GROUP_SIZE}"
        )
    if dense_copy(codes) is not codes:
        raise ValueError(f"codes has strides {codes.stride()}; it must fill its storage, as quantize_state's do")
    return decode_state(codes, scales.contiguous())


@torch.no_grad()
def split_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An FP32 tensor as a 16-bit parameter and a 16-bit remainder, from which :func:`join_master` makes it again.

    BF16: the parameter is the upper half of the bits, rounded to nearest, and away from zero in a tie; the remainder
    is what the bits exceed it by. That is exact for every finite value and Inf. (Rounding ties to even would need a
    remainder of 17 bits.) FP16: the parameter is the value rounded to nearest even, and the remainder what it exceeds
    the parameter by, in units of 2^-15 of the spacing of FP16 there. That is exact where the magnitude is at least
    2^-16, has an error of at most 2^-40 below, and is Inf where the parameter is. A NaN stays a NaN.

    Args:
        master: FP32 tensor of any shape and strides.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Returns:
        ``(param, remainder)``, of ``dtype`` and int16, of the shape and storage order of ``torch.empty_like(master)``.

    Raises:
        TypeError: ``master`` is not FP32, or ``dtype`` is another.
    """
    check_dtype("master", master, (torch.float32,))
    if dtype not in SIXTEEN_BITS:
        raise TypeError(f"dtype must be torch.float16 or torch.bfloat16; it is {dtype}")
    return split_weights(dense_copy(master.detach()), dtype)


@torch.no_grad()
def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 tensor of which :func:`split_master` made ``param`` and ``remainder``.

    Args:
        param: FP16 or BF16 tensor of any shape and strides.
        remainder: int16 tensor of the same shape.

    Returns:
        FP32, of the shape and storage order of ``torch.empty_like(param)``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: the two have different shapes or devices.
    """
    check_dtype("param", param, SIXTEEN_BITS)
    check_dtype("remainder", remainder, (torch.int16,))
    check_same_device(param=param, remainder=remainder)
    if param.shape != remainder.shape:
        raise ValueError(
            f"remainder has shape {tuple(remainder.shape)} and param {tuple(param.shape)}; they must be equal"
        )
    param = dense_copy(param.detach())
    return join_weights(param, in_layout_of(param, remainder))
