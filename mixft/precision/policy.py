"""``PrecisionPolicy``: rules that say which part of a model computes in which dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mixft.ops.validation import SIXTEEN_BITS
from mixft.optim.base import MixedPrecisionOptimizer

from .border import CASTABLE, Border, border_of, detach
from .casting import cast_parameters, check_model, check_optimizer, widened
from .report import ModulePrecision, PolicyReport

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PrecisionPolicy:
    """Which modules of a model compute in FP16, in BF16 or in FP32.

    A rule is a glob and a dtype. It takes every module whose qualified name (``encoder.layer.0.output.LayerNorm``) or
    whose class (``LayerNorm``, whatever the module is called) the glob matches, and all modules inside that one; ``*``
    crosses dots. Of several rules that take a module the last one wins, so write the general one first. A module that
    no rule takes is left alone.

    ::

        policy = mixft.PrecisionPolicy({"*": "fp16", "*LayerNorm*": "fp32", "classifier": "fp32"})
        print(policy.apply(model))           # before or after the optimizer is made
        ...                                  # train
        with policy.evaluating(model, optimizer):
            accuracy = evaluate(model)       # in FP32, from the optimizer's masters

    In a module that a rule takes:

    - Parameters have its dtype. They stay the same objects, so an optimizer made before stays right, and tied
      parameters stay tied.
    - Floating-point tensors among its inputs, positional, by keyword and in containers, are cast to its dtype. On the
      way to FP16 the lowest number of a dtype stays the lowest (masks), and what else exceeds 65504 becomes Inf.
    - Outputs keep the dtype they were computed in. The next module casts what it gets; arithmetic in between promotes
      as torch does, and a matrix product of two dtypes is torch's error: give the module that holds it one dtype.
    - Buffers are left alone: running statistics, frequencies and int8 scales would not survive 16 bits. A layer with
      running statistics keeps its parameters in FP32 too, and gets 16-bit inputs, as torch's kernels expect.

    Modules without parameters and buffers, as activations and losses, compute in what they are given. The keys of
    state dictionaries do not change. Copying, pickling, ``torch.compile`` and activation checkpointing go on working.

    Args:
        rules: dtypes by glob, each "fp16", "bf16" or "fp32" or the torch dtype of that name.

    Raises:
        TypeError: a pattern is not a string, or ``rules`` no mapping.
        ValueError: no rules, or an unknown dtype.
    """

    def __init__(self, rules: Mapping[str, str | torch.dtype]) -> None:
        if not isinstance(rules, Mapping) or not all(isinstance(pattern, str) for pattern in rules):
            raise TypeError(f"rules is {rules!r}; it must be a dict of globs and dtypes, such as {{'*': 'fp16'}}")
        if not rules:
            raise ValueError("rules is empty; give at least one, such as {'*': 'fp16'}")
        for pattern, dtype in rules.items():
            if dtype not in (*DTYPES, *DTYPES.values()):
                raise ValueError(f"the dtype of rule {pattern!r} is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        self.rules = {pattern: DTYPES.get(dtype, dtype) for pattern, dtype in rules.items()}

    def __repr__(self) -> str:
        return f"PrecisionPolicy({ {pattern: NAMES[dtype] for pattern, dtype in self.rules.items()} })"

    def apply(self, model: nn.Module, optimizer: MixedPrecisionOptimizer | None = None) -> PolicyReport:
        """Give every module of ``model`` its dtype. A policy that was applied before is replaced.

        Args:
            model: changed in place.
            optimizer: one of mixft's over the model's parameters: a parameter that goes from FP32 to 16 bits keeps
                its FP32 value as its master, one that goes to FP32 takes its master's. Without it values are rounded.

        Returns:
            What each module with parameters got; ``print`` it.

        Raises:
            TypeError: ``model`` is no module or has DTensors, or ``optimizer`` is not one of mixft's.
            ValueError: a pattern that matches no module, parameters that modules of different dtypes share, or a
                parameter without a shape yet. Nothing is changed then.
        """
        _check(model, optimizer)
        rules = self._rules_by_module(model)
        _check_parameters(model, rules)
        _remove(model, optimizer)
        # Before any cast: what a tied parameter was is the same for both of its modules.
        for module in model.modules():
            dtype = rules[module][1]
            if dtype is not None and _has_tensors(module):
                Border(dtype, originals={key: param.dtype for key, param in _own(module).items()}).attach(module)
        governed = [(module, dtype) for module, (_, dtype) in rules.items() if dtype is not None]
        cast_parameters(
            ((param, _parameter_dtype(module, dtype)) for module, dtype in governed for param in _own(module).values()),
            optimizer,
        )
        rows = []
        for name, module in model.named_modules():
            pattern, dtype = rules[module]
            own = _own(module)
            if own:
                stored = next(iter(own.values())).dtype
                count = sum(param.numel() for param in own.values())
                rows.append(ModulePrecision(name, type(module).__name__, dtype or stored, pattern, count, stored))
        return PolicyReport(rows)

    def remove(self, model: nn.Module, optimizer: MixedPrecisionOptimizer | None = None) -> None:
        """Take the casts away and give every parameter the dtype it had before :meth:`apply`.

        Args:
            model: changed in place.
            optimizer: as in :meth:`apply`; without it a value that was rounded stays rounded.

        Raises:
            TypeError: as :meth:`apply`.
            ValueError: no policy is applied to ``model``.
        """
        _check(model, optimizer)
        _check_applied(model)
        _remove(model, optimizer)

    @contextmanager
    def evaluating(self, model: nn.Module, optimizer: MixedPrecisionOptimizer | None = None) -> Iterator[nn.Module]:
        """Run all of ``model`` in FP32 inside the ``with`` block: 16-bit training, FP32 evaluation.

        Every 16-bit parameter has its master's value, in the master's memory, or its own in FP32 where there is no
        master; the model's state dictionary made inside is FP32 too. Afterwards parameters and buffers are what they
        were, bit for bit. Whether the model is in ``eval`` mode is left as it is.

        Args:
            model: one that a policy is applied to.
            optimizer: one of mixft's; its ``step``, ``state_dict`` and ``load_state_dict`` raise RuntimeError inside
                the block, and so does ``load_state_dict`` of the model.

        Raises:
            TypeError: as :meth:`apply`.
            ValueError: no policy is applied to ``model``.
        """
        _check(model, optimizer)
        _check_applied(model)
        narrow = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in SIXTEEN_BITS]
        borders = [border for module in model.modules() if (border := border_of(module))]
        before = [(border, border.dtype, border.outputs) for border in borders]
        kept = [(tensor, tensor.data) for tensor in narrow]
        guards = [model.register_load_state_dict_pre_hook(_refuse_loading)]
        if optimizer is not None:
            guards += [
                optimizer.register_step_pre_hook(_refuse_step),
                optimizer.register_state_dict_pre_hook(_refuse_saving),
                optimizer.register_load_state_dict_pre_hook(_refuse_loading),
            ]
        try:
            for tensor in narrow:
                tensor.data = widened(tensor, optimizer)
            for border in borders:
                border.dtype, border.outputs = torch.float32, None
            yield model
        finally:
            for tensor, data in kept:
                tensor.data = data
            for border, dtype, outputs in before:
                border.dtype, border.outputs = dtype, outputs
            for guard in guards:
                guard.remove()

    def _rules_by_module(self, model: nn.Module) -> dict[nn.Module, tuple[str, torch.dtype | None]]:
        """The deciding pattern and dtype of every module, by identity; an empty pattern and None without a rule."""
        ranks = {pattern: rank for rank, pattern in enumerate(self.rules)}
        unused = set(ranks)
        deciding: dict[str, str] = {}
        chosen: dict[nn.Module, tuple[str, str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            matched = [
                pattern
                for pattern in ranks
                if fnmatchcase(name, pattern) or fnmatchcase(type(module).__name__, pattern)
            ]
            unused -= set(matched)
            inherited = deciding.get(name.rpartition(".")[0], "") if name else ""
            deciding[name] = max((*matched, inherited), key=lambda pattern: ranks.get(pattern, -1))
            other, pattern = chosen.setdefault(module, (name, deciding[name]))
            if self.rules.get(pattern) != self.rules.get(deciding[name]):
                raise ValueError(
                    f"{other!r} and {name!r} are the same module and rules {pattern!r} and {deciding[name]!r} give it "
                    f"two dtypes; make them agree"
                )
        if unused:
            pattern = min(unused, key=ranks.get)
            raise ValueError(
                f"pattern {pattern!r} matches no module of the model, by name or by class; its top modules are "
                f"{', '.join(name for name, _ in model.named_children()) or 'none'}"
            )
        return {module: (pattern, self.rules.get(pattern)) for module, (_, pattern) in chosen.items()}


def _check(model: nn.Module, optimizer: MixedPrecisionOptimizer | None) -> None:
    check_model(model)
    if optimizer is not None:
        check_optimizer(optimizer)


def _check_applied(model: nn.Module) -> None:
    if not any(border_of(module) for module in model.modules()):
        raise ValueError("no policy is applied to this model; call PrecisionPolicy(...).apply(model) first")


def _check_parameters(model: nn.Module, rules: dict[nn.Module, tuple[str, torch.dtype | None]]) -> None:
    wanted: dict[Tensor, tuple[str, torch.dtype]] = {}
    for name, module in model.named_modules():
        border = border_of(module)
        originals = border.originals if border else {}
        for key, param in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(param):
                raise ValueError(f"parameter {key!r} of module {name!r} has no shape yet; run the model once first")
            dtype = rules[module][1]
            target = originals.get(key, param.dtype) if dtype is None else _parameter_dtype(module, dtype)
            other, others = wanted.setdefault(param, (name, target))
            if others != target:
                raise ValueError(
                    f"modules {other!r} and {name!r} share the parameter {key!r} and would have it in {others} and in "
                    f"{target}; give both the same dtype"
                )


def _remove(model: nn.Module, optimizer: MixedPrecisionOptimizer | None) -> None:
    borders = {module: border for module in model.modules() if (border := border_of(module)) is not None}
    originals = ((module, item) for module, border in borders.items() for item in border.originals.items())
    cast_parameters(((getattr(module, key), dtype) for module, (key, dtype) in originals), optimizer)
    for module in borders:
        detach(module)


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {key: param for key, param in module.named_parameters(recurse=False) if param.dtype in CASTABLE}


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _parameter_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if getattr(module, "running_mean", None) is not None else dtype


def _refuse_step(*_: object) -> None:
    raise RuntimeError("the model is in FP32 for evaluation; take the step outside of policy.evaluating")


def _refuse_saving(*_: object) -> None:
    raise RuntimeError("the model is in FP32 for evaluation; save the optimizer outside of policy.evaluating")


def _refuse_loading(*_: object) -> None:
    raise RuntimeError("the model is in FP32 for evaluation; load state dictionaries outside of policy.evaluating")
