"""Matrix products with int8 weights.

``int8_matmul`` (W8A8)::

    out[m, n] = act(a_scale[m] * b_scale[n] * sum_k a[m, k] * b[n, k] + bias[n])

a int8 [M, K], b int8 [N, K], scales FP32 [M] and [N], the sum exact in int32, the rest in FP32, one cast at the store.
With zero points z int32 [M] it is the sum of (a[m, k] - z[m]) b[n, k] that is scaled: z[m] times the sum of row n of b
is taken off in int32, which is exact where the result fits, whatever wraps around on the way.

``weight_only_matmul`` (W8A16)::

    out[m, n] = act(b_scale[n] * sum_k a[m, k] * b[n, k] + bias[n])

a FP16 or BF16 [M, K]; int8 values are exact in both, so the product's only rounding is its FP32 sum.

Both store out [M, N] in FP16, BF16 or FP32. Operands are read along K in 16-byte pieces: the launchers copy one that is
N-contiguous, misaligned or of a K that 16 does not divide, since byte-wise loads would cost more than the copy. Where a
few rows make too few tiles for the GPU, the sum over K is split among programs and a second pass adds the parts in
order (``int8_split_k``): the same inputs give the same bits.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl

from .architecture import Architecture, architecture_of, multiprocessors_of
from .configuration import configuration, configurations
from .int8_epilogue import STRIDES, Epilogue, apply_int8_epilogue, epilogue_signature
from .int8_split_k import add_parts, split_count
from .matmul_tiles import MatmulConfig
from .split_k import empty_parts
from .tile_order import tile_of_program
from .torch_matmul import torch_matmul
from .variant import MatrixProduct, Variant

SMALL_M = 32
WIDE = 2**22  # outputs from which on wide tiles give every multiprocessor one


@triton.jit(do_not_specialize=["M"])
def scaled_matmul_kernel(
    a_ptr, b_ptr, parts_ptr,
    a_scale_ptr, b_scale_ptr, a_zero_point_ptr, b_sum_ptr, bias_ptr, out_ptr,
    M, N, K, depth,
    a_stride_m, b_stride_n, a_scale_stride, b_scale_stride, a_zero_point_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    # Columns past the end read the last one again: no mask in the loop, and the store drops them. Rows are masked: most
    # of a decode tile's are past the end, and one row read sixteen times is as much traffic as the weights.
    row_mask = (rows < M)[:, None]
    a_ptrs = a_ptr + rows[:, None] * a_stride_m + inner[None, :]
    b_ptrs = b_ptr + tl.minimum(columns, N - 1)[None, :] * b_stride_n + inner[:, None]
    first, stop = 0, K
    if parts_ptr is not None:
        first = tl.program_id(1) * depth
        stop = tl.minimum(first + depth, K)
        a_ptrs += first
        b_ptrs += first
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(first, stop, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_mask, other=0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=row_mask & (inner[None, :] < K - start), other=0)
            b = tl.load(b_ptrs, mask=inner[:, None] < K - start, other=0)
        if INTEGER:
            accumulator += tl.dot(a, b, out_dtype=tl.int32)
        else:
            accumulator = tl.dot(a, b.to(a.dtype), accumulator, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    if parts_ptr is not None:
        part = parts_ptr + (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
        tl.store(part, accumulator, mask=row_mask & (columns < N)[None, :])
    else:
        apply_int8_epilogue(
            accumulator, rows, columns, M, N,
            a_scale_ptr, b_scale_ptr, a_zero_point_ptr, b_sum_ptr, bias_ptr, out_ptr,
            a_scale_stride, b_scale_stride, a_zero_point_stride, ACTIVATION,
        )  # fmt: skip


def int8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the W8A8 product of the module docstring.

    ``a_scale`` [M, 1] and ``b_scale`` [N, 1], any strides; ``a_zero_point`` int32 [M, 1], any strides, with ``b_sum``
    int32 [N], contiguous, the sums of the rows of ``b``; or neither.
    """
    return _launch("int8_matmul", a, b, a_scale, b_scale, bias, activation, out_dtype, a_zero_point, b_sum)


