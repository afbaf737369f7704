"""Every benchmark case. A new case is one entry of ``CASES``."""

from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import mixft

from .case import Case, Workload

# all-MiniLM-L6-v2, a BERT of 22.7M parameters: the shapes that a fine-tuning step updates.
HIDDEN, INTERMEDIATE, LAYERS = 384, 1536, 6
EMBEDDINGS = [(30522, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,)]
LAYER = [
    *[(HIDDEN, HIDDEN), (HIDDEN,)] * 4,
    *[(HIDDEN,)] * 4,
    (INTERMEDIATE, HIDDEN),
    (INTERMEDIATE,),
    (HIDDEN, INTERMEDIATE),
    (HIDDEN,),
]
HEAD = [(HIDDEN, HIDDEN), (HIDDEN,), (2, HIDDEN), (2,)]
BERT = [*EMBEDDINGS, *LAYER * LAYERS, *HEAD]
# Large enough to touch every tensor of a model at many places, prime so that no row length divides it.
STRIDE = 97


def quant_linear(rows: int, inner: int, columns: int) -> Case:
    """An int8 layer with dynamic activations against ``F.linear`` in FP32, or FP16 on a GPU."""

    def build(device: torch.device) -> Workload:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        linear = torch.nn.Linear(inner, columns)
        x = torch.randn(rows, inner)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double()).detach()
        linear, x = linear.to(device, dtype).requires_grad_(False), x.to(device, dtype)
        layer = mixft.nn.QuantLinear.from_linear(linear, mode="dynamic")
        return Workload(
            {"mixft": lambda: [layer(x)], "torch": lambda: [F.linear(x, linear.weight, linear.bias)]},
            [exact],
            bound=0.03,
            bytes=inner * columns + x.element_size() * rows * (inner + columns),
            operations=2 * rows * inner * columns,
        )

    return Case(f"quant_linear/{rows}x{inner}x{columns}", build)


def half_linear(rows: int, inner: int, columns: int) -> Case:
    """``mixft.nn.Linear`` in FP16 against torch's own half linear."""

    def build(device: torch.device) -> Workload:
        torch_layer = torch.nn.Linear(inner, columns).half().requires_grad_(False)
        x = torch.randn(rows, inner).half()
        exact = F.linear(x.double(), torch_layer.weight.double(), torch_layer.bias.double())
        layer = mixft.nn.Linear(inner, columns, dtype=torch.float16).requires_grad_(False)
        layer.load_state_dict(torch_layer.state_dict())
        layer, torch_layer, x = layer.to(device), torch_layer.to(device), x.to(device)
        return Workload(
            {"mixft": lambda: [layer(x)], "torch": lambda: [torch_layer(x)]},
            [exact],
            bound=0.005,
            bytes=2 * (inner * columns + rows * (inner + columns)),
            operations=2 * rows * inner * columns,
        )

    return Case(f"half_linear/{rows}x{inner}x{columns}", build)


def adamw(dtype: torch.dtype, skip_nonfinite: bool = True) -> Case:
    """One optimizer step on the tensors of a small BERT.

    FP16 parameters have FP32 masters; torch's peer is what users write by hand, a step on FP32 copies and a copy back.
    """

    def build(device: torch.device) -> Workload:
        options = {"lr": 1e-3, "weight_decay": 0.01}
        start = [torch.randn(shape).mul_(0.02).to(dtype) for shape in BERT]
        grads = [torch.randn(shape).mul_(0.01).to(dtype) for shape in BERT]

        def parameters(kind: torch.dtype) -> list[torch.nn.Parameter]:
            made = [torch.nn.Parameter(tensor.to(device, kind, copy=True)) for tensor in start]
            for parameter, grad in zip(made, grads, strict=True):
                parameter.grad = grad.to(device, kind)
            return made

        def stepper(optimizer: torch.optim.Optimizer, results: list[torch.nn.Parameter]):
            def step() -> list[Tensor]:
                optimizer.step()
                return sample(results)

            return step

        def step_on_copies(fused: bool):
            results, copies = parameters(dtype), parameters(torch.float32)
            optimizer = torch.optim.AdamW(copies, fused=fused, **options)

            def step() -> list[Tensor]:
                torch._foreach_copy_([copy.grad for copy in copies], [result.grad for result in results])
                optimizer.step()
                torch._foreach_copy_([result.data for result in results], copies)
                return sample(results)

            return step

        def peer(fused: bool):
            if dtype != torch.float32:
                return step_on_copies(fused)
            results = parameters(dtype)
            return stepper(torch.optim.AdamW(results, fused=fused, **options), results)

        ours = parameters(dtype)
        elements = sum(parameter.numel() for parameter in ours)
        # AdamW works element by element, so the first step of a sample is the sample of the first step.
        sampled = [torch.nn.Parameter(tensor.double()) for tensor in sample(start)]
        for parameter, grad in zip(sampled, sample(grads), strict=True):
            parameter.grad = grad.double()
        torch.optim.AdamW(sampled, **options).step()
        # Read: parameter, gradient, two moments; written: parameter, two moments; masters are read and written too.
        # Nothing is written before every gradient is known to be finite, so those are read twice.
        per_element = (28 if dtype == torch.float32 else 28 + 2) + (dtype.itemsize if skip_nonfinite else 0)
        return Workload(
            {
                "mixft": stepper(mixft.optim.AdamW(ours, skip_nonfinite=skip_nonfinite, **options), ours),
                "torch fused": peer(fused=True),
                "torch default": peer(fused=False),
            },
            [parameter.detach() for parameter in sampled],
            bound=1e-6 if dtype == torch.float32 else 1e-3,
            bytes=per_element * elements,
        )

    name = f"adamw/{_short(dtype)}" + ("" if skip_nonfinite else "-unchecked")
    return Case(name, build, peers=("torch fused", "torch default"))


