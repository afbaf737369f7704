"""``GradAccumulator``: the gradients of several backward passes summed in FP32, for one optimizer step."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mixft.ops.accumulate import accumulate_unchecked_
from mixft.ops.validation import FLOATS, described, is_dtensor

from .clip_grad import clip_gradients_
from .loss_scaler import LossScaler
from .main_grads import MainGrads
from .overflow import Counts


class GradAccumulator:
    """Add the gradients of every micro-batch to FP32 buffers, unscaled and checked, in one launch a dtype.

    Gradients of 16-bit parameters lose what is below half a unit in the last place of their sum, the more the longer it
    gets; these buffers lose next to nothing. ::

        accumulator = GradAccumulator(optimizer, scaler)
        for _ in range(steps):
            for batch in micro_batches:
                scaler.scale(loss_of(batch) / len(micro_batches)).backward()
                accumulator.accumulate()
            scaler.step(optimizer)
            scaler.update()

    The optimizer steps with the buffers in place of the gradients: mixft's optimizers with the FP32 sums themselves,
    any other with the sums rounded once to each parameter's dtype. A NaN or Inf in any micro-batch skips the whole
    step, and the scaler's report says where. Every micro-batch is unscaled by the scale of its own time, so a scale
    that changes between two of them does no harm. Nothing waits for the device.

    A parameter that has a ``main_grad`` by then, an FP32 tensor of its shape, has it for its buffer, set to zero; so a
    ``mixft.nn.Linear(fuse_wgrad_accumulation=True)`` adds to the sum in the product of its backward, unrounded. Such a
    sum is unscaled and checked once, when the step or :meth:`gradients` asks for it, and an overflow is counted once
    however many micro-batches had it. A CUDA graph of backwards that add to a ``main_grad`` has to hold
    :meth:`accumulate` too: that a replay has added is not seen.

    Clip by the ``max_grad_norm`` of mixft's optimizers, or the sums by :meth:`clip_grad_norm_`: for torch's function of
    this name there are no gradients.

    To give up a batch call :meth:`reset`; ``zero_grad`` leaves the sums as they are. Under DistributedDataParallel
    every backward has to reduce its gradients: those of one inside ``no_sync()`` would be added on this process alone.

    Sums and findings are those of this process. Where parameters are shards, an optimizer of mixft's with
    ``sharded_over`` adds the findings of all processes at its step; what a process is told of ``counts`` stays its own.

    Costs 4 bytes a parameter. Gradients are not divided by the number of micro-batches.

    Args:
        optimizer_or_params: an optimizer, which steps with the buffers until :meth:`remove`; or parameters, whose
            sums are then in ``buffers`` for the caller, who calls :meth:`reset` after use.
        scaler: the LossScaler that scales the losses and steps the optimizer; None for losses that are not scaled.

    Attributes:
        scaler: as given.

    Raises:
        TypeError: ``scaler`` is no LossScaler, ``optimizer_or_params`` is a module or wraps an optimizer, a parameter
            is a DTensor or not a dense FP16, BF16 or FP32 tensor, or its ``main_grad`` not FP32.
        ValueError: there are no parameters, one is given twice, the optimizer has an accumulator already or releases
            its gradients, or a ``main_grad`` has gaps or another shape or device than its parameter.
    """

    def __init__(
        self, optimizer_or_params: torch.optim.Optimizer | Iterable[Tensor], scaler: LossScaler | None = None
    ) -> None:
        if scaler is not None and not isinstance(scaler, LossScaler):
            raise TypeError(
                f"scaler is a {type(scaler).__name__}; it must be a mixft.amp.LossScaler, which knows that the sums "
                f"are unscaled, or None"
            )
        self.scaler = scaler
        self._buffers: list[Tensor] = []
        self._main_grads = MainGrads()
        self._params: list[Tensor] = []
        self._gone: set[int] = set()
        self._optimizer = optimizer_or_params if isinstance(optimizer_or_params, torch.optim.Optimizer) else None
        if isinstance(optimizer_or_params, torch.nn.Module):
            raise TypeError(
                f"optimizer_or_params is a {type(optimizer_or_params).__name__}; give its optimizer or its parameters()"
            )
        if self._optimizer is None:
            self._extend(list(optimizer_or_params))
        elif not hasattr(self._optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"optimizer_or_params is a {type(self._optimizer).__name__}, which wraps an optimizer; give that one"
            )
        elif getattr(self._optimizer, "releases_gradients", False):
            raise ValueError(
                "the optimizer's gradients are released inside backward, which steps with each of them and leaves none "
                "to add up; call remove() of release_gradients' handle first"
            )
        elif getattr(self._optimizer, "grad_accumulator", None) is not None:
            raise ValueError("the optimizer has a GradAccumulator already; call its remove() first")
        else:
            self._extend(_parameters(self._optimizer))
        if not self._params:
            raise ValueError("optimizer_or_params holds no parameters; give an optimizer, or a list of its parameters")
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        self._keeps_gradients = False
        self._lent = self._lends_finding = False
        self.reset()
        if scaler is not None:
            scaler.scaled_sums.add(self._main_grads)
        self._take_part_in_steps()

    def _take_part_in_steps(self) -> None:
        self._hooks = []
        if self._optimizer is not None:
            self._hooks = [
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]
            self._optimizer.grad_accumulator = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # An optimizer is copied and pickled without its hooks.
        self._take_part_in_steps()

    @property
    def buffers(self) -> list[Tensor]:
        """FP32 tensors, one a parameter, in order and, but for a ``main_grad``, laid out alike.

        A buffer holds a sum where its parameter has had a gradient since the last step (see :meth:`gradients`), else
        what is left of an earlier one. Read it after the last :meth:`accumulate` of a step: a ``main_grad`` holds the
        loss scale until then.
        """
        self._settle()
        return list(self._buffers)

    @torch.no_grad()
    def accumulate(self, set_to_none: bool = True) -> None:
        """Add the gradients to the buffers and clear them; call it after each backward.

        Args:
            set_to_none: leave ``.grad`` None, as ``Optimizer.zero_grad`` does, which is the least work for the next
                backward. False sets it to zero in the same launch, for gradients that have to stay where they are.

        Raises:
            TypeError: a gradient is sparse, or of a dtype that is not served; no buffer is changed.
            ValueError: a parameter has another device or shape than when the accumulator was made; no buffer is
                changed.
            RuntimeError: a ``main_grad`` was set or replaced since the accumulator was made; no buffer is changed. Or a
                backward has added to one since its sum was read. Or the optimizer's last step raised an error, and
                neither a step nor :meth:`reset` came after it.
            AssertionError: the scaler has scaled no loss.
        """
        if self._aside:
            raise RuntimeError(
                "the optimizer's last step raised an error; call step() again, or reset() before the next backward to "
                "go on without it"
            )
        if self._optimizer is not None:
            self._follow_optimizer()
        inv_scale = None if self.scaler is None else self.scaler.inverse_scale()
        self._main_grads.check(self._params, inv_scale is not None)
        work = self._launches()
        for (device, is_first), positions in work.items():
            found_inf, counts = self._findings(device, positions)
            accumulate_unchecked_(
                [self._params[position].grad for position in positions],
                [self._buffers[position] for position in positions],
                None if inv_scale is None else inv_scale.to(device, non_blocking=True),
                found_inf,
                counts,
                overwrite=is_first,
                clear=not set_to_none,
            )
        self._main_grads.collect(self._params, clear=not set_to_none)
        self._keeps_gradients = not set_to_none
        for positions in work.values():
            self._summed.update(positions)
        if set_to_none:
            for param in self._followed():
                param.grad = None

    def _follow_optimizer(self) -> None:
        """Take in parameters that were added to the optimizer, and leave alone those that were taken from it."""
        # By address: a tensor's own hash is a call of Python code.
        known, params = set(map(id, self._params)), _parameters(self._optimizer)
        self._extend([param for param in params if id(param) not in known])
        self._gone = set()
        if len(params) != len(self._params):
            followed = set(map(id, params))
            self._gone = {position for position, param in enumerate(self._params) if id(param) not in followed}

    def _followed(self) -> list[Tensor]:
        if not self._gone:
            return self._params
        return [param for position, param in enumerate(self._params) if position not in self._gone]

    def _launches(self) -> dict[tuple[torch.device, bool], list[int]]:
        """Positions of the gradients to add, by device and whether theirs is the first of the sum; all are checked."""
        work: dict[tuple[torch.device, bool], list[int]] = defaultdict(list)
        for position, (param, buffer) in enumerate(zip(self._params, self._buffers, strict=True)):
            grad = param.grad
            if grad is None or position in self._gone:
                continue
            if grad.layout != torch.strided or grad.dtype not in FLOATS:
                raise TypeError(
                    f"the gradient of parameter {position} is {described(grad)}; GradAccumulator "
                    f"takes dense float32, float16 and bfloat16 gradients"
                )
            if grad.device != buffer.device:
                raise ValueError(
                    f"the gradient of parameter {position} is on {grad.device} and its buffer on {buffer.device}; make "
                    f"the GradAccumulator after moving the model"
                )
            if grad.shape != buffer.shape:
                raise ValueError(
                    f"the gradient of parameter {position} has shape {tuple(grad.shape)} and its buffer "
                    f"{tuple(buffer.shape)}; make the GradAccumulator after changing the model"
                )
            if position not in self._main_grads:
                work[grad.device, position not in self._summed].append(position)
        return work

    def _findings(self, device: torch.device, positions: list[int]) -> tuple[Tensor, Tensor]:
        """The flag and the counts of NaN and Inf that a launch on ``device`` adds to; zero where a sum begins."""
        if device not in self._found_inf:
            self._found_inf[device] = torch.zeros((), dtype=torch.float32, device=device)
        key = (device, *positions)
        if key not in self._counts:
            self._counts[key] = torch.zeros(len(positions), dtype=torch.int64, device=device)
        return self._found_inf[device], self._counts[key]

    def gradients(self) -> dict[Tensor, Tensor]:
        """The buffer of every parameter that has had a gradient since the last step; see :attr:`buffers`."""
        self._settle()
        summed = sorted((self._summed | self._main_grads.summed) - self._gone)
        return {self._params[position]: self._buffers[position] for position in summed}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the sums in place so that their norm is at most ``max_norm``; call it once, right before the step.

        Args:
            max_norm, norm_type, error_if_nonfinite: as in :func:`mixft.amp.clip_grad_norm_`.

        Returns:
            The norm before clipping, 0-d FP32; waits for nothing unless ``error_if_nonfinite``.

        Raises:
            RuntimeError: ``error_if_nonfinite`` and the norm is NaN or Inf.
        """
        return clip_gradients_(list(self.gradients().values()), max_norm, norm_type, error_if_nonfinite)

    def found_inf_per_device(self) -> dict[torch.device, Tensor]:
        """0-d FP32 on each device of the parameters: 1 where a micro-batch since the last step held a NaN or Inf."""
        self._settle()
        return dict(self._found_inf)

    def counts(self) -> list[Counts]:
        """Pairs of parameters and int64 [parameters], NaN and Inf elements of their gradients since the last step.

        A parameter may be in several pairs; its counts then add up.
        """
        self._settle()
        counts = [([self._params[at] for at in positions], count) for (_, *positions), count in self._counts.items()]
        return counts + self._main_grads.counts(self._params)

    def reset(self) -> None:
        """Begin a new sum; a step of the optimizer, taken or skipped, does it."""
        self._take_back()
        self._summed: set[int] = set()
        self._found_inf: dict[torch.device, Tensor] = {}
        self._counts: dict[tuple, Tensor] = {}
        self._main_grads.reset()

    def _settle(self) -> None:
        if self._main_grads.summed:
            self._main_grads.settle(None if self.scaler is None else self.scaler.inverse_scale(), self._found_inf)

    def remove(self) -> None:
        """Let the optimizer step with the gradients themselves again."""
        self._take_back()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer is not None:
            self._optimizer.grad_accumulator = None

    def _extend(self, params: list[Tensor]) -> None:
        seen: dict[int, int] = {}
        for position, param in enumerate(params, start=len(self._params)):
            if not isinstance(param, Tensor):
                raise TypeError(f"parameter {position} is a {type(param).__name__}; give tensors: model.parameters()")
            if seen.setdefault(id(param), position) != position:
                raise ValueError(f"parameters {seen[id(param)]} and {position} are the same tensor; give it once")
            if is_dtensor(param):
                raise TypeError(
                    f"parameter {position} is a DTensor of shape {tuple(param.shape)}; GradAccumulator takes plain "
                    f"tensors, as FullyShardedDataParallel(use_orig_params=True) leaves them"
                )
            if param.layout != torch.strided or param.dtype not in FLOATS:
                raise TypeError(
                    f"parameter {position} is {described(param)}; GradAccumulator takes dense "
                    f"float32, float16 and bfloat16 parameters"
                )
        for position, param in enumerate(params, start=len(self._params)):
            buffer = self._main_grads.adopt(position, param)
            if buffer is None:
                buffer = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
            self._buffers.append(buffer)
        self._params += params

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(map(callable, (*args[1:], *kwargs.values()))):
            raise RuntimeError(
                "a closure cannot be used with a GradAccumulator: its gradients would not be added up; run backward "
                "and accumulate() before step()"
            )
        self._take_back()
        # After a launch that cleared in place, gradients that are there may be the zeros that it left.
        missed = 0 if self._keeps_gradients else sum(param.grad is not None for param in self._followed())
        missed += len(self._main_grads.unseen())
        if missed:
            raise RuntimeError(
                f"{missed} parameters have a gradient that was not added to its buffer; call accumulate() after each "
                f"backward"
            )
        gradients = self.gradients()
        self._lent = True
        if hasattr(optimizer, "main_grads"):
            optimizer.main_grads = gradients
            if optimizer.skip_nonfinite and getattr(optimizer, "found_inf", None) is None and self._found_inf:
                home = next(iter(self._found_inf))
                found = [value.to(home, non_blocking=True) for value in self._found_inf.values()]
                optimizer.found_inf = torch.stack(found).amax()
                self._lends_finding = True
            return
        self._aside = [(param, param.grad) for param in self._followed()]
        for param, _ in self._aside:
            param.grad = gradients[param].to(param.dtype) if param in gradients else None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self.reset()

    def _take_back(self) -> None:
        """Take from the optimizer what its step was lent; one that raised an error has it still."""
        if not self._lent:
            return
        self._lent = False
        if hasattr(self._optimizer, "main_grads"):
            self._optimizer.main_grads = None
        if self._lends_finding:
            vars(self._optimizer).pop("found_inf", None)
            self._lends_finding = False
        for param, grad in self._aside:
            param.grad = grad
        self._aside = []


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
