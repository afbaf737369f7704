"""Gradients that a backward sums by itself, in the FP32 ``main_grad`` of a parameter; a part of ``GradAccumulator``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixft.ops import unscale_
from mixft.ops.layout import is_dense

from .overflow import Counts


class MainGrads:
    """The ``main_grad`` of those of an accumulator's parameters that have one.

    A layer such as ``mixft.nn.Linear(fuse_wgrad_accumulation=True)`` adds its scaled gradient to what is there. So the
    sum is kept in the scale of the moment, which :meth:`rescale_` follows, until :meth:`settle` takes it out, once.
    Which of them a backward has added to is seen by the tensor's version, which every change in place moves on.
    """

    def __init__(self) -> None:
        self.summed: set[int] = set()
        self.settled = False
        self._buffers: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._counts: list[tuple[list[int], Tensor]] = []

    def adopt(self, position: int, param: Tensor) -> Tensor | None:
        """The ``main_grad`` of the parameter at ``position``, which holds part of a sum; None where it has none.

        Raises:
            TypeError: it is not FP32.
            ValueError: it has gaps, or another shape or device than the parameter.
        """
        buffer = getattr(param, "main_grad", None)
        if buffer is None:
            return None
        found = f"the main_grad of parameter {position} is {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
        if buffer.dtype != torch.float32:
            raise TypeError(f"{found}; it must be torch.float32")
        if buffer.shape != param.shape or buffer.device != param.device or not is_dense(buffer):
            raise ValueError(
                f"{found}; it must be {tuple(param.shape)} on {param.device}, as the parameter is, and have no gaps"
            )
        self._buffers[position], self._versions[position] = buffer, -1
        return buffer

    def __contains__(self, position: int) -> bool:
        return position in self._buffers

    def check(self, params: Sequence[Tensor], scaled: bool) -> None:
        """Raise RuntimeError unless every parameter has the ``main_grad`` that was adopted or none, in the right scale.

        Args:
            params: all of the accumulator's.
            scaled: whether a loss scale is in their gradients.
        """
        late = self.unseen() if self.settled and scaled else []
        if late:
            raise RuntimeError(
                f"a backward has added to the main_grad of parameter {late[0]} after the loss scale was taken out of "
                "it; read buffers and gradients() after the last accumulate() only, and call reset()"
            )
        for position, param in enumerate(params):
            if getattr(param, "main_grad", None) is not self._buffers.get(position):
                raise RuntimeError(
                    f"the main_grad of parameter {position} was set or replaced after the GradAccumulator was made, "
                    "which does not add it up; set main_grad first"
                )

    def unseen(self) -> list[int]:
        """Positions that a backward has added to since :meth:`collect`."""
        return [position for position, buffer in self._buffers.items() if buffer._version != self._versions[position]]

    def collect(self, params: Sequence[Tensor], clear: bool) -> None:
        """Note the sums of one backward, and add the ``.grad`` of parameters that other layers use too."""
        for position, buffer in self._buffers.items():
            grad = params[position].grad
            if grad is not None:
                buffer.add_(grad)
                if clear:
                    grad.zero_()
        added = self.unseen()
        self.summed.update(added)
        self.settled = self.settled and not added
        self._note_versions()

    def settle(self, inv_scale: Tensor | None, found_inf: dict[torch.device, Tensor]) -> None:
        """Multiply the sums by ``inv_scale``, note NaN and Inf in ``found_inf`` and count them."""
        if self.settled or not self.summed:
            return
        self._counts = []
        by_device: dict[torch.device, list[int]] = {}
        for position in sorted(self.summed):
            by_device.setdefault(self._buffers[position].device, []).append(position)
        for device, positions in by_device.items():
            if device not in found_inf:
                found_inf[device] = torch.zeros((), dtype=torch.float32, device=device)
            factor = torch.ones((), dtype=torch.float32, device=device)
            if inv_scale is not None:
                factor = inv_scale.to(device, non_blocking=True)
            counts = torch.zeros(len(positions), dtype=torch.int64, device=device)
            unscale_([self._buffers[position] for position in positions], factor, found_inf[device], counts)
            self._counts.append((positions, counts))
        self.settled = True
        self._note_versions()

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> None:
        """Bring sums that hold a scale, not yet settled, to another, ``factor`` times as large."""
        for position in self.summed:
            buffer = self._buffers[position]
            buffer.mul_(factor.to(buffer.device, non_blocking=True))
        self._note_versions()

    def counts(self, params: Sequence[Tensor]) -> list[Counts]:
        """NaN and Inf elements of the settled sums."""
        return [([params[position] for position in positions], counts) for positions, counts in self._counts]

    @torch.no_grad()
    def reset(self) -> None:
        """Begin new sums, at zero."""
        for position in self.summed.union(self.unseen()):
            self._buffers[position].zero_()
        self.summed, self.settled, self._counts = set(), False, []
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = {position: buffer._version for position, buffer in self._buffers.items()}
