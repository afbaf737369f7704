"""Unscaling with the overflow check, statistics, clipping and accumulation of all gradients of a small BERT."""

import torch

import mixft
from mixft.benchmarks.case import Call, Case, compiled, each

from . import shapes
from .shapes import SHORT, elements, sample

# Far below the norm of the inputs, and their elements still normal numbers in FP16.
MAX_NORM = 10.0


def _gradients(dtype: torch.dtype):
    return lambda device: [torch.randn(shape, device=device).to(dtype) for shape in shapes.BERT]


def unscale(dtype: torch.dtype) -> Case:
    """In place, against the function inside ``torch.amp.GradScaler``, which refuses FP16 gradients."""

    def provider(unscale_):
        def prepare(inputs):
            grads = [tensor.clone() for tensor in inputs]
            found_inf, inverse = torch.zeros(1, device=grads[0].device), torch.full((1,), 0.5, device=grads[0].device)

            def call():
                unscale_(grads, found_inf, inverse)
                # Halved, then doubled: any number of calls keeps the values in range.
                inverse.reciprocal_()
                return [*sample(grads), found_inf]

            return Call(call)

        return prepare

    return Case(
        f"unscale/{SHORT[dtype]}",
        inputs=_gradients(dtype),
        exact=lambda grads: [*(grad.double() / 2 for grad in sample(grads)), torch.zeros(1, dtype=torch.float64)],
        providers={
            "mixft": provider(lambda grads, found_inf, inverse: mixft.ops.unscale_(grads, inverse, found_inf)),
            "torch": provider(torch._amp_foreach_non_finite_check_and_unscale_),
        },
        bound=1e-6 if dtype == torch.float32 else 1e-3,
        bytes=2 * dtype.itemsize * elements(shapes.BERT),
        reason_if_slower="both read and write each gradient once",
    )


def grad_stats(dtype: torch.dtype) -> Case:
    """Sum of squares and non-finite count of every gradient.

    Against what stands in their place in torch: the check of ``torch.amp.GradScaler`` and the norms of
    ``clip_grad_norm_``, which know of one overflow for all gradients; and the norms alone, whose NaN or Inf says so.
    """

    def norms(grads):
        return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))

    def scaler_and_norms(grads):
        found_inf = torch.zeros(1, device=grads[0].device)
        # By a factor of 1: the gradients stay as they are, and are written as GradScaler writes them.
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, torch.ones_like(found_inf))
        return [norms(grads).square(), found_inf.expand(len(grads))]

    def norms_alone(grads):
        found = norms(grads)
        return [found.square(), ~found.isfinite()]

    def counted(grads):
        return [norms(grads).square(), torch.stack([(~grad.isfinite()).sum() for grad in grads])]

    def exact(grads):
        squares = torch.stack([grad.double().square().sum() for grad in grads])
        return [squares, torch.zeros_like(squares)]

    providers = {
        "mixft": each(mixft.ops.grad_stats),
        "torch": each(scaler_and_norms),
        "torch foreach": each(norms_alone),
    }
    if dtype == torch.float32:
        # Once: it compiles for a minute.
        providers["torch.compile"] = compiled(counted)
    return Case(
        f"grad_stats/{SHORT[dtype]}",
        inputs=_gradients(dtype),
        exact=exact,
        providers=providers,
        # FP32 sums of 11.7 million squares.
        bound=1e-4,
        # torch's FP32 norm of the word embeddings on a CPU is that far off.
        own_bounds=dict.fromkeys(("torch", "torch foreach", "torch.compile"), 2e-3),
        bytes=dtype.itemsize * elements(shapes.BERT),
        reason_if_slower="torch foreach takes the norms alone; mixft also counts the NaN and Inf of each gradient",
    )


def clip(dtype: torch.dtype) -> Case:
    """``clip_grad_norm_`` against torch's; both multiply at every call, though only the first changes much."""

    def provider(clip_grad_norm_):
        def prepare(inputs):
            parameters = [torch.nn.Parameter(torch.empty_like(grad)) for grad in inputs]
            for parameter, grad in zip(parameters, inputs, strict=True):
                parameter.grad = grad.clone()
            grads = [parameter.grad for parameter in parameters]

            def call():
                clip_grad_norm_(parameters, MAX_NORM)
                return sample(grads)

            return Call(call)

        return prepare

    return Case(
        f"clip_grad_norm/{SHORT[dtype]}",
        inputs=_gradients(dtype),
        exact=_clipped,
        providers={
            "mixft": provider(mixft.amp.clip_grad_norm_),
            "torch": provider(torch.nn.utils.clip_grad_norm_),
        },
        bound=1e-4 if dtype == torch.float32 else 1e-2,
        own_bounds={"torch": 2e-3} if dtype == torch.float32 else {},
        bytes=3 * dtype.itemsize * elements(shapes.BERT),
    )


def _clipped(grads):
    norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
    return [grad.double() * MAX_NORM / norm for grad in sample(grads)]


def accumulate(dtype: torch.dtype) -> Case:
    """A micro-batch's scaled gradients added to FP32 buffers and checked, against doing so by hand."""

    def prepare(inputs):
        buffers, found_inf, inverse = _sums(inputs)
        counts = torch.zeros(len(inputs), dtype=torch.int64, device=inputs[0].device)

        def call():
            mixft.ops.accumulate_(inputs, buffers, found_inf=found_inf, nonfinite=counts, inv_scale=inverse)
            return [*sample(buffers), found_inf]

        return Call(call)

    return Case(
        f"accumulate/{SHORT[dtype]}",
        inputs=_gradients(dtype),
        exact=lambda grads: [*(1 + grad.double() / 2 for grad in sample(grads)), torch.zeros(1, dtype=torch.float64)],
        providers={"mixft": prepare, "torch": _by_hand},
        bound=1e-6,
        bytes=(dtype.itemsize + 8) * elements(shapes.BERT),
    )


def _sums(inputs):
    """FP32 buffers of ones, the flag of an overflow, and the inverse scale."""
    device = inputs[0].device
    buffers = [torch.ones(grad.shape, device=device) for grad in inputs]
    return buffers, torch.zeros(1, device=device), torch.full((1,), 0.5, device=device)


def _by_hand(inputs):
    buffers, found_inf, inverse = _sums(inputs)

    def call():
        wide = [grad.float() for grad in inputs]
        torch._amp_foreach_non_finite_check_and_unscale_(wide, found_inf, inverse)
        torch._foreach_add_(buffers, wide)
        return [*sample(buffers), found_inf]

    return Call(call)


CASES = (
    unscale(torch.float32),
    unscale(torch.bfloat16),
    grad_stats(torch.float32),
    grad_stats(torch.float16),
    grad_stats(torch.bfloat16),
    clip(torch.float32),
    clip(torch.float16),
    accumulate(torch.float16),
    accumulate(torch.bfloat16),
)
