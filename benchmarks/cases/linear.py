"""Linear layers in 16 bits with each epilogue, forward alone and with the backward."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixft
from mixft.benchmarks.case import Call, Case, Provider, Refused, compiled, each

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

    def addmm_activation(inputs):
        layer, x = inputs
        use_gelu = activation == "gelu_tanh"
        return each(lambda _: [torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=use_gelu)])(inputs)

    # What torch computes in mixft's place, where the data says so, beside what the kernel would take.
    on_gpu = {} if activation is not None or options.get("devices") == ("cpu",) else {"mixft kernel": _by_kernel}
    if activation in ("relu", "gelu_tanh") and options.get("devices") == ("cuda",):
        on_gpu["torch._addmm_activation"] = addmm_activation
    return Case(
        f"linear/{_named(rows, inner, columns, dtype, activation)}",
        inputs=layer_and_input(rows, inner, columns, dtype),
        exact=lambda inputs: plain((copy.deepcopy(inputs[0]).double(), inputs[1].double())),
        providers={
            "mixft": ours,
            "torch": each(plain),
            **_in_fp32(widened, dtype, options),
            **on_gpu,
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


def mlp(rows: int, width: int, hidden: int, dtype: torch.dtype, activation: str, *, trains: bool, **options) -> Case:
    """``mixft.nn.MLP`` and its residual, forward alone or with the backward, against torch's layers."""
    activate = ACTIVATIONS[activation]

    def inputs(device: torch.device) -> tuple[nn.Module, Tensor]:
        layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, width)])
        x = torch.randn(rows, width, device=device).to(dtype).requires_grad_(trains)
        return layers.to(device, dtype).requires_grad_(trains), x

    def results(layers: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y, (x, *layers.parameters()), torch.ones_like(y))) if trains else [y]

    def plain(inputs):
        (first, second), x = inputs
        return results(inputs[0], x, x + second(activate(first(x))))

    def ours(inputs):
        layers, x = inputs
        block = mixft.nn.MLP.from_linears(*layers, activation)
        return each(lambda _: results(layers, x, block(x, x)))(inputs)

    products = 6 if trains else 2
    moved = 2 * width * hidden + 2 * rows * width
    return Case(
        f"{'mlp_training' if trains else 'mlp'}/{_named(rows, width, hidden, dtype, activation)}",
        inputs=inputs,
        exact=lambda inputs: plain(
            (copy.deepcopy(inputs[0]).double(), inputs[1].detach().double().requires_grad_(trains))
        ),
        providers={"mixft": ours, "torch": each(plain), "torch.compile": compiled(plain)},
        bound=BOUNDS[dtype],
        # Weights, input and output; trained, the gradients of all of them as well, and both sides of the activation.
        bytes=dtype.itemsize * ((2 * moved + 2 * rows * hidden) if trains else moved),
        operations=2 * products * rows * width * hidden,
        rate=SHORT[dtype],
        **options,
    )


def _by_kernel(inputs: tuple[nn.Linear, Tensor]) -> Call:
    """A linear layer by mixft's kernel, where torch computes it in mixft's place."""
    from mixft.kernels.architecture import architecture_of
    from mixft.kernels.matmul import compute, served_by_torch
    from mixft.kernels.matmul_epilogue import Product

    layer, x = inputs
    arch = architecture_of(x.device)

    def product() -> Product:
        return Product(x, layer.weight.t(), x.new_empty(x.shape[0], layer.weight.shape[0]), bias=layer.bias)

    def run() -> list[Tensor]:
        computed = product()
        compute(computed, arch)
        return [computed.out]

    if not arch.tensor_cores:
        raise Refused(f"{arch.name} has no matrix instructions that Triton uses")
    if not served_by_torch(product(), arch):
        raise Refused("the row of mixft is this kernel")
    return Call(run)


def _in_fp32(widened: Provider, dtype: torch.dtype, options: dict) -> dict[str, Provider]:
    """FP16 on a CPU as those who know torch's FP16 product there write it: FP32 weights, the input widened."""
    return {"torch FP32": widened} if dtype == torch.float16 and options.get("devices") == ("cpu",) else {}


def _named(rows: int, inner: int, columns: int, dtype: torch.dtype, activation: str | None) -> str:
    return f"{rows}x{inner}x{columns}-{SHORT[dtype]}" + (f"-{activation}" if activation else "")


HALF, BRAIN = torch.float16, torch.bfloat16
CPU, GPU = {"devices": ("cpu",)}, {"devices": ("cuda",)}
BETWEEN_PRODUCTS = "mixft's Python between the products of a small layer, 0.1 to 0.3 ms a call with cold caches, shows"
SAME_PRODUCT = "both multiply by oneDNN's BF16 product, which takes nearly all of the time"

CASES = (
    linear(1024, 384, 1536, HALF, **CPU),
    *(linear(512, 768, 3072, HALF, activation, **CPU) for activation in ACTIVATIONS),
    *(linear(512, 768, 3072, BRAIN, activation, **CPU, reason_if_slower=SAME_PRODUCT) for activation in ACTIVATIONS),
    *(training(256, 384, 1536, HALF, activation, **CPU) for activation in ACTIVATIONS),
    training(256, 768, 3072, BRAIN, "gelu", **CPU, reason_if_slower=BETWEEN_PRODUCTS),
    mlp(256, 384, 1536, BRAIN, "gelu", trains=False, **CPU, reason_if_slower=BETWEEN_PRODUCTS),
    mlp(256, 384, 1536, BRAIN, "gelu", trains=True, **CPU, reason_if_slower=BETWEEN_PRODUCTS),
    *(linear(8192, 4096, 4096, HALF, activation, **GPU) for activation in ACTIVATIONS),
    *(linear(rows, 4096, 14336, BRAIN, "silu", **GPU) for rows in (16, 512, 4096)),
    *(training(8192, 4096, 4096, HALF, activation, **GPU) for activation in ACTIVATIONS),
    *(mlp(8192, 1024, 4096, HALF, activation, trains=True, **GPU) for activation in ("relu", "gelu")),
)
