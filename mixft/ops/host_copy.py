"""Values on their way from a device to the host, for which no step waits."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of ``values``, which are not changed afterwards; on a GPU it starts here and arrives later."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            # Named, as the default device may be the GPU, whose memory cannot be pinned.
            on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values = on_host.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            # The current device may be another one than the values'.
            self._arrival.record(torch.cuda.current_stream(values.device))

    def has_arrived(self) -> bool:
        """Whether :meth:`tolist` would return at once."""
        return self._arrival is None or self._arrival.query()

    def tolist(self) -> list:
        """The values, waited for."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()
