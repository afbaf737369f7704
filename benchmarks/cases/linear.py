"""Linear layers in 16 bits with each epilogue, forward alone and with the backward."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Case, Provider, compiled, each

from .shapes import SHORT

ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def layer_and_input(rows: int, inner: int, columns: int, dtype: torch.dtype, trains: bool = False):
    """Makes a layer [columns, inner] and an input [rows, inner]; ``trains``: both ask for gradients."""

    def inputs(device: torch.device) -> tuple[nn.Linear, Tensor]:
        layer = nn.Linear(inner, columns, device=device, dtype=dtype).requires_grad_(trains)
        return layer, torch.randn(rows, inner, device=device).to(dtype).requires_grad_(trains)

    return inputs


def traffic(rows: int, inner: int, columns: int, dtype: torch.dtype, weight_bytes: int | None = None) -> int:
    """Input and weight read, output written."""
    weight = inner * columns * (weight_bytes or dtype.itemsize)
    return weight + dtype.itemsize * rows * (inner + columns)


def linear(rows: int, inner: int, columns: int, dtype: torch.dtype, activation: str | None = None, **options) -> Case:
    """``mixft.nn.Linear`` against ``F.linear`` and the activation after it."""
    activate = ACTIVATIONS[activation]

    def plain(inputs):
        layer, x = inputs
        return [activate(layer(x))]

    def ours(inputs):
        layer = mixft.nn.Linear.from_linear(inputs[0], activation)
        return each(lambda inputs: [layer(inputs[1])])(inputs)

    def widened(inputs):
        layer = copy.deepcopy(inputs[0]).float()
        return each(lambda inputs: [activate(layer(inputs[1].float())).to(dtype)])(inputs)

    return Case(
        f"linear/{_named(rows, inner, columns, dtype, activation)}",
        inputs=layer_and_input(rows, inner, columns, dtype),
        exact=lambda inputs: plain((copy.deepcopy(inputs[0]).double(), inputs[1].double())),
        providers={
            "mixft": ours,
            "torch": each(plain),
            **_in_fp32(widened, dtype, options),
            "torch.compile": compiled(plain),
        },
        bound=BOUNDS[dtype],
        bytes=traffic(rows, inner, columns, dtype),
        operations=2 * rows * inner * columns,
        rate=SHORT[dtype],
        **options,
    )


def training(rows: int, inner: int, columns: int, dtype: torch.dtype, activation: str | None = None, **options) -> Case:
    """The layer's forward and backward: the gradients of input, weight and bias."""
    activate = ACTIVATIONS[activation]

    def gradients(layer: nn.Linear, x: Tensor, y: Tensor) -> list[Tensor]:
        return torch.autograd.grad(y, (x, layer.weight, layer.bias), torch.ones_like(y))

    def plain(inputs):
        layer, x = inputs
        return gradients(layer, x, activate(layer(x)))

    def ours(inputs):
        layer = mixft.nn.Linear.from_linear(inputs[0], activation)
        return each(lambda inputs: gradients(layer, inputs[1], layer(inputs[1])))(inputs)

    def widened(inputs):
        layer = copy.deepcopy(inputs[0]).float()

        def run(inputs):
            x = inputs[1].detach().float().requires_grad_()
            return [grad.to(dtype) for grad in gradients(layer, x, activate(layer(x)))]

        return each(run)(inputs)

    def exact(inputs):
        return plain((copy.deepcopy(inputs[0]).double(), inputs[1].detach().double().requires_grad_()))

    return Case(
        f"linear_training/{_named(rows, inner, columns, dtype, activation)}",
        inputs=layer_and_input(rows, inner, columns, dtype, trains=True),
        exact=exact,
        providers={
            "mixft": ours,
            "torch": each(plain),
            **_in_fp32(widened, dtype, options),
            "torch.compile": compiled(plain),
        },
        bound=BOUNDS[dtype],
        # Forward, then the output's gradient, input and weight read again and the gradients of both written.
        bytes=traffic(rows, inner, columns, dtype)
        + dtype.itemsize * (rows * columns + 2 * rows * inner + 2 * inner * columns),
        operations=6 * rows * inner * columns,
        rate=SHORT[dtype],
        **options,
    )


def _in_fp32(widened: Provider, dtype: torch.dtype, options: dict) -> dict[str, Provider]:
    """FP16 on a CPU as those who know torch's FP16 product there write it: FP32 weights, the input widened."""
    return {"torch FP32": widened} if dtype == torch.float16 and options.get("devices") == ("cpu",) else {}


def _named(rows: int, inner: int, columns: int, dtype: torch.dtype, activation: str | None) -> str:
    return f"{rows}x{inner}x{columns}-{SHORT[dtype]}" + (f"-{activation}" if activation else "")


HALF, BRAIN = torch.float16, torch.bfloat16
CPU, GPU = {"devices": ("cpu",)}, {"devices": ("cuda",)}
ROUNDED_ONCE = "torch rounds to BF16 before the activation; mixft after it, which takes a CPU an FP32 product"

CASES = (
    linear(1024, 384, 1536, HALF, **CPU),
    *(linear(512, 768, 3072, HALF, activation, **CPU) for activation in ACTIVATIONS),
    linear(512, 768, 3072, BRAIN, **CPU),
    linear(512, 768, 3072, BRAIN, "gelu", **CPU, reason_if_slower=ROUNDED_ONCE),
    *(training(256, 384, 1536, HALF, activation, **CPU) for activation in ACTIVATIONS),
    training(256, 768, 3072, BRAIN, "gelu", **CPU, reason_if_slower=ROUNDED_ONCE),
    *(linear(8192, 4096, 4096, HALF, activation, **GPU) for activation in ACTIVATIONS),
    *(linear(rows, 4096, 14336, BRAIN, "silu", **GPU) for rows in (16, 512, 4096)),
    *(training(8192, 4096, 4096, HALF, activation, **GPU) for activation in ACTIVATIONS),
)
