"""Matrix products of 16-bit operands with FP32 accumulation and a fused epilogue, and which kernel computes them.

    preactivation[i, j] = sum_k a[i, k] b[k, j] + bias[j]
    out = activation(preactivation) + residual

``a`` is [..., M, K] and ``b`` [K, N], both FP16 or both BF16, any strides; ``bias`` is [N], ``residual`` [..., M, N].
Sum and epilogue are FP32, with one cast at the store of ``out`` [..., M, N] in FP16, BF16 or FP32. Every kernel adds
over K in a fixed order, so a result is the same on every run.

The backward pass needs d activation / d preactivation. The kernel stores the pre-activation beside ``out`` in the dtype
of ``a``: the slopes of GELU and SiLU change by less than 0.8 for each unit of their argument, and not at all far from
zero, so its rounding costs the gradient no more than the gradient's own 16 bits do, at half the memory of FP32.

=================================================  =====================================================
product                                            computed by
=================================================  =====================================================
FP32 operands; no matrix instructions in Triton    torch
nothing fused, where ``plain_matmul.json`` says    torch
too few tiles for the GPU, and a long sum          :mod:`.matmul_split_k`
aligned, on an architecture with descriptors       :mod:`.matmul_persistent`
any other                                          :mod:`.matmul_tiles`
=================================================  =====================================================
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import matmul_persistent, matmul_split_k, matmul_tiles
from .activation_backward import activation_backward
from .architecture import Architecture, architecture_of, multiprocessors_of
from .configuration import configuration, configurations
from .matmul_epilogue import Product
from .matmul_persistent import PersistentMatmulConfig
from .matmul_tiles import MatmulConfig, bucket
from .torch_matmul import plain_product_, torch_matmul


@dataclass(frozen=True)
class PlainMatmulConfig:
    """Who computes a product with nothing fused but a bias: ``"torch"`` or ``"mixft"``."""

    SERVED_BY: str


def matmul_forward(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``activation(a @ b + bias) + residual`` and the pre-activation in ``a``'s dtype, empty unless asked for."""
    arch = architecture_of(a.device)
    if a.dtype == torch.float32 or not arch.tensor_cores:
        return torch_matmul(a, b, bias, activation, out_dtype, keep_preactivation, residual)
    lead = a.shape[:-1]
    K, N = b.shape
    a = a.reshape(math.prod(lead), K)
    out = torch.empty((*lead, N), dtype=out_dtype, device=a.device)
    preactivation = torch.empty((*lead, N) if keep_preactivation else (0,), dtype=a.dtype, device=a.device)
    product = Product(
        a,
        b,
        out.view(a.shape[0], N),
        activation,
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous().view(a.shape[0], N),
        preactivation.view(a.shape[0], N) if keep_preactivation else None,
    )
    if product.is_plain and served_by_torch(product, arch):
        plain_product_(product.out, a, b, bias)
    else:
        compute(product, arch)
    return out, preactivation


def matmul_activation_backward(
    a: Tensor, b: Tensor, kept: Tensor, activation: str, want_sum: bool
) -> tuple[Tensor, Tensor]:
    """``(a @ b) * d activation(kept)`` [M, N] in ``a``'s dtype and its FP32 sum over rows [N], empty unless asked for.

    ``a`` [M, K] is the gradient of the layer after an activation and ``b`` [K, N] its weight; ``kept`` [M, N] is the
    pre-activation, for ReLU its output serves.
    """
    arch = architecture_of(a.device)
    if a.dtype == torch.float32 or not arch.tensor_cores:
        grad = torch_matmul(a, b, None, "none", torch.float32, False)[0]
        return activation_backward(grad, kept, activation, a.dtype, want_sum)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    product = Product(a, b, out, activation, kept=kept.contiguous().view(out.shape), column_sum=want_sum)
    partials = compute(product, arch)
    return out, out.new_empty(0, dtype=torch.float32) if partials is None else partials.sum(0)


def matmul_accumulate_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` for a contiguous FP32 ``out`` [M, N]: each of its elements is read and written once."""
    arch = architecture_of(a.device)
    if a.dtype == torch.float32 or not arch.tensor_cores:
        out.add_(torch_matmul(a, b, None, "none", torch.float32, False)[0])
    else:
        compute(Product(a, b, out, residual=out), arch)


def compute(product: Product, arch: Architecture) -> Tensor | None:
    """Compute ``product`` by the kernel of the module docstring; returns what that kernel's launcher does."""
    if product.out.numel() == 0:
        return product.column_partials(1)
    config = configuration("matmul", MatmulConfig, arch, bucket(product))
    multiprocessors = multiprocessors_of(product.a.device, arch)
    splits = matmul_split_k.split_count(product, config, multiprocessors)
    if splits > 1:
        return matmul_split_k.launch(product, config, splits)
    persistent = persistent_configuration(product, arch)
    if persistent is not None:
        return matmul_persistent.launch(product, persistent, multiprocessors)
    return matmul_tiles.launch(product, config)


def persistent_configuration(product: Product, arch: Architecture) -> PersistentMatmulConfig | None:
    """The configuration of the persistent kernel for ``product``; None where another kernel serves it."""
    shipped = configurations("matmul_persistent", PersistentMatmulConfig)
    config = shipped.get((arch.name, product.size))
    return config if config is not None and matmul_persistent.serves(product) else None


def served_by_torch(product: Product, arch: Architecture) -> bool:
    """Whether the shipped data says that torch's product, cuBLAS or hipBLASLt, is the faster one."""
    if is_interpreted(product):
        return False
    shipped = configurations("plain_matmul", PlainMatmulConfig)
    return shipped[arch.name, bucket(product)].SERVED_BY == "torch"


def is_interpreted(product: Product) -> bool:
    """Whether Triton's interpreter is to compute ``product``, which is there for the kernels' sake."""
    return product.a.device.type == "cpu"
