"""One launch over many tensors: a table of pointers and a list of programs, each a chunk of one tensor.

A table row belongs to one tensor and holds int64 values: device addresses, and whatever else the kernel reads per
tensor. Column 0 is the number of elements. Program ``i`` works on elements ``[c * chunk, (c + 1) * chunk)`` of tensor
``t``, with ``t = program_tensor[i]`` and ``c = program_chunk[i]``; an empty tensor has one program.

Both are cached on the device under the very numbers that they hold (addresses and sizes), so a cached table cannot be
stale: a gradient that moves makes a new key (see ``device_cache.py``).

A model has a thousand tensors and a step a millisecond, so the host asks each tensor as little as it can: of a list
that has the attributes ``sizes`` and ``dtypes``, one for each tensor, only the addresses.
"""

import functools
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_cache import cached, capturing, to_device
from .recently_used import RecentlyUsed
from .variant import Elementwise, Variant

# A table's column of all tensors: a number each, or None for zeros.
Column = Sequence[int] | None

# Numbers in the tables whose groups are remembered, some 40 bytes each; a small table counts as so many.
LIMIT = 1 << 20
SMALLEST_TABLE = 64

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

_groups = RecentlyUsed(LIMIT)


@dataclass(frozen=True)
class MultiTensorConfig:
    """Elements a program, elements an iteration, warps a program."""

    chunk: int
    block: int
    num_warps: int


@dataclass(frozen=True, eq=False)
class Group:
    """The tensors of one launch; hashed by identity, which costs nothing.

    Attributes:
        dtypes: theirs, one of each list of tensors that the kernel is compiled for the dtype of.
        is_aligned: whether every address allows 128-bit accesses.
        columns: of the launch's table.
    """

    dtypes: tuple[torch.dtype, ...]
    is_aligned: bool
    columns: tuple[tuple[int, ...], ...]


class Programs(NamedTuple):
    """The programs of one launch.

    Attributes:
        tensor: int32 [programs], which tensor.
        chunk: int32 [programs], which chunk of it.
        first: int32 [tensors + 1], the first program of each tensor, and the number of programs.
        tickets: int64 [tensors], zero between launches: programs that have finished with a tensor.
        count: number of programs.
    """

    tensor: Tensor
    chunk: Tensor
    first: Tensor
    tickets: Tensor
    count: int


class Launch(NamedTuple):
    """One launch, over a group of ``dtypes``; ``constants`` are those that each kernel over many tensors has."""

    dtypes: tuple[torch.dtype, ...]
    table: Tensor
    programs: Programs
    constants: dict[str, Any]


@triton.jit
def tensor_pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in ``COLUMN`` of a table row as a pointer to ``TYPE``."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        # The hint holds for the value it is put on: on the integer, before the cast, it is lost and loads stay scalar.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, mask):
    """What lies at ``pointer``, and zero where a mask is given and does not hold."""
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def chunk_of_program(table, program_tensor, program_chunk, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's table row, the first element of its chunk, and the number of elements of its tensor."""
    program = tl.program_id(0)
    row = table + tl.load(program_tensor + program).to(tl.int64) * COLUMNS
    start = tl.load(program_chunk + program).to(tl.int64) * CHUNK
    return row, start, tl.load(row)


def sizes_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of elements of each."""
    known = getattr(tensors, "sizes", None)
    return tuple(map(Tensor.numel, tensors)) if known is None else known


def dtypes_of(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    known = getattr(tensors, "dtypes", None)
    return tuple(map(operator.attrgetter("dtype"), tensors)) if known is None else known


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where the elements of each begin; raises ValueError where some have no memory."""
    found = tuple(map(Tensor.data_ptr, tensors))
    if not all(found):
        for tensor, address in zip(tensors, found, strict=True):
            # An empty tensor's address is a null too.
            if not address and tensor.numel():
                raise ValueError(
                    f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} on {tensor.device} has no memory of its "
                    "own: its storage was freed, as sharding does between uses; pass it when it holds its elements"
                )
    return found


def groups_of(
    dtypes: tuple[tuple[torch.dtype, ...], ...], columns: tuple[Column, ...], vectors: tuple[int, int]
) -> list[Group]:
    """The launches over some tensors: one for each (dtypes, whether aligned).

    Args:
        dtypes: of each list of tensors that the kernel is compiled for the dtype of, the dtypes.
        columns: of the table, of all tensors; None for zeros.
        vectors: the first of the columns of addresses that are accessed in vectors, and the first that is not again.
    """
    key = dtypes, columns, vectors
    found = _groups.get(key)
    if found is None:
        found = _group(*key)
        _groups.add(key, found, max(SMALLEST_TABLE, len(columns) * len(dtypes[0])))
    return found