def weight_only_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the W8A16 product of the module docstring. ``b_scale`` [N, 1].

    FP32 activations have no matrix instruction that keeps their precision: torch's own product serves them.
    """
    if a.dtype == torch.float32:
        return torch_matmul(a, (b * b_scale).t(), bias, activation, out_dtype, False)[0]
    return _launch("weight_only_matmul", a, b, None, b_scale, bias, activation, out_dtype)


def _launch(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    M, N = a.shape[0], b.shape[0]
    out = torch.empty((M, N), device=a.device, dtype=out_dtype)
    if out.numel() == 0:
        return out
    arch = architecture_of(a.device)
    if not arch.tensor_cores:
        kind = "int8" if a.dtype == torch.int8 else "16-bit"
        raise RuntimeError(
            f"mixft.{op} needs {kind} matrix instructions, and {arch.name} has none that Triton can use; call "
            "mixft.dequantize_(model) there, or move it to the CPU"
        )
    shape = bucket(op, M, N, activation, arch)
    config = configuration(op, MatmulConfig, arch, shape)
    a, b = _readable(a), _readable(b)
    K = a.shape[1]
    tiles, blocks = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N), triton.cdiv(K, config.BLOCK_K)
    splits = split_count(tiles, blocks, multiprocessors_of(a.device, arch)) if shape == "small" else 1
    parts, depth = None, None
    if splits > 1:
        part_dtype = torch.int32 if a.dtype == torch.int8 else torch.float32
        parts, depth = empty_parts((M, N, K), config.BLOCK_K, splits, part_dtype, a.device)
    epilogue = Epilogue(out, a_scale, b_scale, a_zero_point, b_sum, bias, activation)
    with torch.cuda.device_of(a):
        scaled_matmul_kernel[(tiles, 1 if parts is None else parts.shape[0])](
            a_ptr=a,
            b_ptr=b,
            parts_ptr=parts,
            M=M,
            N=N,
            K=K,
            depth=depth,
            a_stride_m=a.stride(0),
            b_stride_n=b.stride(0),
            **epilogue.arguments(),
            EVEN_K=K % config.BLOCK_K == 0,
            **asdict(config),
        )
    if parts is not None:
        add_parts(parts, epilogue)
    return out


def bucket(op: str, M: int, N: int, activation: str, arch: Architecture) -> str:
    """The shape bucket of a product [M, N]; wide tiles, where shipped, have no registers left for an activation."""
    if M <= SMALL_M:
        return "small"
    fits = activation == "none" and M * N >= WIDE and (arch.name, "wide") in configurations(op, MatmulConfig)
    return "wide" if fits else "large"


def _readable(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` itself where 16-byte loads along K are possible, else a copy, its K padded to a multiple of 16."""
    K = matrix.shape[1]
    if K % 16 == 0 and matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    padded = matrix.new_zeros((matrix.shape[0], triton.cdiv(K, 16) * 16))
    padded[:, :K] = matrix
    return padded


def variants(arch: Architecture) -> list[Variant]:
    """The W8A8 and W8A16 products in each bucket, plain with whole blocks of K, and with an epilogue and a ragged K.

    W8A8 in "small" and "large" also with zero points, and both products in "small" also in parts.
    """
    if not arch.tensor_cores:
        return []
    operand = {"int8_matmul": ("i8", "fp16"), "weight_only_matmul": ("fp16", "fp16")}
    found = []
    for op, (a_type, out_type) in operand.items():
        for (name, bucket), config in configurations(op, MatmulConfig).items():
            if name != arch.name:
                continue
            for epilogue, even in (("none", True), ("none" if bucket == "wide" else "gelu", False)):
                found.append(_variant(op, bucket, config, a_type, out_type, epilogue, even))
            if op == "int8_matmul" and bucket != "wide":
                found.append(_variant(op, bucket, config, a_type, out_type, "gelu", True, kind="affine"))
            if bucket == "small":
                found.append(_variant(op, bucket, config, a_type, out_type, "none", True, kind="parts"))
    return found


def _variant(
    op: str,
    bucket: str,
    config: MatmulConfig,
    a_type: str,
    out_type: str,
    epilogue: str,
    even: bool,
    kind: str | None = None,
) -> Variant:
    """One variant; ``kind`` is "affine" with zero points, "parts" of a split sum, None of neither."""
    w8a8 = op == "int8_matmul"
    types, lacking = epilogue_signature(out_type, a_scale=w8a8, affine=kind == "affine", bias=not even)
    pointers = {"a_ptr": f"*{a_type}", "b_ptr": "*i8"}
    integers = ["M", "N", "K", "a_stride_m", "b_stride_n"]
    if kind == "parts":
        pointers["parts_ptr"] = "*i32" if w8a8 else "*fp32"
        integers += ["depth"]
    else:
        lacking = {"parts_ptr": None, "depth": None, **lacking}
    tile = asdict(config)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    signature = pointers | types | dict.fromkeys(integers, "i32")
    return Variant(
        name=f"{op}[{','.join([a_type, epilogue, bucket, 'even' if even else 'ragged', *([kind] if kind else [])])}]",
        function=scaled_matmul_kernel,
        signature=signature,
        constexprs={**lacking, **tile, "EVEN_K": even, "ACTIVATION": epilogue},
        divisible_by_16=tuple(name for name in signature if name not in ("M", *STRIDES)),
        num_warps=num_warps,
        num_stages=num_stages,
        work=MatrixProduct(
            (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
            (1 if w8a8 else 2, 1, 2),
            (16 if bucket == "small" else 4096, 4096, 4096),
            int8=w8a8,
        ),
    )
