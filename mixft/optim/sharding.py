"""``Shards``: the processes that hold the parameters of one model between them, and sums over these."""

import warnings

import torch
from torch import Tensor


class Shards:
    """A process group each of whose processes steps a part of one model.

    Such a group can be neither copied nor pickled: a copy of an optimizer goes on with the same one, and a pickle has
    none, which is said when it is loaded.

    Args:
        group: a ``torch.distributed.ProcessGroup`` with this process in it.

    Raises:
        TypeError: ``group`` is something else.
    """

    def __init__(self, group: "torch.distributed.ProcessGroup") -> None:
        if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"sharded_over is {group!r}; it must be a torch.distributed.ProcessGroup with this process in it, such "
                f"as torch.distributed.group.WORLD after init_process_group, or None"
            )
        self.group = group

    def total(self, values: Tensor) -> Tensor:
        """``values`` added up over the processes, each of which has to call this; ``values`` may be overwritten."""
        local = values.to(self.device(values.device))
        torch.distributed.all_reduce(local, group=self.group)
        return local.to(values.device)

    def device(self, home: torch.device | None) -> torch.device:
        """``home`` where the group's backends serve it, else a device that they serve."""
        served = {device.type for device in self.group._device_types}
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
