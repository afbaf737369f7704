"""What the launchers really launch: their calls, recorded and specialised as Triton does, as variants to compile.

Triton compiles an integer argument of 1 as that constant, and takes other integers and pointers that 16 divides to be
divisible by it; the variants that ship have each argument one way, these calls have the corners as well.
"""

import contextlib
import functools
import inspect
from unittest import mock

import torch
import triton.language as tl

from mixft.kernels import (
    activation_backward,
    adamw,
    dequantize,
    grad,
    grad_scalars,
    int8_matmul,
    int8_split_k,
    lion,
    matmul,
    matmul_persistent,
    matmul_split_k,
    matmul_tiles,
    quantize,
    sgd,
    static_int8_linear,
    step_launch,
)
from mixft.kernels.architecture import Architecture
from mixft.kernels.multi_tensor import TRITON_NAMES
from mixft.kernels.variant import Variant

TYPES = TRITON_NAMES | {torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages")
LAUNCHERS = (
    activation_backward,
    dequantize,
    grad,
    grad_scalars,
    int8_matmul,
    int8_split_k,
    matmul,
    matmul_persistent,
    matmul_split_k,
    matmul_tiles,
    quantize,
    static_int8_linear,
    step_launch,
)


def specialised(name: str, function, args: tuple, kwargs: dict, wide_loads: bool) -> Variant:
    """The variant that Triton compiles for one call of ``function``."""
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    parameters = inspect.signature(function.fn).parameters
    general = getattr(function, "do_not_specialize", None) or ()
    signature, constants, divisible = {}, {}, []
    for key in function.arg_names:
        value, specialises = values[key], key not in general
        is_constant = parameters[key].annotation is tl.constexpr
        if is_constant or value is None or (type(value) is int and value == 1 and specialises):
            constants[key] = value
        elif hasattr(value, "block_shape"):
            signature[key] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[key] = f"*{TYPES[value.dtype]}"
            divisible += [key] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[key] = "fp32"
        else:
            signature[key] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [key] if value % 16 == 0 and specialises else []
    return Variant(name, function, signature, constants, tuple(divisible), **options, wide_loads=wide_loads)


class Recorder:
    """Stands in for a jit function: notes each call instead of launching it."""

    def __init__(self, function, calls: list):
        self.function, self.calls = function, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.function, args, kwargs))


@contextlib.contextmanager
def recording(arch: Architecture):
    """The list that calls are noted in, while the launchers believe to run on ``arch``."""
    calls = []
    with contextlib.ExitStack() as stack:
        for module in LAUNCHERS:
            for name, item in vars(module).items():
                if hasattr(item, "arg_names"):
                    stack.enter_context(mock.patch.object(module, name, Recorder(item, calls)))
            if hasattr(module, "architecture_of"):
                stack.enter_context(mock.patch.object(module, "architecture_of", return_value=arch))
        yield calls


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def product(
    M: int,
    N: int,
    K: int,
    activation: str = "none",
    *,
    bias: bool = False,
    keep: bool = False,
    residual: bool = False,
    left=None,
):
    a = half(M, K) if left is None else left
    matmul.matmul_forward(
        a,
        half(N, K).t(),
        half(N) if bias else None,
        activation,
        torch.float16,
        keep,
        half(M, N) if residual else None,
    )


def fused_backward(M: int, N: int, K: int, activation: str, *, left=None):
    a = half(M, K) if left is None else left
    matmul.matmul_activation_backward(a, half(K, N), half(M, N), activation, True)


def weight_gradient(M: int, N: int, K: int):
    matmul.matmul_forward(half(K, M).t(), half(K, N), None, "none", torch.float16, False, None)


def accumulated(M: int, N: int, K: int):
    matmul.matmul_accumulate_(torch.empty(M, N), half(K, M).t(), half(K, N))


def slopes(grad: torch.Tensor, activation: str, *, want_bias: bool):
    kept = half(*grad.shape)
    activation_backward.activation_backward(grad, kept, activation, torch.float16, want_bias)


def w8a8(M: int, N: int, K: int, *, per_tensor: bool = False, bias: bool = False, activation: str = "none"):
    a, b = torch.empty(M, K, dtype=torch.int8), torch.empty(N, K, dtype=torch.int8)
    a_scale, b_scale = (torch.empty(1, 1).expand(n, 1) if per_tensor else torch.empty(n, 1) for n in (M, N))
    int8_matmul.int8_matmul(a, b, a_scale, b_scale, half(N) if bias else None, activation, torch.float16)


