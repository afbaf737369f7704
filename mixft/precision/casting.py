"""The dtype of a parameter changed in place, with the master that a mixft optimizer keeps beside it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mixft.ops.optimizer_state import join_master, split_master
from mixft.ops.validation import is_dtensor
from mixft.optim.base import MixedPrecisionOptimizer


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module whose parameters are plain tensors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; it is a {type(model).__name__}")
    for name, param in model.named_parameters():
        if is_dtensor(param):
            raise TypeError(
                f"parameter {name!r} of model is a DTensor, whose dtype whoever shards it decides; choose precisions "
                f"before, or by torch.distributed.fsdp.MixedPrecisionPolicy"
            )


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless ``optimizer`` is one of mixft's."""
    if not isinstance(optimizer, MixedPrecisionOptimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; only mixft's optimizers keep masters and state apart from the "
            f"parameter's dtype, such as mixft.optim.AdamW"
        )


def widened(param: Tensor, optimizer: MixedPrecisionOptimizer | None) -> Tensor:
    """The value of ``param`` as far as it is known: its master where ``optimizer`` keeps one, shared and not copied."""
    state = optimizer.state.get(param, {}) if optimizer is not None else {}
    if param.dtype == torch.float32 or "master" not in state:
        return param.detach().float()
    master = state["master"]
    return master if master.is_floating_point() else join_master(param.detach(), master)


@torch.no_grad()
def cast_parameters(wanted: Iterable[tuple[Tensor, torch.dtype]], optimizer: MixedPrecisionOptimizer | None) -> None:
    """Change the dtypes of parameters in place; each stays the same object, in the optimizer and in the model.

    To FP32 one takes its master's value, bit for bit. From FP32 the old value becomes the master: bit for bit with FP32
    masters, as exact as ``split_master`` is with split ones. With ``master_weights="none"``, or with no optimizer, it
    is rounded. Moments and step counts are not touched. A gradient is cast along.
    """
    owned = set() if optimizer is None else set(parameters_of(optimizer))
    for param, dtype in wanted:
        if param.dtype == dtype:
            continue
        narrow = _recast(param, dtype, optimizer) if param in owned else param.detach().to(dtype)
        grad, param.grad = param.grad, None
        # Assigning the data, unlike assigning into the module, keeps the parameter's identity.
        param.data = narrow
        if grad is not None:
            param.grad = grad.to(dtype)


def _recast(param: Tensor, dtype: torch.dtype, optimizer: MixedPrecisionOptimizer) -> Tensor:
    """The value of ``param`` in ``dtype``, and the master that goes with it put into the optimizer's state."""
    value = widened(param, optimizer)
    if param in optimizer.state:
        optimizer.state[param].pop("master", None)
    if dtype == torch.float32:
        return value
    if optimizer.master_weights == "split":
        narrow, optimizer.state[param]["master"] = split_master(value, dtype)
        return narrow
    if optimizer.master_weights != "none":
        optimizer.state[param]["master"] = value
    return value.to(dtype)


def parameters_of(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """All parameters of ``optimizer``, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]
