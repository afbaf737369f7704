"""``Shards``: the processes that hold the parameters of one model between them, and sums over these."""

import warnings

import torch
from torch import Tensor


class Shards:
    """The processes each of which steps a part of what one model's parameters are divided into.

    Process groups can be neither copied nor pickled: a copy of an optimizer goes on with the same ones, and a pickle
    has none, which is said when it is loaded.

    Args:
        groups: one, or of several dimensions of a mesh one each, with this process in all.

    Raises:
        TypeError: one of ``groups`` is no ``torch.distributed.ProcessGroup`` with this process in it.
    """

    def __init__(self, *groups: "torch.distributed.ProcessGroup") -> None:
        for group in groups:
            if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
                raise TypeError(
                    f"sharded_over is {group!r}; it must be a torch.distributed.ProcessGroup with this process in it, "
                    f"such as torch.distributed.group.WORLD after init_process_group, or None"
                )
        self.groups = groups

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self.groups == other.groups

    def __hash__(self) -> int:
        return hash(self.groups)

    def total(self, values: Tensor) -> Tensor:
        """``values`` added up over the processes, each of which has to call this; ``values`` may be overwritten."""
        local = values.to(self.device(values.device))
        for group in self.groups:
            torch.distributed.all_reduce(local, group=group)
        return local.to(values.device)

    def device(self, home: torch.device | None) -> torch.device:
        """``home`` where the groups' backends serve it, else a device that they serve."""
        served = set.intersection(*({device.type for device in group._device_types} for group in self.groups))
        if home is not None and home.type in served:
            return home
        if "cuda" in served and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def __deepcopy__(self, _: dict) -> "Shards":
        return self

    def __reduce__(self) -> tuple:
        return _not_pickled, ()


def _not_pickled() -> None:
    warnings.warn(
        "this optimizer's sharded_over is None now, as a process group cannot be pickled; set it before the next step, "
        "or every process will clip and skip by its own gradients alone",
        RuntimeWarning,
        stacklevel=2,
    )
