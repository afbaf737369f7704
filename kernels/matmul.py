"""Matrix product of 16-bit operands with FP32 accumulation and a fused epilogue.

    preactivation[i, j] = sum_k a[i, k] b[k, j] + bias[j]
    out = activation(preactivation)

``a`` is [..., M, K] and ``b`` [K, N], both FP16 or both BF16, any strides; ``bias`` is [N]. Sum, bias and activation
are FP32, with one cast at the store of ``out`` [..., M, N] in FP16, BF16 or FP32. The sum over K runs in one program in
a fixed order, so a result is the same on every run.

The backward pass needs d activation / d preactivation. The kernel stores the pre-activation beside ``out`` in the dtype
of ``a``: the slopes of GELU and SiLU change by less than 0.8 for each unit of their argument, and not at all far from
zero, so its rounding costs the gradient no more than the gradient's own 16 bits do, at half the memory of FP32.

FP32 operands, and GPUs whose 16-bit products Triton does not map to matrix instructions, are served by torch's own
matmul.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, activation_derivative
from .architecture import Architecture, architecture_of
from .configuration import configuration
from .tile_order import tile_of_program
from .variant import Elementwise, MatrixProduct, Variant


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    a,
    b,
    bias,
    out,
    preactivation,
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_PREACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    program_m, program_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)

    rows = program_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask = rows[:, None] < M
    column_mask = columns[None, :] < N

    a_tile = a + rows[:, None].to(tl.int64) * a_stride_m + depth[None, :].to(tl.int64) * a_stride_k
    b_tile = b + depth[:, None].to(tl.int64) * b_stride_k + columns[None, :].to(tl.int64) * b_stride_n
    a_step = tl.cast(BLOCK_K, tl.int64) * a_stride_k
    b_step = tl.cast(BLOCK_K, tl.int64) * b_stride_k

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_values = tl.load(a_tile, mask=row_mask, other=0.0)
            b_values = tl.load(b_tile, mask=column_mask, other=0.0)
        else:
            a_values = tl.load(a_tile, mask=row_mask & (depth[None, :] < K - start), other=0.0)
            b_values = tl.load(b_tile, mask=column_mask & (depth[:, None] < K - start), other=0.0)
        accumulator = tl.dot(a_values, b_values, accumulator)
        a_tile += a_step
        b_tile += b_step

    if HAS_BIAS:
        accumulator += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    mask = row_mask & column_mask
    if KEEP_PREACTIVATION:
        tl.store(preactivation + offsets, accumulator.to(preactivation.dtype.element_ty), mask=mask)
    result = activate(accumulator, ACTIVATION)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    grad,
    kept,
    out,
    bias_partial,
    M,
    N,
    grad_stride_m,
    grad_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for block in range(BLOCKS):
        rows = (tl.program_id(0) * BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        grad_offsets = rows[:, None].to(tl.int64) * grad_stride_m + columns[None, :].to(tl.int64) * grad_stride_n
        offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
        slope = activation_derivative(tl.load(kept + offsets, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        value = tl.load(grad + grad_offsets, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)
        if WANT_BIAS:
            column_sum += tl.sum(value, axis=0)
    if WANT_BIAS:
        partial_offsets = tl.program_id(0).to(tl.int64) * N + columns
        tl.store(bias_partial + partial_offsets, column_sum, mask=columns < N)


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes of the product kernel, tile rows a group, warps a program and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ActivationBackwardConfig:
    """Tile sizes of the elementwise backward kernel, and how many row tiles one program adds up."""

    BLOCK_M: int = 8
    BLOCK_N: int = 256
    BLOCKS: int = 8
    num_warps: int = 4


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


def bucket(a: Tensor, b: Tensor, activation: str) -> str:
    """The shape bucket of a product [M, N]: which tiles keep its pointers, masks and sums within the registers."""
    M, N = a.shape[0], b.shape[1]
    if N % 16 or not (loads_16_bytes(a) and loads_16_bytes(b)):
        return "unaligned"
    if M <= 32:
        return "small"
    if M * N <= 2**21:
        return "medium"
    return "wide" if activation == "none" else "large"


def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """``activation(a @ b + bias)`` and the pre-activation in ``a``'s dtype, an empty tensor unless asked for."""
    arch = architecture_of(a.device)
    if a.dtype == torch.float32 or not arch.tensor_cores:
        return torch_matmul(a, b, bias, activation, out_dtype, keep_preactivation)
    lead = a.shape[:-1]
    K, N = b.shape
    M = math.prod(lead)
    a = a.reshape(M, K)
    out = torch.empty((*lead, N), dtype=out_dtype, device=a.device)
    preactivation = torch.empty((*lead, N) if keep_preactivation else (0,), dtype=a.dtype, device=a.device)
    if M == 0 or N == 0:
        return out, preactivation
    config = configuration("matmul", MatmulConfig, arch, bucket(a, b, activation))
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    with torch.cuda.device_of(a):
        matmul_kernel[grid](
            a,
            b,
            # A pointer that the kernel does not read still has to be one.
            a if bias is None else bias.contiguous(),
            out,
            preactivation if keep_preactivation else out,
            M,
            N,
            K,
            *a.stride(),
            *b.stride(),
            EVEN_K=K % config.BLOCK_K == 0,
            HAS_BIAS=bias is not None,
            KEEP_PREACTIVATION=keep_preactivation,
            ACTIVATION=activation,
            **asdict(config),
        )
    return out, preactivation