def _group(
    dtypes: tuple[tuple[torch.dtype, ...], ...], columns: tuple[Column, ...], vectors: tuple[int, int]
) -> list[Group]:
    absent = (0,) * len(dtypes[0])
    rows = list(zip(*(absent if column is None else column for column in columns), strict=True))
    groups = defaultdict(list)
    for kinds, row in zip(zip(*dtypes, strict=True), rows, strict=True):
        is_aligned = functools.reduce(operator.or_, row[slice(*vectors)]) % 16 == 0
        groups[kinds, is_aligned].append(row)
    return [Group(*kind, tuple(zip(*members, strict=True))) for kind, members in groups.items()]


def launches(groups: Sequence[Group], config: MultiTensorConfig, device: torch.device) -> Iterator[Launch]:
    """A launch over each of ``groups``."""
    for group in groups:
        constants = {
            "ALIGNED": group.is_aligned,
            "CHUNK": config.chunk,
            "BLOCK": config.block,
            "num_warps": config.num_warps,
            "num_stages": 1,
        }
        programs = programs_for(group.columns[0], config.chunk, device)
        yield Launch(group.dtypes, table_of(group, device), programs, constants)


def multi_tensor_variant(
    kernel: str,
    labels: Sequence[str],
    function: Any,
    types: dict[str, str | None],
    constants: dict[str, Any],
    config: MultiTensorConfig,
    is_aligned: bool,
    floor_bytes: float,
    indivisible: Sequence[str] = (),
) -> Variant:
    """``kernel[labels]``, the variant of a launch by ``config``.

    Args:
        types: of the arguments beside the table and the lists of programs, None for one that the launch lacks.
        constants: beside those of every :class:`Launch`.
        floor_bytes: of :class:`Elementwise`.
        indivisible: pointers that 16 need not divide.
    """
    types = {"table": "*i64", "program_tensor": "*i32", "program_chunk": "*i32"} | types
    signature = {name: kind for name, kind in types.items() if kind is not None and name in function.arg_names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    return Variant(
        name=f"{kernel}[{','.join([*labels, *([] if is_aligned else ['unaligned'])])}]",
        function=function,
        signature=signature,
        constexprs={name: None for name, kind in types.items() if kind is None}
        | constants
        | {"ALIGNED": is_aligned, "CHUNK": config.chunk, "BLOCK": config.block},
        divisible_by_16=tuple(name for name in pointers if name not in indivisible),
        num_warps=config.num_warps,
        wide_loads=is_aligned,
        work=Elementwise(config.block, floor_bytes),
    )


def table_of(group: Group, device: torch.device) -> Tensor:
    """The cached int64 table [tensors, columns] of ``group`` on ``device``."""
    return cached(_table, group, device)


def programs_for(sizes: Sequence[int], chunk: int, device: torch.device) -> Programs:
    """The cached programs over tensors of ``sizes`` elements."""
    programs = cached(_programs, (tuple(sizes), chunk), device)
    # Two replays at once must not count on one another's tickets.
    return programs._replace(tickets=_zeros(len(sizes), device)) if capturing(device) else programs


def counts_for(number: int, device: torch.device) -> Tensor:
    """A cached int64 [number + 1] that every launch finds zero and leaves zero: counts, and tickets at the end."""
    return zero_counts(number, device) if capturing(device) else cached(zero_counts, number, device)


def zero_counts(number: int, device: torch.device) -> Tensor:
    """As ``counts_for``, for this call alone."""
    return _zeros(number + 1, device)


def _programs(key: tuple[tuple[int, ...], int], device: torch.device) -> Programs:
    sizes, chunk = key
    counts = torch.tensor([max(1, -(-size // chunk)) for size in sizes], device="cpu")
    first = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
    tensor = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    index = torch.arange(len(tensor), device="cpu") - first[:-1].repeat_interleave(counts)
    return Programs(
        *(to_device(values.int(), device) for values in (tensor, index, first)),
        tickets=_zeros(len(sizes), device),
        count=len(tensor),
    )


def _table(group: Group, device: torch.device) -> Tensor:
    return to_device(torch.tensor(group.columns, dtype=torch.int64, device="cpu").t().contiguous(), device)


def _zeros(number: int, device: torch.device) -> Tensor:
    return torch.zeros(number, dtype=torch.int64, device=device)
