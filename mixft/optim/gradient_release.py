"""Gradient release: every parameter stepped inside backward, its gradient freed at once."""

import weakref

import torch
from torch import Tensor

from mixft.ops.validation import is_dtensor

from .base import MixedPrecisionOptimizer


class GradientRelease:
    """What :func:`release_gradients` returns: a handle, and a context manager that removes it at its end."""

    def __init__(self, optimizer: MixedPrecisionOptimizer) -> None:
        self._optimizer = optimizer
        stepper = _Stepper(optimizer)
        self._handles = [
            param.register_post_accumulate_grad_hook(stepper)
            for group in optimizer.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        self._handles.append(optimizer.register_step_post_hook(stepper.ends_step))

    def remove(self) -> None:
        """Leave the gradients to ``optimizer.step`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.releases_gradients = False

    def __enter__(self) -> "GradientRelease":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Stepper:
    """Steps a parameter of ``optimizer`` when its gradient comes, and frees the gradient.

    Parameters hold it by their hooks, where no garbage collector looks: it must hold neither them nor the optimizer.
    """

    def __init__(self, optimizer: MixedPrecisionOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._stepped: set[int] = set()
        self._group_of: dict[int, int] = {}

    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if not self._stepped:
            self._group_of = {
                id(member): number for number, group in enumerate(optimizer.param_groups) for member in group["params"]
            }
        if id(param) not in self._group_of:
            return
        if id(param) in self._stepped:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a second gradient since optimizer.step(); call "
                "step() after each backward, and checkpoint a layer that is called several times with "
                "use_reentrant=False"
            )
        self._stepped.add(id(param))
        optimizer.step_in_backward(optimizer.param_groups[self._group_of[id(param)]], param)
        param.grad = None

    def ends_step(self, *_: object) -> None:
        self._stepped.clear()


def release_gradients(optimizer: MixedPrecisionOptimizer) -> GradientRelease:
    """Step every parameter inside backward, as soon as its gradient is there, and free the gradient.

    Gradients then never exist all at once, which saves their memory. Every backward is a step: gradients cannot be
    accumulated over several, and what changes the learning rate has to come before. ``optimizer.step()`` stays in the
    loop, after each backward, and steps what has a gradient still: parameters that were added, or that did not require
    gradients, since. A second gradient of one parameter before it raises RuntimeError: it would be another step; so it
    would with a layer that is called several times under reentrant checkpointing.

    What holds for a whole step otherwise holds for each parameter here. A NaN or Inf in the gradient of one parameter
    leaves that one and its state unchanged and no other; ``last_found_inf`` after ``optimizer.step()`` says whether
    that happened to any since the step before. Hooks of the optimizer run around ``optimizer.step()`` only.

    Not for gradients that are reduced over processes after backward, as DistributedDataParallel does.

    Args:
        optimizer: one of mixft's optimizers, without ``max_grad_norm``. With a ``torch.amp.GradScaler``, which
            hands over its scale after backward, ``step`` raises RuntimeError.

    Returns:
        A handle whose ``remove`` ends this, and a context manager that calls it.

    Raises:
        TypeError: ``optimizer`` is not one of mixft's.
        ValueError: it has ``max_grad_norm``: the norm of all gradients is not known before the last. Or it has
            ``sharded_over``, or its parameters are DTensors: processes do not step the same parameters one after the
            other. Or it has a :class:`mixft.amp.GradAccumulator`.
        RuntimeError: its gradients are released already.
    """
    if not isinstance(optimizer, MixedPrecisionOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; release_gradients takes mixft's optimizers")
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm is {optimizer.max_grad_norm}; the norm of all gradients is not known before the last, make "
            f"the optimizer without it"
        )
    if optimizer.sharded_over is not None:
        raise ValueError(
            "the optimizer has sharded_over, for whose sums all processes would have to step as often; make it without"
        )
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "parameters are DTensors, for whose sums all processes would have to step as often; leave the gradients to "
            "optimizer.step()"
        )
    if getattr(optimizer, "grad_accumulator", None) is not None:
        raise ValueError(
            "optimizer has a GradAccumulator, for which stepping inside backward would leave nothing to add up; call "
            "its remove() first"
        )
    if optimizer.releases_gradients:
        raise RuntimeError("the gradients of this optimizer are released already; remove the other handle first")
    optimizer.releases_gradients = True
    return GradientRelease(optimizer)
