"""How an op reaches its code: one table row per device, every module loaded at the first call.

An op's implementation stands twice under one name and one signature: the Triton launcher in
``mixft.kernels.<module>`` and the CPU routine in ``mixft.cpu.<module>``. A function decorated with ``define_op`` is the
op's fake: it carries the schema in its annotations and allocates outputs of the right shape and dtype. An op that only
changes its arguments has nothing to allocate: ``define_in_place_op`` takes the schema from its CPU routine. An op that
calls other ops' implementations is written once, for all devices: ``define_composition``.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import List  # noqa: UP035

import torch
from torch import Tensor
from torch.autograd import forward_ad

CPU = torch.device("cpu")

# Not tensors of a subclass, whose own code has to see what is done with them.
PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def interpreting() -> bool:
    """True when ``TRITON_INTERPRET=1``: CPU tensors are then served by the Triton launchers, interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def launcher(module: str, name: str) -> Callable:
    """The Triton launcher ``mixft.kernels.<module>.<name>``.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        if interpreting():
            importlib.import_module("mixft.kernels.interpreter").install()
        return getattr(importlib.import_module(f"mixft.kernels.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"mixft.{name} on a GPU tensor needs Triton, which is not installed; `pip install triton` at the "
            f"version that torch {torch.__version__} names"
        ) from error


@functools.cache
def cpu_routine(module: str, name: str) -> Callable:
    """The CPU routine ``mixft.cpu.<module>.<name>``."""
    return getattr(importlib.import_module(f"mixft.cpu.{module}"), name)


def server(device: torch.device) -> Callable[[str, str], Callable]:
    """What serves tensors of ``device``: :func:`launcher` or :func:`cpu_routine`, both called (module, name)."""
    return cpu_routine if device.type == "cpu" and not interpreting() else launcher


def without_autocast(device_type: str, serve: Callable, args: tuple):
    """``serve(*args)`` with autocast off: an implementation's own FP32 products must not run in 16 bits."""
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return serve(*args)
    return serve(*args)


def define_op(module: str, *, name: str | None = None, mutates_args: tuple[str, ...] = ()) -> Callable:
    """Register the decorated fake as the custom op ``mixft::<name>``, served as the module docstring says.

    Args:
        module: the file name that holds the implementation, in ``kernels/`` and in ``mixft/cpu/``.
        name: the implementation's name there, and the op's; None is the fake's own name.
        mutates_args: names of the arguments that the op changes in place.

    Returns:
        A decorator that returns the ``torch.library`` op.
    """

    def decorate(fake: Callable):
        implementation = name or fake.__name__

        def on_cpu(*args):
            return without_autocast("cpu", server(CPU)(module, implementation), args)

        def on_gpu(*args):
            return without_autocast("cuda", launcher(module, implementation), args)

        signature = inspect.signature(fake)
        fake.__signature__ = signature.replace(parameters=list(map(_readable, signature.parameters.values())))
        schema = torch.library.infer_schema(fake, mutates_args=mutates_args)
        op = torch.library.custom_op(
            f"mixft::{implementation}", on_cpu, mutates_args=mutates_args, device_types="cpu", schema=schema
        )
        op.register_kernel("cuda")(on_gpu)
        op.register_fake(fake)
        op.without_dispatch = {"cpu": on_cpu, "cuda": on_gpu}
        return op

    return decorate


def define_in_place_op(routine: Callable, mutates_args: tuple[str, ...]) -> Callable:
    """Register ``mixft::<name>`` with the name and the signature of a CPU routine that returns nothing.

    Args:
        routine: a function of ``mixft.cpu.<module>``; ``mixft.kernels.<module>`` has the launcher.
        mutates_args: names of the arguments that the op changes in place.

    Returns:
        The ``torch.library`` op.
    """

    @functools.wraps(routine)
    def fake(*args, **kwargs) -> None:
        return None

    return define_op(routine.__module__.rpartition(".")[2], mutates_args=mutates_args)(fake)


