"""The border of a module: hooks that cast what enters it, and what leaves it where that is asked for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mixft.ops.validation import FLOATS

CASTABLE = (*FLOATS, torch.float64)


class Border:
    """Two hooks of one module. They are bound methods, so that the module can still be copied and pickled.

    Attributes:
        dtype: what floating-point tensors are cast to on their way in.
        outputs: what they are cast to on their way out; None leaves them as they are.
        originals: the dtype that each of the module's own parameters had before.
    """

    def __init__(self, dtype: torch.dtype, originals: dict[str, torch.dtype] | None = None) -> None:
        self.dtype = dtype
        self.outputs: torch.dtype | None = None
        self.originals = originals or {}

    def cast_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return cast(args, self.dtype), cast(kwargs, self.dtype)

    def cast_outputs(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return None if self.outputs is None else cast(output, self.outputs)

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.cast_inputs, with_kwargs=True)
        module.register_forward_hook(self.cast_outputs)


def border_of(module: nn.Module) -> Border | None:
    """The border around ``module``, None where there is none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Border):
            return hook.__self__
    return None


def detach(module: nn.Module) -> None:
    """Take the border of ``module`` away."""
    hooks = [
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ]
    for registered, with_kwargs in hooks:
        for key, hook in list(registered.items()):
            if isinstance(getattr(hook, "__self__", None), Border):
                del registered[key]
                with_kwargs.pop(key, None)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it in ``dtype``: in lists, tuples, dictionaries, and whatever else
    torch's pytree knows, as transformers' outputs."""
    if isinstance(value, Tensor):
        return _cast_tensor(value, dtype)
    # Most arguments are one of these; the pytree takes several times as long.
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, list):
        return type(value)([cast(item, dtype) for item in value])
    if type(value) is dict:
        return {key: cast(item, dtype) for key, item in value.items()}
    return tree_map_only(Tensor, lambda tensor: _cast_tensor(tensor, dtype), value)


def _cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype or tensor.dtype not in CASTABLE:
        return tensor
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and not tensor.requires_grad:
        # Additive masks hold the lowest number of their dtype; as -Inf a row of nothing else has a softmax of NaN.
        lowest = torch.finfo(tensor.dtype).min
        narrow = narrow.masked_fill(tensor == lowest, torch.finfo(dtype).min)
    return narrow