def w8a8_static(M: int, N: int, K: int, *, bias: bool = False, activation: str = "none"):
    integers = torch.empty(N, dtype=torch.int32)
    weight, scale, zero_point = torch.empty(N, K, dtype=torch.int8), torch.empty(()), integers[0]
    static_int8_linear.static_int8_linear(
        half(M, K), weight, torch.empty(N, 1), half(N) if bias else None, activation, scale, zero_point, integers
    )


def w8a16(M: int, N: int, K: int, *, bias: bool = False, activation: str = "none"):
    b = torch.empty(N, K, dtype=torch.int8)
    int8_matmul.weight_only_matmul(
        half(M, K), b, torch.empty(N, 1), half(N) if bias else None, activation, torch.float16
    )


def quantized(outer: int, n: int, inner: int, dtype: torch.dtype, *, symmetric=True, stochastic=False, factor=False):
    seed = torch.empty((), dtype=torch.int64) if stochastic else None
    x = torch.empty(outer, n, inner, dtype=dtype)
    values, scale, zero_point = quantize.quantize(x, symmetric, seed, torch.empty(n) if factor else None, factor)
    dequantize.dequantize(values, scale, None if symmetric else zero_point, dtype)


# Of an optimizer: its launcher, lists of moments and how many of them are not empty, and hyperparameters.
RULES = {
    "adam": (adamw.adamw_step_, 3, 2, (0.9, 0.999, 1e-8, 0.01, True, False, False)),
    "sgd": (sgd.sgd_step_, 1, 1, (0.9, 0.0, 0.01, True, False, False)),
    "lion": (lion.lion_step_, 1, 1, (0.9, 0.99, 0.01, False, False)),
}


def scalars(names: tuple[str, ...]) -> list[torch.Tensor | None]:
    """The scalars of a step, None but for ``names``."""
    return [torch.empty(()) if name in names else None for name in ("inv_scale", "clip_coef", "found_inf")]