def define_composition(name: str, fake: Callable) -> Callable:
    """Register the decorated body, composed of other ops' implementations, as ``mixft::<name>`` of every device.

    Args:
        name: the op's.
        fake: a function of the same arguments that allocates its outputs.

    Returns:
        A decorator that returns the ``torch.library`` op. The body finds implementations with :func:`server`.
    """

    def decorate(body: Callable):
        @functools.wraps(body)
        def serve(*args):
            return without_autocast(args[0].device.type, body, args)

        op = torch.library.custom_op(f"mixft::{name}", serve, mutates_args=())
        op.register_fake(fake)
        op.without_dispatch = {"cpu": serve, "cuda": serve}
        return op

    return decorate


def _readable(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter in the only spelling of a list of tensors that torch 2.6 reads."""
    return parameter.replace(annotation=List[Tensor]) if parameter.annotation == list[Tensor] else parameter  # noqa: UP006


def without_dispatch(op, *tensors: Tensor | None) -> Callable:
    """``op``, or its implementation where the dispatcher has nothing to do for a call on ``tensors``.

    That is in eager mode on plain CPU or GPU tensors, with no dispatch mode, transform or tracer to see the call: the
    dispatcher takes 12 us, and 1 us a tensor in lists. The caller sees to it that no gradient is wanted, and that
    autograd hears of what is changed in place.
    """
    return op if needs_dispatch(*tensors) else op.without_dispatch[tensors[0].device.type]


def is_observed() -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a functorch transform follows what is done with tensors now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._are_functorch_transforms_active() or is_traced()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records what is done, in a graph that can be saved if it holds no autograd function
    of Python's: an op's own gradient serves there."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation follows a call on ``tensors``.

    An op whose gradient is an autograd function of torch's older kind, which no transform takes, is then better
    composed of torch's operators.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or _has_tangent(tensors)


def take_rows_together(op) -> Callable:
    """Let ``torch.func.vmap`` call ``op`` once: of its arguments only the first may be mapped over, [M, K] by rows.

    Returns:
        ``op``.
    """
    op.register_vmap(functools.partial(map_over_rows, op))
    return op


def map_over_rows(op: Callable, info, in_dims: tuple[int | None, ...], *arguments) -> tuple[Tensor, int]:
    """The rule of :func:`take_rows_together`, as torch has it.

    Raises:
        NotImplementedError: another argument is mapped over.
    """
    mapped, *fixed = in_dims
    if mapped is None or any(place is not None for place in fixed):
        raise NotImplementedError(
            "torch.func.vmap over the weight or the bias of a layer with an int8 weight; map over its input only"
        )
    rows, *rest = arguments
    rows = rows.movedim(mapped, 0)
    return op(rows.flatten(0, 1), *rest).unflatten(0, rows.shape[:2]), 0


def change_in_place(op, changed: list[Tensor], *arguments) -> None:
    """Call an op that changes the tensors ``changed``, as :func:`without_dispatch` would, and tell autograd."""
    change = without_dispatch(op, changed[0])
    change(*arguments)
    if change is not op:
        torch.autograd.graph.increment_version(changed)


def needs_dispatch(*tensors: Tensor | None) -> bool:
    """Whether more than the implementation has to see an op's call on ``tensors``, of which the first is not None.

    Raises:
        NotImplementedError: one of them has a tangent, of forward-mode differentiation.
    """
    if _has_tangent(tensors):
        raise NotImplementedError(
            "this op of mixft's has no forward-mode derivative, as torch.func.jvp and forward_ad ask for; use reverse "
            "mode, or torch's layers"
        )
    if is_observed():
        return True
    if any(tensor is not None and tensor.is_neg() for tensor in tensors):  # numbers whose sign the dispatcher turns
        return True
    return not (PLAIN.issuperset(map(type, tensors)) and (tensors[0].is_cuda or tensors[0].is_cpu))


def _has_tangent(tensors: tuple[Tensor | None, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