def sample(tensors: list[Tensor]) -> list[Tensor]:
    """Views on some elements of each tensor, spread over all of it."""
    return [tensor.detach().view(-1)[::STRIDE] for tensor in tensors]


def unscale(dtype: torch.dtype) -> Case:
    """Unscaling with the overflow check, against the function inside ``torch.amp.GradScaler``."""

    def build(device: torch.device) -> Workload:
        start = [torch.randn(shape).to(device, dtype) for shape in BERT]

        def provider(unscale_: Callable[[list[Tensor], Tensor, Tensor], None]):
            grads = [tensor.clone() for tensor in start]
            found_inf, inverse = torch.zeros(1, device=device), torch.full((1,), 0.5, device=device)

            def call() -> list[Tensor]:
                unscale_(grads, found_inf, inverse)
                # Halved, then doubled: any number of calls keeps the values in range.
                inverse.reciprocal_()
                return [*sample(grads), found_inf]

            return call

        elements = sum(tensor.numel() for tensor in start)
        return Workload(
            {
                "mixft": provider(lambda grads, found_inf, inverse: mixft.ops.unscale_(grads, inverse, found_inf)),
                "torch": provider(torch._amp_foreach_non_finite_check_and_unscale_),
            },
            [*(tensor.double().cpu() / 2 for tensor in sample(start)), torch.zeros(1, dtype=torch.float64)],
            bound=1e-6,
            bytes=2 * start[0].element_size() * elements,
        )

    return Case(f"unscale/{_short(dtype)}", build)


def grad_stats(dtype: torch.dtype) -> Case:
    """Sum of squares and non-finite count of every gradient, against ``torch._foreach_norm`` and a finiteness test."""

    def build(device: torch.device) -> Workload:
        grads = [torch.randn(shape).to(device, dtype) for shape in BERT]

        def peer() -> list[Tensor]:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
            return [norms.square(), torch.stack([(~grad.isfinite()).sum() for grad in grads])]

        exact = torch.stack([grad.double().square().sum() for grad in grads]).cpu()
        return Workload(
            {"mixft": lambda: mixft.ops.grad_stats(grads), "torch": peer},
            [exact, torch.zeros(len(grads), dtype=torch.float64)],
            bound=1e-5,
            bytes=grads[0].element_size() * sum(grad.numel() for grad in grads),
            # Its FP32 norm of the word embeddings on a CPU is that far off.
            own_bounds={"torch": 2e-3},
        )

    return Case(f"grad_stats/{_short(dtype)}", build)


def quantize(rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Symmetric int8 with a scale a row, against the same formula in plain torch."""

    def build(device: torch.device) -> Workload:
        x = torch.randn(rows, columns).to(device, dtype)

        def ours() -> list[Tensor]:
            values, scale, _ = mixft.ops.quantize(x)
            return [values, scale]

        def peer() -> list[Tensor]:
            scale = x.abs().amax(1, keepdim=True).float() / 127
            return [(x.float() / scale).round_().clamp_(-127, 127).to(torch.int8), scale]

        exact_scale = x.double().abs().amax(1, keepdim=True) / 127
        return Workload(
            {"mixft": ours, "torch": peer},
            [(x.double() / exact_scale).round().cpu(), exact_scale.cpu()],
            # A quotient at a tie may round to the other neighbour: one step of 127.
            bound=1.01 / 127,
            bytes=rows * columns * (x.element_size() + 1),
        )

    return Case(f"quantize/{rows}x{columns}-{_short(dtype)}", build)


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _all() -> Iterator[Case]:
    for (inner, columns), rows in product([(384, 1536), (768, 3072), (4096, 4096)], [1, 16, 128, 512]):
        yield quant_linear(rows, inner, columns)
    yield half_linear(1024, 384, 1536)
    yield half_linear(512, 768, 3072)
    for dtype in (torch.float32, torch.float16):
        yield adamw(dtype)
        yield grad_stats(dtype)
    yield adamw(torch.float32, skip_nonfinite=False)
    yield unscale(torch.float32)
    yield quantize(1024, 384, torch.float32)
    yield quantize(512, 4096, torch.float16)


CASES = tuple(_all())
