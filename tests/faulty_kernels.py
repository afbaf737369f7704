"""Kernels that break a limit on purpose, and one that keeps every limit: the compile test has to tell them apart."""

import triton
import triton.language as tl

from mixft.kernels.architecture import Architecture
from mixft.kernels.variant import Variant


@triton.jit
def product(a, b, c, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        left = tl.load(a + rows[:, None] * K + start + depth[None, :])
        right = tl.load(b + columns[None, :] * K + start + depth[:, None])
        total += tl.dot(left, right)
    tl.store(c + rows[:, None] * COLUMNS + columns[None, :], total.to(tl.float16))


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, 2.0 * tl.load(x + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def normalise(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(y + offsets, values / tl.sum(values, axis=0))


@triton.jit
def unwritable(x):
    tl.store(x, x.name_that_no_tensor_has)


def _product(name: str, depth: int, num_stages: int) -> Variant:
    return Variant(
        name,
        product,
        {"a": "*fp16", "b": "*fp16", "c": "*fp16", "K": "i32"},
        {"ROWS": 128, "COLUMNS": 128, "DEPTH": depth},
        ("a", "b", "c", "K"),
        num_warps=8,
        num_stages=num_stages,
    )


def _double(name: str, divisible_by_16: tuple[str, ...]) -> Variant:
    return Variant(name, double, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 1024}, divisible_by_16)


def variants(arch: Architecture) -> list[Variant]:
    if arch.name not in ("sm_80", "sm_90", "gfx942"):
        return []
    return [
        _product("sound", 64, 2),
        # One warp has to hold the whole block until the sum is known.
        Variant(
            "spilling",
            normalise,
            {"x": "*fp32", "y": "*fp32"},
            {"BLOCK": 512 * arch.warp_size},
            ("x", "y"),
            num_warps=1,
        ),
        _product("oversized", 128, 6),
        _double("aligned", ("x", "y", "n")),
        _double("scalar", ()),
        Variant("failing", unwritable, {"x": "*fp32"}, {}),
    ]
