"""Unscaling with the overflow check, and gradient statistics, over all gradients of a small BERT."""

import torch

import mixft
from mixft.benchmarks.case import Call, Case, compiled, each

from . import shapes
from .shapes import SHORT, elements, sample


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
        reason_if_slower="on a CPU mixft calls the same function",
    )


def grad_stats(dtype: torch.dtype) -> Case:
    """Sum of squares and non-finite count of every gradient, against ``torch._foreach_norm`` and a finiteness test."""

    def plain(grads):
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
        return [norms.square(), torch.stack([(~grad.isfinite()).sum() for grad in grads])]

    def exact(grads):
        squares = torch.stack([grad.double().square().sum() for grad in grads])
        return [squares, torch.zeros_like(squares)]

    return Case(
        f"grad_stats/{SHORT[dtype]}",
        inputs=_gradients(dtype),
        exact=exact,
        providers={"mixft": each(mixft.ops.grad_stats), "torch": each(plain), "torch.compile": compiled(plain)},
        # FP32 sums of 11.7 million squares.
        bound=1e-4,
        # torch's FP32 norm of the word embeddings on a CPU is that far off.
        own_bounds={"torch": 2e-3, "torch.compile": 2e-3},
        bytes=dtype.itemsize * elements(shapes.BERT),
    )


CASES = (
    unscale(torch.float32),
    unscale(torch.bfloat16),
    grad_stats(torch.float32),
    grad_stats(torch.float16),
    grad_stats(torch.bfloat16),
)
