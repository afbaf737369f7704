"""In which order a model's modules run, and which is the first to hand out a NaN or Inf."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class OutputWatch:
    """Hooks on every module with parameters. They are there only until the order is known, and while ``counting``.

    Attributes:
        order: names of the modules that were called, in the order in which they first returned: a module comes after
            those inside it.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = {name: module for name, module in modules.items() if any(True for _ in module.parameters())}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._found: dict[str, Tensor] = {}
        self.order: dict[str, int] = {}
        self.counting = False
        self._attach()

    def _attach(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(_Note(self, name)))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def start_counting(self) -> None:
        self._detach()
        self._found = {}
        self.counting = True
        self._attach()

    def stop(self) -> None:
        """Take the hooks away, unless the order is not known yet."""
        self.counting = False
        if self.order:
            self._detach()

    def note(self, name: str, output: Any) -> None:
        self.order.setdefault(name, len(self.order))
        if not self.counting:
            return
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                bad = ~tensor.detach().isfinite().all()
                self._found[name] = bad | self._found[name].to(bad.device) if name in self._found else bad

    def first_nonfinite(self) -> str | None:
        """The first module, in order, whose output was not finite while counting; waits for the device."""
        return next((name for name in self.order if name in self._found and bool(self._found[name])), None)


class _Note:
    """A hook that can be copied and pickled with its module."""

    def __init__(self, watch: OutputWatch, name: str) -> None:
        self.watch = watch
        self.name = name

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.watch.note(self.name, output)
