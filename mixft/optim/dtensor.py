"""Parameters that are DTensors, as ``fully_shard`` and tensor parallelism make them.

An optimizer steps the piece that its process holds, and keeps state for that, plain tensors. State dictionaries have
DTensors placed as the parameters are, which ``torch.distributed.checkpoint`` saves, and loads on other numbers of
processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.ops.validation import is_dtensor

from .sharding import Shards


def piece_of(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``, sharing its memory: all of a plain one."""
    # to_local() makes another view of a parameter at every call.
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def shards_of(param: Tensor) -> Shards | None:
    """The processes that hold the other pieces of ``param``; None where each has all of it."""
    if not is_dtensor(param):
        return None
    divided = [not placement.is_replicate() for placement in param.placements]
    groups = tuple(param.device_mesh.get_group(dim) for dim, is_divided in enumerate(divided) if is_divided)
    return Shards(*groups) if groups else None


def gradient_pieces(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What this process holds of each gradient, placed as its parameter is.

    Raises:
        TypeError: one of a parameter and its gradient is a DTensor.
    """
    return [
        None if grad is None else _placed(param, grad, "gradient") for param, grad in zip(params, grads, strict=True)
    ]


def whole_of(param: Tensor, piece: Tensor) -> Tensor:
    """A tensor of the shape of ``param`` and placed as it is, of which this process holds ``piece``, not copied."""
    if not is_dtensor(param):
        return piece
    kind = torch.distributed.tensor.DTensor
    return kind.from_local(
        piece, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def piece_for(param: Tensor, value: Tensor) -> Tensor:
    """What this process is to hold of ``value``, which has the shape of ``param``, placed as that is."""
    return _placed(param, value, "state")


def check_placed(param: Tensor, value: Tensor, name: str) -> None:
    """Raise ValueError unless both are plain tensors, or DTensors of one mesh; ``name`` says what ``value`` is."""
    if is_dtensor(param) != is_dtensor(value) or (is_dtensor(param) and param.device_mesh != value.device_mesh):
        raise ValueError(
            f"{name} is {_described(value)}, and the parameter {_described(param)}; load it with "
            f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which divides a whole state dictionary "
            f"with full_state_dict=True, and save what get_optimizer_state_dict gives"
        )


def _placed(param: Tensor, value: Tensor, name: str) -> Tensor:
    if is_dtensor(param) != is_dtensor(value):
        raise TypeError(
            f"a {name} is {_described(value)}, and its parameter {_described(param)}; both must be one kind"
        )
    if not is_dtensor(value):
        return value
    if value.placements != param.placements:
        value = value.redistribute(placements=param.placements)
    return value.to_local()


def _described(tensor: Tensor) -> str:
    shape = f"of shape {tuple(tensor.shape)}"
    return f"a DTensor {shape} on {tensor.device_mesh}" if is_dtensor(tensor) else f"a plain tensor {shape}"
