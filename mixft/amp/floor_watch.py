"""Notice that the loss scale sits at its floor, from copies that reach the host while training goes on."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.ops.capture import capturing
from mixft.ops.host_copy import HostCopy

from .overflow import OverflowRing, nonzero

# Parameters that the warning names.
NAMED = 3


class FloorWatch:
    """Warns once when the scale has been at its floor for ``patience`` iterations.

    The device counts the iterations. Every ``patience`` of them a copy of the count starts for the host, and is looked
    at when it has arrived: no step waits for it, and the warning comes within ``2 * patience`` iterations, on a GPU
    one more.
    """

    def __init__(self, patience: int, min_scale: float) -> None:
        self.patience = patience
        self.min_scale = min_scale
        self._iterations = 0
        self._warned = False
        self._names: list[str] = []
        self._copy: HostCopy | None = None

    def look(self, floor_steps: Tensor, rings: Sequence[OverflowRing]) -> None:
        """Once an iteration.

        Args:
            floor_steps: 0-d int64, iterations at the floor in a row.
            rings: the overflow steps of every optimizer.
        """
        if self._warned or capturing(floor_steps.device):
            return
        self._iterations += 1
        if self._copy is None and self._iterations % self.patience == 0:
            self._names = [name for ring in rings for name in ring.names]
            self._copy = HostCopy(torch.cat([floor_steps.unsqueeze(0), *(ring.last() for ring in rings)]))
        if self._copy is not None and self._copy.has_arrived():
            steps, *counts = self._copy.tolist()
            self._copy = None
            if steps >= self.patience:
                self._warned = True
                warnings.warn(self._message(steps, counts), RuntimeWarning, stacklevel=3)

    def _message(self, steps: int, counts: list[int]) -> str:
        overflowed = sorted(nonzero(self._names, counts), key=lambda item: -item[1])
        named = [
            f"{name}" + (f" of layer {layer}" if (layer := name.rpartition(".")[0]) else "") + f" ({count} elements)"
            for name, count in overflowed[:NAMED]
        ]
        more = f" and {len(overflowed) - NAMED} more" if len(overflowed) > NAMED else ""
        where = "; ".join(named) + more if named else "no single element: the norm of the gradients overflowed"
        return (
            f"the loss scale has been at its floor, {self.min_scale:g}, for {steps} iterations and gradients still "
            f"overflowed. NaN and Inf at the last overflow: {where}. Scaling cannot cure that: look for an Inf in the "
            f"loss or in that layer's input, keep the layer in FP32, lower the learning rate or clip gradients, or "
            f"train in BF16 a model that was pretrained in BF16. LossScaler.overflow_history() has the last steps."
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_copy": None}
