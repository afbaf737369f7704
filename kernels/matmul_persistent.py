"""The matrix product by tensor descriptors: as many programs as fit the GPU, each of which walks over tiles.

The tensor memory accelerator of Hopper and later copies whole tiles, from 16-byte aligned matrices with a unit inner
stride; where a matrix ends inside a tile it reads zeros and drops what would be stored. Either dimension of ``a`` and
``b`` may be the inner one: that covers a layer's forward, a @ weight.t(), and both products of its backward,
grad @ weight and grad.t() @ a, without a copy.

A flattened loop over tiles lets the first loads of a tile run under the epilogue of the one before. The epilogue goes
over the accumulator in groups of columns, which keeps its shared memory and registers small.
"""

import functools
import importlib.util
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .architecture import Architecture
from .configuration import configurations
from .matmul_epilogue import LAYOUTS, SHAPES, Product, apply_epilogue, epilogue_constants
from .tile_order import tile_at
from .variant import BYTES, MatrixProduct, Variant


@triton.jit(do_not_specialize=["M"])
def persistent_matmul_kernel(
    a, b, bias, residual, preactivation, kept, out, column_partials,
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr, A_IS_TRANSPOSED: tl.constexpr, B_IS_TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_PARTS
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row = tile_m * BLOCK_M
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            if A_IS_TRANSPOSED:
                a_values = a.load([start, row]).T
            else:
                a_values = a.load([row, start])
            if B_IS_TRANSPOSED:
                b_values = b.load([tile_n * BLOCK_N, start]).T
            else:
                b_values = b.load([start, tile_n * BLOCK_N])
            accumulator = tl.dot(a_values, b_values, accumulator)

        rows = row + tl.arange(0, BLOCK_M)
        parts = column_groups(accumulator, EPILOGUE_PARTS)
        for part in tl.static_range(EPILOGUE_PARTS):
            column = tile_n * BLOCK_N + part * WIDTH
            apply_epilogue(
                parts[part], bias, residual, preactivation, kept, out, column_partials,
                (row, column), None, tile_m, rows, column + tl.arange(0, WIDTH), M, N, ACTIVATION,
            )  # fmt: skip


@triton.jit
def column_groups(tile, GROUPS: tl.constexpr):
    """``tile`` [M, N] as a tuple of GROUPS tiles [M, N / GROUPS] from left to right; GROUPS is 1, 2 or 4."""
    if GROUPS == 1:
        groups = (tile,)
    else:
        left, right = halves(tile)
        if GROUPS == 2:
            groups = (left, right)
        else:
            groups = halves(left) + halves(right)
    return groups


@triton.jit
def halves(tile):
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@dataclass(frozen=True)
class PersistentMatmulConfig:
    """Tile sizes, tile rows a group, groups of columns in the epilogue, warps a program, stages and programs at most.

    ``EPILOGUE_PARTS``, 1, 2 or 4, is for matrices of 16 bits. ``PROGRAMS`` is how many programs a multiprocessor holds
    at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    EPILOGUE_PARTS: int
    PROGRAMS: int
    num_warps: int
    num_stages: int

    def epilogue_parts(self, itemsize: int) -> int:
        """Groups of columns where the epilogue's widest matrix has so many bytes an element: no more bytes a group."""
        return min(self.EPILOGUE_PARTS * itemsize // 2, 4)


@functools.cache
def has_descriptors() -> bool:
    """Whether this release of Triton makes tensor descriptors on the host."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def rows_of(matrix: Tensor) -> Tensor:
    """``matrix`` [R, C] or its transpose, whichever has the unit stride inside."""
    return matrix if matrix.stride(1) == 1 else matrix.t()


def is_describable(matrix: Tensor) -> bool:
    """Whether a descriptor can describe ``matrix``: not empty, 16-byte base and row stride, no overlapping rows."""
    rows = rows_of(matrix)
    step = rows.stride(0)
    aligned = matrix.data_ptr() % 16 == 0 and step * matrix.element_size() % 16 == 0
    return aligned and rows.stride(1) == 1 and step >= rows.shape[1] > 0 and rows.shape[0] > 0


def serves(product: Product) -> bool:
    """Whether the kernel can compute ``product``."""
    matrices = (product.a, product.b, product.residual, product.preactivation, product.kept, product.out)
    return has_descriptors() and all(is_describable(matrix) for matrix in matrices if matrix is not None)


def launch(product: Product, config: PersistentMatmulConfig, multiprocessors: int) -> Tensor | None:
    """Compute ``product``; returns the partial sums of its columns, None unless asked for."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        """Of tiles [rows, columns] of ``matrix``, in the order of its memory."""
        stored = rows_of(matrix)
        block = [rows, columns] if stored is matrix else [columns, rows]
        return TensorDescriptor(stored, list(stored.shape), list(stored.stride()), block)

    M, N, K = product.shape
    constants = asdict(config)
    programs = constants.pop("PROGRAMS") * multiprocessors
    matrices = (product.residual, product.preactivation, product.kept, product.out)
    parts = config.epilogue_parts(max(matrix.element_size() for matrix in matrices if matrix is not None))
    residual, preactivation, kept, out = (
        None if matrix is None else described(matrix, config.BLOCK_M, config.BLOCK_N // parts) for matrix in matrices
    )
    partials = product.column_partials(config.BLOCK_M)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    with torch.cuda.device_of(product.a):
        persistent_matmul_kernel[(min(programs, tiles),)](
            described(product.a, config.BLOCK_M, config.BLOCK_K), described(product.b, config.BLOCK_K, config.BLOCK_N),
            product.bias, residual, preactivation, kept, out, partials,
            M, N, K,
            A_IS_TRANSPOSED=rows_of(product.a) is not product.a,
            B_IS_TRANSPOSED=rows_of(product.b) is not product.b,
            ACTIVATION=product.activation,
            **constants | {"EPILOGUE_PARTS": parts},
        )  # fmt: skip
    return partials


def variants(arch: Architecture) -> list[Variant]:
    """Every bucket that ships, operand layout, epilogue, operand dtype and output dtype at least once."""
    if not has_descriptors():
        return []
    shipped = configurations("matmul_persistent", PersistentMatmulConfig)
    return [
        _variant(shipped[arch.name, bucket], bucket, layout, dtype, out_dtype, epilogue)
        for bucket, layout, dtype, out_dtype, epilogue in (
            ("wide", "forward", "fp16", "fp16", "none"),
            ("wide", "grad_a", "bf16", "bf16", "none"),
            ("wide", "grad_b", "fp16", "fp16", "none"),
            ("large", "forward", "fp16", "fp16", "gelu+keep+add"),
            ("large", "forward", "bf16", "fp32", "gelu+keep+add"),
            ("large", "grad_a", "fp16", "fp16", "slope"),
            ("large", "grad_b", "fp16", "fp32", "add"),
            ("medium", "forward", "fp16", "fp16", "gelu+keep+add"),
            ("medium", "grad_a", "fp16", "fp16", "slope"),
            ("medium", "grad_b", "bf16", "fp32", "add"),
        )
        if (arch.name, bucket) in shipped
    ]


def _variant(
    config: PersistentMatmulConfig, bucket: str, layout: str, dtype: str, out_dtype: str, epilogue: str
) -> Variant:
    tiles = asdict(config)
    num_warps, num_stages, _ = (tiles.pop(name) for name in ("num_warps", "num_stages", "PROGRAMS"))
    M, N, K = tile = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    parts = config.epilogue_parts(max(BYTES[dtype], BYTES[out_dtype]))
    part = [M, N // parts]
    unit_strides, _ = LAYOUTS[layout]
    kinds = dtype if out_dtype == dtype else f"{dtype},{out_dtype}"
    a_is_transposed, b_is_transposed = "a_stride_m" in unit_strides, "b_stride_k" in unit_strides
    types = {
        "a": f"tensordesc<{dtype}{[K, M] if a_is_transposed else [M, K]}>",
        "b": f"tensordesc<{dtype}{[N, K] if b_is_transposed else [K, N]}>",
        "bias": f"*{dtype}",
        "residual": f"tensordesc<{out_dtype}{part}>",
        "preactivation": f"tensordesc<{dtype}{part}>",
        "kept": f"tensordesc<{dtype}{part}>",
        "out": f"tensordesc<{out_dtype}{part}>",
        "column_partials": "*fp32",
        **dict.fromkeys(("M", "N", "K"), "i32"),
    }
    constants = epilogue_constants(epilogue, bias=layout == "forward")
    signature = {name: kind for name, kind in types.items() if name not in constants}
    return Variant(
        name=f"persistent_matmul[{bucket},{layout},{kinds},{epilogue}]",
        function=persistent_matmul_kernel,
        signature=signature,
        constexprs={
            **tiles,
            "EPILOGUE_PARTS": parts,
            "A_IS_TRANSPOSED": a_is_transposed,
            "B_IS_TRANSPOSED": b_is_transposed,
            **constants,
        },
        divisible_by_16=tuple(name for name in ("bias", "column_partials", "N", "K") if name in signature),
        num_warps=num_warps,
        num_stages=num_stages,
        work=MatrixProduct(tile, (BYTES[dtype], BYTES[dtype], BYTES[out_dtype]), SHAPES[bucket]),
    )
