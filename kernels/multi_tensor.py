"""One launch over many tensors: a table of pointers and a list of programs, each a chunk of one tensor.

A table row belongs to one tensor and holds int64 values: device addresses, and whatever else the kernel reads per
tensor. Column 0 is the number of elements. Program ``i`` works on elements ``[c * chunk, (c + 1) * chunk)`` of tensor
``t``, with ``t = program_tensor[i]`` and ``c = program_chunk[i]``; an empty tensor has one program.

Both are cached on the device under the very numbers that they hold (addresses and sizes), so a cached table cannot be
stale: a gradient that moves makes a new key.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class MultiTensorConfig:
    """Elements a program, elements an iteration, warps a program."""

    chunk: int
    block: int
    num_warps: int


class Programs(NamedTuple):
    """The programs of one launch.

    Attributes:
        tensor: int32 [programs], which tensor.
        chunk: int32 [programs], which chunk of it.
        first: int32 [tensors + 1], the first program of each tensor, and the number of programs.
        tickets: int32 [tensors], zero between launches: programs that have finished with a tensor.
        count: number of programs.
    """

    tensor: Tensor
    chunk: Tensor
    first: Tensor
    tickets: Tensor
    count: int


@triton.jit
def tensor_pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in ``COLUMN`` of a table row as a pointer to ``TYPE``."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        # The hint holds for the value it is put on: on the integer, before the cast, it is lost and loads stay scalar.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, as 128-bit loads need."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def programs_for(sizes: Sequence[int], chunk: int, device: torch.device) -> Programs:
    """The cached programs over tensors of ``sizes`` elements."""
    return _programs(tuple(sizes), chunk, device, _stream(device))


def table_for(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The cached int64 table [tensors, columns] on ``device``."""
    return _table(tuple(map(tuple, columns)), device, _stream(device))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


# Tables are copied without waiting, in order with the launches of one stream only: so the stream is in the key.
def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], chunk: int, device: torch.device, stream: int) -> Programs:
    counts = torch.tensor([max(1, -(-size // chunk)) for size in sizes], device="cpu")
    first = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
    tensor = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    index = torch.arange(len(tensor), device="cpu") - first[:-1].repeat_interleave(counts)
    return Programs(
        *(_to_device(values.int(), device) for values in (tensor, index, first)),
        tickets=torch.zeros(len(sizes), dtype=torch.int32, device=device),
        count=len(tensor),
    )


@functools.lru_cache(maxsize=64)
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    return _to_device(torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous(), device)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The graph would replay a copy from host memory that is long freed.
        raise RuntimeError("mixft's multi-tensor kernels cannot be captured in a CUDA graph; step outside of it")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