def torch_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """The same as ``matmul_forward`` from torch's own matmul, for dtypes and GPUs without a kernel."""
    same_dtype = out_dtype == a.dtype and (bias is None or bias.dtype == a.dtype)
    if activation == "none" and same_dtype and not keep_preactivation:
        return F.linear(a, b.t(), bias), a.new_empty(0)
    # 16-bit operands are widened first, so that nothing is rounded between the sum and the one cast.
    product = F.linear(a.float(), b.float().t(), None if bias is None else bias.float())
    preactivation = product.to(a.dtype, copy=True) if keep_preactivation else a.new_empty(0)
    if activation == "relu":
        product = F.relu(product)
    elif activation == "gelu":
        product = F.gelu(product)
    elif activation == "gelu_tanh":
        product = F.gelu(product, approximate="tanh")
    elif activation == "silu":
        product = F.silu(product)
    return product.to(out_dtype), preactivation


def activation_backward(
    grad: Tensor, kept: Tensor, activation: str, dtype: torch.dtype, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """``grad * d activation(kept)`` [M, N] in ``dtype`` and its FP32 sum over rows [N], empty unless asked for.

    ``grad`` is [M, N] with any strides, ``kept`` the pre-activation of as many elements; for ReLU its output serves.
    """
    M, N = grad.shape
    config = ActivationBackwardConfig()
    grid = (triton.cdiv(M, config.BLOCK_M * config.BLOCKS), triton.cdiv(N, config.BLOCK_N))
    out = torch.empty((M, N), dtype=dtype, device=grad.device)
    bias_partial = torch.empty((grid[0] if want_bias else 0, N), dtype=torch.float32, device=grad.device)
    if M > 0 and N > 0:
        with torch.cuda.device_of(grad):
            activation_backward_kernel[grid](
                grad,
                kept.contiguous(),
                out,
                bias_partial if want_bias else out,
                M,
                N,
                *grad.stride(),
                WANT_BIAS=want_bias,
                ACTIVATION=activation,
                num_stages=1,
                **asdict(config),
            )
    # Partial sums added by a second, ordered pass: atomics would make the gradient differ from run to run.
    return out, bias_partial.sum(0) if want_bias else bias_partial.new_empty(0)


# The operand layouts of forward (a @ weight.t()), grad_a (grad @ weight) and grad_b (grad.t() @ a): which strides are
# 1, and which extent is the number of tokens, the one that need not be divisible by 16.
LAYOUTS = {
    "forward": (("a_stride_k", "b_stride_k"), "M"),
    "grad_a": (("a_stride_k", "b_stride_n"), "M"),
    "grad_b": (("a_stride_m", "b_stride_n"), "K"),
}

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}

