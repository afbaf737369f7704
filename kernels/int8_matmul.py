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
N-contiguous, misaligned or of a K that 16 does not divide, since byte-wise loads would cost more than the copy.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activation import activate
from .architecture import Architecture, architecture_of
from .configuration import configuration, configurations
from .matmul import torch_matmul
from .tile_order import tile_of_program
from .variant import MatrixProduct, Variant

SMALL_M = 32
WIDE = 2**22  # outputs from which on wide tiles give every multiprocessor one


@dataclass(frozen=True)
class Int8MatmulConfig:
    """Launch configuration of one product; field names as in the kernels."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["M"])
def scaled_matmul_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    a_zero_point_ptr,
    b_sum_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_bn,
    stride_a_scale,
    stride_b_scale,
    stride_a_zero_point,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_A_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Columns past the end read the last one again: no mask in the loop, and the store drops them. Rows are masked: most
    # of a decode tile's are past the end, and one row read sixteen times is as much traffic as the weights.
    row_mask = (rows < M)[:, None]
    read_rows = rows.to(tl.int64)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    a_ptrs = a_ptr + read_rows[:, None] * stride_am + inner[None, :]
    b_ptrs = b_ptr + read_columns[None, :] * stride_bn + inner[:, None]
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
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

    if a_zero_point_ptr is not None:
        zero_point = tl.load(a_zero_point_ptr + read_rows * stride_a_zero_point, mask=rows < M, other=0)
        accumulator -= zero_point[:, None] * tl.load(b_sum_ptr + read_columns)[None, :]
    result = accumulator.to(tl.float32)
    valid_columns = columns < N
    if HAS_A_SCALE:
        result *= tl.load(a_scale_ptr + read_rows * stride_a_scale, mask=rows < M, other=0.0)[:, None]
    result *= tl.load(b_scale_ptr + read_columns * stride_b_scale)[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=valid_columns, other=0.0).to(tl.float32)[None, :]
    result = activate(result, ACTIVATION)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=row_mask & valid_columns[None, :])


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


def _launch(op, a, b, a_scale, b_scale, bias, activation, out_dtype, a_zero_point=None, b_sum=None):
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty((M, N), device=a.device, dtype=out_dtype)
    if out.numel() == 0:
        return out
    arch = architecture_of(a.device)
    if not arch.tensor_cores:
        raise RuntimeError(f"mixft.{op} needs int8 matrix instructions; {arch.name} has none that Triton can use")
    config = configuration(op, Int8MatmulConfig, arch, bucket(op, M, N, activation, arch))
    a, b = _readable(a), _readable(b)
    K = a.shape[1]
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    with torch.cuda.device_of(a):
        scaled_matmul_kernel[grid](
            a,
            b,
            a_scale if a_scale is not None else b_scale,
            b_scale,
            a_zero_point,
            b_sum,
            bias.contiguous() if bias is not None else b_scale,
            out,
            M,
            N,
            K,
            a.stride(0),
            b.stride(0),
            a_scale.stride(0) if a_scale is not None else 0,
            b_scale.stride(0),
            a_zero_point.stride(0) if a_zero_point is not None else 0,
            out.stride(0),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            GROUP_M=config.GROUP_M,
            EVEN_K=K % config.BLOCK_K == 0,
            HAS_A_SCALE=a_scale is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def bucket(op: str, M: int, N: int, activation: str, arch: Architecture) -> str:
    """The shape bucket of a product [M, N]; wide tiles, where shipped, have no registers left for an activation."""
    if M <= SMALL_M:
        return "small"
    fits = activation == "none" and M * N >= WIDE and (arch.name, "wide") in configurations(op, Int8MatmulConfig)
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

    W8A8 in "small" and "large" also with zero points.
    """
    if not arch.tensor_cores:
        return []
    operand = {"int8_matmul": ("i8", "fp16"), "weight_only_matmul": ("fp16", "fp16")}
    found = []
    for op, (a_type, out_type) in operand.items():
        for (name, bucket), config in configurations(op, Int8MatmulConfig).items():
            if name != arch.name:
                continue
            for epilogue, even in (("none", True), ("none" if bucket == "wide" else "gelu", False)):
                found.append(_variant(op, bucket, config, a_type, out_type, epilogue, even, affine=False))
            if op == "int8_matmul" and bucket != "wide":
                found.append(_variant(op, bucket, config, a_type, out_type, "gelu", True, affine=True))
    return found


def _variant(op, bucket, config, a_type, out_type, epilogue, even, *, affine):
    pointers = {
        "a_ptr": f"*{a_type}",
        "b_ptr": "*i8",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        **({"a_zero_point_ptr": "*i32", "b_sum_ptr": "*i32"} if affine else {}),
        "bias_ptr": f"*{out_type}",
        "out_ptr": f"*{out_type}",
    }
    sizes = ("M", "N", "K", "stride_am", "stride_bn", "stride_a_scale", "stride_b_scale", "stride_a_zero_point")
    return Variant(
        name=f"{op}[{a_type},{epilogue},{bucket},{'even' if even else 'ragged'}{',affine' if affine else ''}]",
        function=scaled_matmul_kernel,
        signature={**pointers, **dict.fromkeys((*sizes, "stride_out"), "i32")},
        constexprs={
            **({} if affine else {"a_zero_point_ptr": None, "b_sum_ptr": None}),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "GROUP_M": config.GROUP_M,
            "EVEN_K": even,
            "HAS_A_SCALE": op == "int8_matmul",
            "HAS_BIAS": not even,
            "ACTIVATION": epilogue,
        },
        divisible_by_16=(*pointers, "N", "K", "stride_am", "stride_bn", "stride_out"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        work=MatrixProduct(
            (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
            (1 if a_type == "i8" else 2, 1, 2),
            (16 if bucket == "small" else 4096, 4096, 4096),
            int8=a_type == "i8",
        ),
    )
