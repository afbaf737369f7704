"""Which modules of a model are raised to FP32, and what that means for parameters and borders."""

from collections.abc import Container

import torch
from torch import Tensor, nn

from mixft.ops.validation import SIXTEEN_BITS
from mixft.optim.base import MixedPrecisionOptimizer

from .border import Border, border_of, detach
from .casting import cast_parameters


class Layout:
    """A model whose modules can be raised to FP32 and lowered to the 16 bits that they had when this was made.

    Everything inside a raised module is in FP32. Its outputs are cast to the 16 bits that they had, so that what
    surrounds it computes as before; only the model's own outputs stay FP32. A parameter that is tied takes the other
    modules that hold it along.
    """

    def __init__(self, model: nn.Module, optimizer: MixedPrecisionOptimizer) -> None:
        self.optimizer = optimizer
        self.raised: list[str] = []
        self.modules = dict(model.named_modules())
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._owners: dict[Tensor, list[str]] = {}
        for name, module in self.modules.items():
            for param in module.parameters(recurse=False):
                self._owners.setdefault(param, []).append(name)
        self._low = {param: param.dtype for param in self._owners if param.dtype in SIXTEEN_BITS}
        self._borders = {name: border.dtype for name, module in self.modules.items() if (border := border_of(module))}

    def layers(self, params: Container[Tensor]) -> dict[str, list[Tensor]]:
        """The 16-bit parameters among ``params``, by the first module that holds each."""
        found: dict[str, list[Tensor]] = {}
        for param in self._low:
            if param in params:
                found.setdefault(self._owners[param][0], []).append(param)
        return found

    def low_dtype(self, name: str) -> torch.dtype:
        """The 16 bits that the module ``name`` had, or the first in it that had."""
        return next(self._low[param] for param in self.modules[name].parameters() if param in self._low)

    def in_fp32(self, name: str) -> bool:
        """Whether ``name`` or a module around it is raised, or nothing in it ever had 16 bits."""
        raised = self._all_raised()
        if any(outer in raised for outer in (name, *_around(name))):
            return True
        return not any(param in self._low for param in self.modules[name].parameters())

    def around(self, name: str, called: Container[str]) -> str | None:
        """The nearest module around ``name`` that is not in FP32 and among ``called``; None where all are."""
        return next((outer for outer in _around(name) if outer in called and not self.in_fp32(outer)), None)

    def raise_(self, name: str) -> None:
        """Raise ``name``, in place of what was raised inside it."""
        self.set_raised([*(other for other in self.raised if name not in _around(other)), name])

    def lower(self, name: str) -> None:
        self.set_raised([other for other in self.raised if other != name])

    def set_raised(self, names: list[str]) -> None:
        """Make ``names`` the raised modules, and give every parameter and border the dtype that follows."""
        self.raised = list(names)
        raised = self._all_raised()
        wide: set[Tensor] = set()
        for module, known in self._names.items():
            inside = [any(outer in raised for outer in _around(name)) for name in known]
            if any(inside) or any(name in raised for name in known):
                wide.update(module.parameters(recurse=False))
                self._widen_border(module, known[0], outermost=not all(inside))
            else:
                self._restore_border(module, known[0])
        wanted = ((param, torch.float32 if param in wide else low) for param, low in self._low.items())
        cast_parameters(wanted, self.optimizer)

    def _all_raised(self) -> set[str]:
        """The raised modules, and those that hold a parameter of theirs elsewhere."""
        raised = set(self.raised)
        for name in self.raised:
            for param in self.modules[name].parameters():
                owners = self._owners[param]
                raised |= {owner for owner in owners if name not in (owner, *_around(owner))}
        return raised

    def _widen_border(self, module: nn.Module, name: str, outermost: bool) -> None:
        if not outermost and name not in self._borders:
            detach(module)
            return
        border = border_of(module)
        if border is None:
            border = Border(torch.float32)
            border.attach(module)
        border.dtype = torch.float32
        border.outputs = (self._borders.get(name) or self.low_dtype(name)) if outermost and name else None

    def _restore_border(self, module: nn.Module, name: str) -> None:
        border = border_of(module)
        if border is not None and name not in self._borders:
            detach(module)
        elif border is not None:
            border.dtype, border.outputs = self._borders[name], None


def _around(name: str) -> list[str]:
    """The names of the modules around ``name``, from the inside out."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in reversed(range(len(parts)))]
