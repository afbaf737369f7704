"""The matrix product by pointers: one program a tile of the output, any strides, every architecture.

    out[i, j] = epilogue(sum_k a[i, k] b[k, j])

Where a product has too few tiles for the GPU, its sum over K is split among several programs a tile, ``depth`` values
each. Each stores its part in FP32, and :mod:`.matmul_split_k` adds the parts in order.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .configuration import configuration
from .matmul_epilogue import LAYOUTS, SHAPES, Product, apply_epilogue, epilogue_constants
from .tile_order import tile_of_program
from .variant import BYTES, MatrixProduct, Variant


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    a, b, parts, bias, residual, preactivation, kept, out, column_partials,
    M, N, K, depth,
    a_stride_m, a_stride_k, b_stride_k, b_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_mask = rows[:, None] < M
    column_mask = columns[None, :] < N

    first = 0
    if parts is not None:
        first = tl.program_id(1) * depth
        K = tl.minimum(K - first, depth)
    read = (first + inner).to(tl.int64)
    a_tile = a + rows[:, None].to(tl.int64) * a_stride_m + read[None, :] * a_stride_k
    b_tile = b + read[:, None] * b_stride_k + columns[None, :].to(tl.int64) * b_stride_n
    a_step = tl.cast(BLOCK_K, tl.int64) * a_stride_k
    b_step = tl.cast(BLOCK_K, tl.int64) * b_stride_k

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_values = tl.load(a_tile, mask=row_mask, other=0.0)
            b_values = tl.load(b_tile, mask=column_mask, other=0.0)
        else:
            a_values = tl.load(a_tile, mask=row_mask & (inner[None, :] < K - start), other=0.0)
            b_values = tl.load(b_tile, mask=column_mask & (inner[:, None] < K - start), other=0.0)
        accumulator = tl.dot(a_values, b_values, accumulator)
        a_tile += a_step
        b_tile += b_step

    mask = row_mask & column_mask
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    if parts is not None:
        tl.store(parts + tl.program_id(1).to(tl.int64) * M * N + at, accumulator, mask=mask)
    else:
        apply_epilogue(
            accumulator, bias, residual, preactivation, kept, out, column_partials,
            at, mask, tile_m, rows, columns, M, N, ACTIVATION,
        )  # fmt: skip


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes, tile rows a group, warps a program and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


def launch(
    product: Product, config: MatmulConfig, parts: Tensor | None = None, depth: int | None = None
) -> Tensor | None:
    """Compute ``product``, or into ``parts`` its sums over ranges of ``depth`` of K, without an epilogue.

    Args:
        parts: FP32 [K / depth, M, N], rounded up.
        depth: a multiple of ``BLOCK_K``.

    Returns:
        The partial sums of the columns; None unless asked for.
    """
    a, b = product.a, product.b
    M, N, K = product.shape
    partials = product.column_partials(config.BLOCK_M)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    with torch.cuda.device_of(a):
        matmul_kernel[(tiles, 1 if parts is None else parts.shape[0])](
            a, b, parts, product.bias, product.residual, product.preactivation, product.kept, product.out, partials,
            M, N, K, depth,
            *a.stride(), *b.stride(),
            EVEN_K=K % config.BLOCK_K == 0, ACTIVATION=product.activation,
            **asdict(config),
        )  # fmt: skip
    return partials


def loads_16_bytes(operand: Tensor) -> bool:
    """Whether 16-byte loads along the unit stride of a 2-D ``operand`` are possible.

    Any multiple of 8 elements would do, but the compiler is told of divisibility by 16 alone.
    """
    if operand.stride(1) == 1:
        length, step = operand.shape[1], operand.stride(0)
    elif operand.stride(0) == 1:
        length, step = operand.shape[0], operand.stride(1)
    else:
        return False
    return length % 16 == 0 and step % 16 == 0 and operand.data_ptr() % 16 == 0


def bucket(product: Product) -> str:
    """The shape bucket of ``product``: which tiles keep its pointers, masks and sums within the registers."""
    aligned = product.shape[1] % 16 == 0 and loads_16_bytes(product.a) and loads_16_bytes(product.b)
    return product.size if aligned else "unaligned"


def variants(arch: Architecture) -> list[Variant]:
    """Every bucket, operand layout, epilogue, operand dtype and output dtype at least once."""
    if not arch.tensor_cores:
        return []
    return [
        _variant(arch, "unaligned", "forward", "bf16", "bf16", "gelu+keep"),
        _variant(arch, "unaligned", "grad_a", "fp16", "fp16", "slope"),
        _variant(arch, "small", "forward", "fp16", "fp16", "silu"),
        _variant(arch, "small", "forward", "fp16", "fp16", "split"),
        _variant(arch, "medium", "forward", "fp16", "fp16", "gelu_tanh+keep"),
        _variant(arch, "medium", "grad_b", "bf16", "fp32", "split"),
        _variant(arch, "large", "forward", "fp16", "fp16", "gelu+keep"),
        _variant(arch, "large", "forward", "bf16", "fp32", "gelu+keep+add"),
        _variant(arch, "large", "grad_a", "fp16", "fp16", "slope"),
        _variant(arch, "large", "grad_b", "fp16", "fp32", "add"),
        _variant(arch, "wide", "forward", "fp16", "fp16", "none"),
        _variant(arch, "wide", "grad_a", "bf16", "bf16", "none"),
        _variant(arch, "wide", "grad_b", "fp16", "fp16", "none"),
    ]


def _variant(arch: Architecture, bucket: str, layout: str, dtype: str, out_dtype: str, epilogue: str) -> Variant:
    config = asdict(configuration("matmul", MatmulConfig, arch, bucket))
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    tile = (config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"])
    unit_strides, token_count = LAYOUTS[layout]
    types = dtype if out_dtype == dtype else f"{dtype},{out_dtype}"
    is_split = epilogue == "split"
    stored = "fp32" if is_split else out_dtype
    constexprs = {
        **config,
        **dict.fromkeys(unit_strides, 1),
        "EVEN_K": bucket != "unaligned" and token_count != "K",
        # The second pass has the epilogue, and the bias in it.
        **epilogue_constants(epilogue, bias=layout == "forward" and not is_split),
        **({} if is_split else {"parts": None, "depth": None}),
    }
    pointers = {"a": dtype, "b": dtype, "parts": "fp32", "bias": dtype, "residual": out_dtype, "preactivation": dtype}
    pointers |= {"kept": dtype, "out": out_dtype, "column_partials": "fp32"}
    integers = ["M", "N", "K", "depth", "a_stride_m", "a_stride_k", "b_stride_k", "b_stride_n"]
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    aligned = pointers if bucket == "unaligned" else [name for name in signature if name != token_count]
    return Variant(
        name=f"matmul[{bucket},{layout},{types},{epilogue}]",
        function=matmul_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=tuple(name for name in signature if name in aligned),
        num_warps=num_warps,
        num_stages=num_stages,
        wide_loads=bucket != "unaligned",
        work=MatrixProduct(tile, (BYTES[dtype], BYTES[dtype], BYTES[stored]), SHAPES[bucket]),
    )
