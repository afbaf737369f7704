"""Operands of a matmul, its result in FP64 and torch's own, for the tests of everything that multiplies."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
HALF = [torch.float16, torch.bfloat16]


def operands(m, k, n, dtype, device, lead=()):
    a = torch.randn(*lead, m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype) / max(k, 1) ** 0.5
    return a, b, torch.randn(n, device=device, dtype=dtype)


def exact(a, b, bias, activation):
    total = a.double() @ b.double()
    return ACTIVATIONS[activation](total if bias is None else total + bias.double())


def torch_result(a, b, bias, activation, dtype=None):
    """torch's own result at the operands' dtype, or of operands that are first cast to ``dtype``, on the CPU."""
    a, b, bias = (x if x is None else x.cpu().to(dtype or x.dtype) for x in (a, b, bias))
    return ACTIVATIONS[activation](F.linear(a, b.t(), bias))