def step(rule: str, is_coded: bool, given: tuple[str, ...]):
    """Of BF16 parameters in the storage that takes least memory or in the one that takes most."""
    launch, lists, moments, hyperparameters = RULES[rule]
    param, size = torch.empty(2**16, dtype=torch.bfloat16), 2**16
    state, master = (torch.int8, torch.int16) if is_coded else (torch.float32, torch.float32)
    scales = [torch.empty(size // 256, dtype=torch.uint8)] if is_coded else []
    launch(
        [param], [param.clone()], [torch.empty(size, dtype=master)],
        *([torch.empty(size, dtype=state)] for _ in range(moments)), *([[]] * (lists - moments)),
        *([scales] * moments), *([[]] * (lists - moments)),
        [torch.empty(())], torch.empty(()), *scalars(given), *hyperparameters,
    )  # fmt: skip


PRODUCTS = {
    "one row": lambda: product(1, 4096, 4096, "silu", bias=True),
    "one column": lambda: product(4096, 1, 4096, bias=True, keep=True),
    "one deep": lambda: product(4096, 4096, 1),
    "one value": lambda: product(1, 1, 1, "gelu", keep=True),
    "deep but ragged": lambda: product(4096, 4096, 4096 + 16, "gelu", bias=True, keep=True),
    "few rows, ragged": lambda: product(17, 4096, 4096 + 16),
    "transposed, one row": lambda: product(1, 4096, 4096, left=half(4096, 1).t()),
    "wide": lambda: product(4096, 4096, 4096),
    "medium, kept": lambda: product(1024, 1024, 1024, "gelu", keep=True),
    "medium, with all": lambda: product(1024, 1024, 1024, "gelu", bias=True, keep=True, residual=True),
    "medium, a weight's gradient": lambda: weight_gradient(1024, 1024, 1024),
    "split": lambda: product(16, 1024, 8192),
    "unaligned, bias and residual": lambda: product(17, 35, 66, bias=True, residual=True),
    "unaligned": lambda: product(1000, 1001, 1002, "gelu_tanh", bias=True, keep=True),
    "expanded": lambda: product(4096, 4096, 4096, left=half(1, 4096).expand(4096, 4096)),
    "residual, odd rows": lambda: product(1003, 4096, 4096, "gelu", bias=True, keep=True, residual=True),
    "residual, one row": lambda: product(1, 4096, 4096, residual=True),
    "slopes in the product": lambda: fused_backward(4099, 4096, 1024, "gelu"),
    "slopes in a product, unaligned": lambda: fused_backward(1001, 1003, 1002, "silu"),
    "slopes in a split product": lambda: fused_backward(128, 256, 4096, "gelu_tanh"),
    "added up": lambda: accumulated(4096, 1024, 8192),
    "added up, few tiles": lambda: accumulated(384, 384, 8192),
    "added up, unaligned": lambda: accumulated(1001, 1003, 1002),
    "w8a8 one row": lambda: w8a8(1, 4096, 4096),
    "w8a8 one column": lambda: w8a8(4096, 1, 4096, bias=True),
    "w8a8 shallow": lambda: w8a8(4096, 4096, 16, activation="gelu"),
    "w8a8 ragged": lambda: w8a8(4096, 4096, 4096 + 16, activation="silu", bias=True),
    "w8a8 per tensor": lambda: w8a8(4096, 4096, 4096, per_tensor=True),
    "w8a8 static": lambda: w8a8_static(4096, 4096, 4096),
    "w8a8 static, one row": lambda: w8a8_static(1, 4096, 4096),
    "w8a8 static, split": lambda: w8a8_static(16, 1024, 4096, bias=True, activation="gelu"),
    "w8a8 static, few odd rows": lambda: w8a8_static(17, 35, 66, bias=True),
    "w8a8 split": lambda: w8a8(1, 1024, 4096, bias=True),
    "w8a16 split": lambda: w8a16(16, 1024, 14336 + 16, activation="silu"),
    "w8a16 one row": lambda: w8a16(1, 4096, 4096),
    "w8a16 one column": lambda: w8a16(17, 1, 4096, bias=True),
    "w8a16 ragged": lambda: w8a16(4096, 4096, 4096 + 16, activation="gelu", bias=True),
}
OTHERS = {
    "rows": lambda: quantized(4096, 4096, 1, torch.float16),
    "one row of values": lambda: quantized(1, 4096, 1, torch.bfloat16, symmetric=False, stochastic=True),
    "one column of values": lambda: quantized(4096, 1, 1, torch.float32, symmetric=False),
    "odd rows": lambda: quantized(1000, 17, 1, torch.float32, stochastic=True),
    "groups": lambda: quantized(4096 * 32, 128, 1, torch.float16, symmetric=False),
    "odd groups": lambda: quantized(102, 11, 1, torch.float32, symmetric=False),
    "columns": lambda: quantized(1, 4096, 4096, torch.float16, factor=True),
    "many columns": lambda: quantized(1, 4096, 8192, torch.float16, factor=True),
    "short columns": lambda: quantized(1, 17, 1000, torch.bfloat16, symmetric=False, stochastic=True),
    "few long columns": lambda: quantized(1, 2**17, 3, torch.float32, symmetric=False, stochastic=True),
    "tensor": lambda: quantized(1, 2**24, 1, torch.float32, symmetric=False, stochastic=True),
    "odd tensor": lambda: quantized(1, 2**24 + 1, 1, torch.bfloat16),
    "small tensor": lambda: quantized(1, 1122, 1, torch.float32),
    "tensor beyond 2^31": lambda: quantized(1, 2**31 + 16, 1, torch.float16),
    "slopes, odd": lambda: slopes(half(1001, 1003), "gelu", want_bias=True),
    "slopes, one value": lambda: slopes(half(1, 1), "silu", want_bias=True),
    "slopes, expanded": lambda: slopes(half(1, 1).expand(512, 512), "gelu_tanh", want_bias=False),
}  # fmt: skip
STEPS = {
    f"{rule} with {' and '.join(given)}, {'codes' if is_coded else 'fp32'}": functools.partial(
        step, rule, is_coded, given
    )
    for rule in RULES
    for is_coded in (False, True)
    for given in (("found_inf",), ("inv_scale", "found_inf"), ("clip_coef", "found_inf"))
}
GRADIENTS = {
    "unscaling without counts": lambda: grad.unscale_gradients_([half(2**16)], torch.empty(()), torch.empty(()), None),
    "scalars": lambda: grad_scalars.gradient_scalars([half(17)], None, None, None),
    "scalars, clipped": lambda: grad_scalars.gradient_scalars([half(17)], None, None, 1.0),
    "scalars, scaled": lambda: grad_scalars.gradient_scalars([half(17)], torch.empty(()), None, 1.0),
    "scalars, unscaled": lambda: grad_scalars.gradient_scalars([half(17)], None, torch.empty(()), 1.0),
}
LAUNCHES = OTHERS | STEPS | GRADIENTS
# Of these, those whose every access ought to be 16 bytes wide.
ALIGNED = {"rows", "one row of values", "groups", "columns", "tensor", "tensor beyond 2^31", *STEPS}


def variants(arch: Architecture) -> list[Variant]:
    found = []
    for case, launch in ((PRODUCTS if arch.tensor_cores else {}) | LAUNCHES).items():
        with recording(arch) as calls:
            launch()
        found += [
            specialised(f"{case}, {number}: {function.__name__}", function, args, kwargs, case in ALIGNED)
            for number, (function, args, kwargs) in enumerate(calls)
        ]
    return found