# (M, N, K) of a product in each bucket, for which times are estimated.
SHAPES = {
    "small": (16, 4096, 4096),
    "medium": (512, 4096, 4096),
    "large": (4096, 4096, 4096),
    "wide": (4096, 4096, 4096),
    "unaligned": (4095, 4095, 4095),
}


def variants(arch: Architecture) -> list[Variant]:
    """Every bucket, operand layout, activation, operand dtype and output dtype at least once."""
    elementwise = [
        activation_backward_variant("bf16", "silu", "fp32", want_bias=False),
        activation_backward_variant("fp16", "gelu", "fp16", want_bias=True),
    ]
    if not arch.tensor_cores:
        return elementwise
    return [
        *elementwise,
        matmul_variant(arch, "unaligned", "forward", "bf16", "bf16", "gelu", keep=True),
        matmul_variant(arch, "unaligned", "grad_a", "fp16", "fp32", "none"),
        matmul_variant(arch, "small", "forward", "fp16", "fp16", "silu"),
        matmul_variant(arch, "medium", "forward", "fp16", "fp16", "gelu_tanh", keep=True),
        matmul_variant(arch, "medium", "grad_b", "bf16", "bf16", "none"),
        matmul_variant(arch, "large", "forward", "fp16", "fp16", "gelu", keep=True),
        matmul_variant(arch, "large", "forward", "bf16", "fp32", "relu"),
        matmul_variant(arch, "wide", "forward", "fp16", "fp16", "none"),
        matmul_variant(arch, "wide", "grad_a", "bf16", "bf16", "none"),
        matmul_variant(arch, "wide", "grad_b", "fp16", "fp16", "none"),
    ]


def matmul_variant(
    arch: Architecture,
    bucket: str,
    layout: str,
    dtype: str,
    out_dtype: str,
    activation: str,
    *,
    keep: bool = False,
) -> Variant:
    config = asdict(configuration("matmul", MatmulConfig, arch, bucket))
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    tile = (config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"])
    unit_strides, token_count = LAYOUTS[layout]
    pointers = {"a": dtype, "b": dtype, "bias": dtype, "out": out_dtype, "preactivation": dtype}
    operand_bytes = (BYTES[dtype], BYTES[dtype], BYTES[out_dtype])
    integers = ["M", "N", "K", "a_stride_m", "a_stride_k", "b_stride_k", "b_stride_n"]
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= {name: "i32" for name in integers if name not in unit_strides}
    aligned = [name for name in signature if name != token_count]
    return Variant(
        name=f"matmul[{bucket},{layout},{dtype},{out_dtype},{activation}]",
        function=matmul_kernel,
        signature=signature,
        constexprs={
            **config,
            **dict.fromkeys(unit_strides, 1),
            "EVEN_K": bucket != "unaligned" and token_count != "K",
            "HAS_BIAS": layout == "forward",
            "KEEP_PREACTIVATION": keep,
            "ACTIVATION": activation,
        },
        divisible_by_16=tuple(pointers if bucket == "unaligned" else aligned),
        num_warps=num_warps,
        num_stages=num_stages,
        wide_loads=bucket != "unaligned",
        work=MatrixProduct(tile, operand_bytes, SHAPES[bucket]),
    )


def activation_backward_variant(dtype: str, activation: str, grad_dtype: str, *, want_bias: bool) -> Variant:
    config = asdict(ActivationBackwardConfig())
    num_warps = config.pop("num_warps")
    signature = {"grad": f"*{grad_dtype}", "kept": f"*{dtype}", "out": f"*{dtype}", "bias_partial": "*fp32"}
    signature |= {"M": "i32", "N": "i32", "grad_stride_m": "i32"}
    return Variant(
        name=f"activation_backward[{dtype},{grad_dtype},{activation}]",
        function=activation_backward_kernel,
        signature=signature,
        constexprs={**config, "grad_stride_n": 1, "WANT_BIAS": want_bias, "ACTIVATION": activation},
        divisible_by_16=tuple(signature),
        num_warps=num_warps,
        work=Elementwise(config["BLOCK_M"] * config["BLOCK_N"], BYTES[grad_dtype] + 2 * BYTES[dtype]),
    )
