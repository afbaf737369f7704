"""Checks that several ops make of their arguments; each error names the argument, what it was and what would do."""

import sys

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
FLOATS = (*SIXTEEN_BITS, torch.float32)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``torch.distributed.tensor.DTensor``."""
    # Whoever has made one has imported its module, which is slow and missing from some builds of torch.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def described(tensor: Tensor) -> str:
    """Layout and dtype of ``tensor``, for a message."""
    return f"a {'dense' if tensor.layout == torch.strided else tensor.layout} tensor of {tensor.dtype}"


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``tensor`` has one of the ``allowed`` dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {_either(allowed)}; it is {tensor.dtype}")


def check_out_dtype(out_dtype: torch.dtype, name: str = "out_dtype") -> None:
    """Raise TypeError unless the result may have ``out_dtype``, the argument ``name``."""
    if out_dtype not in FLOATS:
        raise TypeError(f"{name} must be {_either(FLOATS)}; it is {out_dtype}")


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """Raise unless ``bias`` is None or a floating [out_features]."""
    if bias is None:
        return
    check_dtype("bias", bias, FLOATS)
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},); it has shape {tuple(bias.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given lie on one device."""
    first = next(iter(tensors.values())).device
    for tensor in tensors.values():
        if tensor is not None and tensor.device != first:
            listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
            raise ValueError(f"all tensors must be on one device; got {listing}")


def check_scalar(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless ``value`` is a one-element FP32 tensor on ``device``."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {given}; it must be a one-element torch.float32 tensor")
    if value.numel() != 1 or value.device != device:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} on {value.device}; it must hold one element on {device}"
        )


def check_counts(nonfinite: Tensor, count: int, device: torch.device) -> None:
    """Raise unless ``nonfinite`` is a contiguous int64 [count] on ``device``."""
    if nonfinite.dtype != torch.int64:
        raise TypeError(f"nonfinite is {nonfinite.dtype}; it must be torch.int64")
    if nonfinite.shape != (count,) or not nonfinite.is_contiguous() or nonfinite.device != device:
        raise ValueError(
            f"nonfinite has shape {tuple(nonfinite.shape)}, strides {nonfinite.stride()} and is on "
            f"{nonfinite.device}; it must be a contiguous tensor of {count} on {device}"
        )


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
