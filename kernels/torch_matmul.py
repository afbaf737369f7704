"""torch's own matrix product in the place of ``mixft.kernels.matmul``, with the same epilogue and FP32 sums.

It serves FP32 operands, GPUs whose 16-bit products Triton does not map to matrix instructions, and products with
nothing fused where it is the faster one.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Each lets cuBLAS keep sums, or the partial sums of a split product, in 16 bits; torch sets the first two by default.
SETTINGS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_lock = threading.Lock()


@contextlib.contextmanager
def full_precision_sums() -> Iterator[None]:
    """Within the block torch's 16-bit products on a GPU are summed in FP32 throughout, split or not."""
    backend = torch.backends.cuda.matmul
    with _lock:  # backward runs in a thread of its own
        allowed = [name for name in SETTINGS if _is_allowed(backend, name)]
        for name in allowed:
            setattr(backend, name, False)
        try:
            yield
        finally:
            for name in allowed:
                setattr(backend, name, True)


def _is_allowed(backend, name: str) -> bool:
    try:
        return getattr(backend, name)
    except (AttributeError, AssertionError):  # torch 2.6 has no such setting, and asserts that it knows the name
        return False


def plain_product_(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """``out = a @ b + bias`` by torch's product of matrices: a [M, K], b [K, N], bias [N], all of one dtype."""
    with full_precision_sums():
        if bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)


def torch_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep_preactivation: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as ``matmul_forward`` from torch's own matmul."""
    same_dtype = out_dtype == a.dtype and (bias is None or bias.dtype == a.dtype)
    if activation == "none" and same_dtype and not keep_preactivation and residual is None:
        with full_precision_sums():
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
    if residual is not None:
        product = product + residual.float()
    return product.to(out_dtype), preactivation
