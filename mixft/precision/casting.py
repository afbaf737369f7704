"""The dtype of a parameter changed in place, with the master that a mixft optimizer keeps beside it."""

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
def cast_parameter(param: Tensor, dtype: torch.dtype, optimizer: MixedPrecisionOptimizer | None) -> None:
    """Change the dtype of ``param`` in place; it stays the same object, in the optimizer and in the model.

    To FP32 it takes its master's value, bit for bit. From FP32 the old value becomes the master: bit for bit with FP32
    masters, as exact as ``split_master`` is with split ones. With ``master_weights="none"``, or with no optimizer, it
    is rounded. Moments and step counts are not touched. A gradient is cast along.
    """
    if param.dtype == dtype:
        return
    value = widened(param, optimizer)
    owned = optimizer is not None and any(param is member for member in parameters_of(optimizer))
    if owned and param in optimizer.state:
        optimizer.state[param].pop("master", None)
    narrow = value if dtype == torch.float32 else value.to(dtype)
    if owned and dtype != torch.float32:
        if optimizer.master_weights == "split":
            narrow, optimizer.state[param]["master"] = split_master(value, dtype)
        elif optimizer.master_weights != "none":
            optimizer.state[param]["master"] = value
    grad, param.grad = param.grad, None
    # Assigning the data, unlike assigning into the module, keeps the parameter's identity.
    param.data = narrow
    if grad is not None:
        param.grad = grad.to(dtype)


def parameters_of(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """All parameters of ``optimizer``, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]
